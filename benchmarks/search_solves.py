"""How often a search solves a game of numbers that greedy decoding does not: real weights.

    python benchmarks/search_solves.py --json benchmarks/results/search_solves.json

All methods get the same games, the same examples in front of them, and as many children. Ten
games are searched in the same batches: their prompts share the examples, which are held and
attended once. A game that was solved is searched no further.
Intervals are Wilson's, of 95 %. With `--resume`, games that the file of `--json` has are not
searched again.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from machine import processor

from paged_kv.integrations.huggingface.lm import PagedLM
from paged_kv.integrations.huggingface.nodes import Node as Handle
from paged_kv.tools.search.countdown import Game, posed, question, solution
from paged_kv.tools.search.methods import FUNCTIONS, Plan
from paged_kv.tools.search.models import Loaded, from_folder
from paged_kv.tools.search.nodes import Node
from paged_kv.tools.search.task import LONGEST, judge_game
from paged_kv.tools.search.trial import TEMPERATURE

EXAMPLES = 9
GROUP = 10  # games that are searched in the same batches
TOKENS = 16
Z = 1.96


class Interval(NamedTuple):
    """A share, and between which two the true one is to be expected."""

    share: float
    low: float
    high: float


def wilson(successes: int, trials: int) -> Interval:
    """Wilson's interval of 95 %."""
    share = successes / trials if trials else 0.0
    trials = max(1, trials)
    spread = Z * Z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / trials / 4)
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


class Outcomes:
    """What came of the games so far, in their order."""

    def __init__(self, methods: Sequence[str]) -> None:
        self.greedy: list[bool] = []  # whether it solved each
        self.searched: dict[str, list[int | None]] = {method: [] for method in methods}

    def read(self, result: dict[str, Any]) -> None:
        """Go on behind the outcomes in a result."""
        self.greedy = result["outcomes"]["greedy"]
        self.searched = result["outcomes"]["children_needed"]

    def as_dict(self) -> dict[str, Any]:
        """For a result."""
        return {"greedy": self.greedy, "children_needed": self.searched}


class Searched:
    """One game, and how far its search is."""

    def __init__(self, game: Game, root: Handle, plan: Plan, top: Node) -> None:
        self.game = game
        self.plan = plan
        self.paths = {top: root}
        self.children = 0
        self.solved_after: int | None = None  # children
        self.parents = next(plan)
        self.going = True

    def take(self, drawn: Sequence[Handle], tokenizer: Any) -> None:
        """Hand the children of this batch to the search."""
        made = []
        for parent, path in zip(self.parents, drawn):
            self.children += 1
            child = parent.child(self.children)
            child.tokens = path.new_tokens
            child.logprob = parent.logprob + sum(path.logprobs or [])
            judge_game(child, self.game, tokenizer)
            self.paths[child] = path
            made.append(child)
            if child.solved and self.solved_after is None:
                self.solved_after = self.children
        try:
            self.parents = self.plan.send(made)
        except StopIteration:
            self.going = False
        if self.solved_after is not None:
            self.going = False
        if not self.going:
            self.paths.clear()


class Bench:
    """The model, and the examples in front of every game."""

    def __init__(self, loaded: Loaded) -> None:
        self.name = loaded.name
        self.tokenizer = loaded.tokenizer
        self.lm = PagedLM(
            loaded.model,
            tokenizer=loaded.tokenizer,
            backend="tree",
            max_bytes=8 << 30,
            progress=False,
        )
        draws = random.Random("examples")
        self.examples = self._ids("".join(solution(posed(draws)) for _ in range(EXAMPLES)))
        self.kept = self.lm.prefill([self.examples])  # below which all prompts go on
        self.ends = self._ids("\n\n")

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def roots(self, games: Sequence[Game], seed: int) -> list[Handle]:
        """A root for each game; the draws below it follow from the seed and its place."""
        prompts = [self.examples + self._ids(question(game)) for game in games]
        return self.lm.prefill(prompts, seed=seed)

    def sample(self, nodes: Sequence[Handle], tokens: int, temperature: float) -> list[Handle]:
        """A child of each, to the end of its answer at most."""
        return self.lm.sample(
            nodes, max_new_tokens=tokens, temperature=temperature, eos_token_id=self.ends
        )

    def greedy(self, games: Sequence[Game], seed: int) -> list[bool]:
        """Which games greedy decoding solves."""
        found = []
        for game, path in zip(games, self.sample(self.roots(games, seed), LONGEST, 0.0)):
            child = Node(0, None, 0).child(1)
            child.tokens = path.new_tokens
            judge_game(child, game, self.tokenizer)
            found.append(child.solved)
        return found

    def search(
        self, method: str, games: Sequence[Game], seed: int, simulations: int, width: int
    ) -> list[int | None]:
        """After how many children each game was solved; None where it was not."""
        searches = []
        for game, root in zip(games, self.roots(games, seed)):
            top = Node(0, None, 0)
            plan = FUNCTIONS[method](top, simulations, width)
            searches.append(Searched(game, root, plan, top))
        while going := [each for each in searches if each.going]:
            parents = [each.paths[parent] for each in going for parent in each.parents]
            drawn = self.sample(parents, TOKENS, TEMPERATURE)
            for place, each in enumerate(going):
                each.take(drawn[place * width : (place + 1) * width], self.tokenizer)
        return [each.solved_after for each in searches]


def within(found: Sequence[int | None], children: int) -> int:
    """Games that were solved within so many children."""
    return sum(after is not None and after <= children for after in found)


def compared(first: Sequence[bool], other: Sequence[bool]) -> dict[str, int]:
    """Games by who solves them."""
    pairs = list(zip(first, other))
    return {
        "both": pairs.count((True, True)),
        "greedy_alone": pairs.count((True, False)),
        "search_alone": pairs.count((False, True)),
        "neither": pairs.count((False, False)),
    }


def summary(found: Sequence[int | None], greedy: Sequence[bool], width: int, most: int) -> Any:
    """How often one method solved its games, by children, and beside greedy decoding."""
    games = len(found)
    steps = range(width, most + 1, width)
    solved = [after is not None for after in found]
    missed = [after for after, known in zip(found, greedy) if not known]
    return {
        "solved": sum(solved),
        "share": wilson(sum(solved), games)._asdict(),
        "where_greedy_fails": wilson(within(missed, most), len(missed))._asdict(),
        "beside_greedy": compared(greedy, solved),
        "solved_within_children": {str(step): within(found, step) for step in steps},
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("build/SmolLM2-135M"))
    parser.add_argument("--games", type=int, default=100)
    parser.add_argument("--simulations", type=int, default=4)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--methods", nargs="+", default=["mcts", "best-of-n"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--resume", action="store_true", help="go on behind the games in --json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    games = [posed(random.Random(f"game {number}")).game for number in range(options.games)]
    bench = Bench(from_folder(options.model, "float32"))
    outcomes = Outcomes(options.methods)
    if options.resume and options.json and options.json.exists():
        outcomes.read(resumed(json.loads(options.json.read_text()), workload(options, bench)))
    for first in range(len(outcomes.greedy), len(games), GROUP):
        group = games[first : first + GROUP]
        greedy = bench.greedy(group, first)
        after = {
            method: bench.search(method, group, first, options.simulations, options.width)
            for method in options.methods
        }
        outcomes.greedy += greedy
        for method, found in after.items():
            outcomes.searched[method] += found
        report(options, bench, outcomes)


def report(options: argparse.Namespace, bench: Bench, outcomes: Outcomes) -> None:
    """Print how many were solved so far, and write the results."""
    solved = {method: len(found) - found.count(None) for method, found in outcomes.searched.items()}
    games = len(outcomes.greedy)
    print(f"{games} games: greedy solves {sum(outcomes.greedy)}, {solved}", flush=True)
    if options.json:
        unfinished = options.json.with_suffix(".part")
        unfinished.write_text(json.dumps(as_dict(options, bench, outcomes), indent=2) + "\n")
        unfinished.replace(options.json)


def resumed(result: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """A result of the same work. Raises SystemExit where it is of another one."""
    found = {name: value for name, value in result["workload"].items() if name != "games"}
    if found != wanted or result["workload"]["games"] % GROUP:
        raise SystemExit(f"cannot go on: {result['workload']} were measured, not {wanted}")
    return result


def workload(options: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """What is measured, whatever the number of games."""
    return {
        "model": bench.name,
        "methods": options.methods,
        "examples": EXAMPLES,
        "example_tokens": len(bench.examples),
        "simulations": options.simulations,
        "width": options.width,
        "tokens": TOKENS,
        "temperature": TEMPERATURE,
    }


def as_dict(options: argparse.Namespace, bench: Bench, outcomes: Outcomes) -> dict[str, Any]:
    """The results as plain data."""
    greedy = outcomes.greedy
    most = options.simulations * options.width
    return {
        "schema": 1,
        "machine": {
            "processor": processor(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "workload": {"games": len(greedy), **workload(options, bench)},
        "greedy": {"solved": sum(greedy), "share": wilson(sum(greedy), len(greedy))._asdict()},
        "methods": {
            method: summary(found, greedy, options.width, most)
            for method, found in outcomes.searched.items()
        },
        "outcomes": outcomes.as_dict(),
    }


if __name__ == "__main__":
    main()

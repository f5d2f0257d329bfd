"""Children are drawn: rows of unequal lengths and of different trees in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from paged_kv.errors import BadArgument
from paged_kv.integrations.huggingface.draws import seed_below, uniform
from paged_kv.integrations.huggingface.nodes import Node
from paged_kv.integrations.huggingface.paths import Paths
from paged_kv.integrations.huggingface.processors import processors
from paged_kv.integrations.huggingface.recipe import Recipe
from paged_kv.integrations.huggingface.token_tree import Tokens


class Row:
    """One child while it is drawn."""

    __slots__ = ("drawn", "fed", "logprobs", "path", "scores", "seed", "seq", "stopped")

    def __init__(self, path: Tokens, seed: int) -> None:
        self.path = path
        self.seed = seed
        self.seq: int | None = None  # K/V of the first `fed` tokens, once it was fed by itself
        self.fed = 0
        self.drawn: list[int] = []
        self.logprobs: list[float] = []
        self.scores: list[torch.Tensor] = []
        self.stopped = False

    def __len__(self) -> int:
        """Tokens of the path so far."""
        return len(self.path) + len(self.drawn)

    def behind(self, length: int) -> Tokens:
        """The path so far without its first tokens."""
        inside = len(self.path)
        if length >= inside:
            return tuple(self.drawn[length - inside :])
        return self.path[length:] + tuple(self.drawn)


class Sampler:
    """Draws behind some nodes, each row by the numbers of its own seed. Raises BadCount where paths
    become too long; what transformers raises of the recipe passes through.

    Used within a scope of the pages; `children` takes what was fed out of it.
    """

    def __init__(
        self,
        paths: Paths,
        nodes: Sequence[Node],
        recipe: Recipe,
        seed: int | None,
        *,
        whole: bool,
        streamer: Any,
    ) -> None:
        self.paths = paths
        self.parents = [node for node in nodes for _ in range(recipe.copies)]
        self.recipe = recipe
        self.whole = whole
        self.streamer = streamer
        lengths = [len(parent.tokens) for parent in self.parents]
        paths.check_tokens((), max(lengths) + recipe.new_tokens)
        self.processors = processors(paths.model, recipe, lengths)
        taken: dict[int, int] = {}
        self.rows = []
        for index, parent in enumerate(self.parents):
            place = parent.place
            ordinal = taken.get(place.number, place.children)
            taken[place.number] = ordinal + 1
            own = seed_below(place.seed, ordinal) if seed is None else seed_below(seed, index)
            self.rows.append(Row(parent.tokens, own))

    def draw(self, told: Callable[[int], object]) -> None:
        """Draw until every row has stopped or has its tokens; `told` hears how many came."""
        ids = self._padded()
        self._stream(ids)
        logits = self.paths.logits(self.parents)
        live = list(range(len(self.rows)))
        for left in reversed(range(self.recipe.new_tokens)):
            chosen = self._choose(ids, logits, live)
            ids = torch.cat([ids, chosen[:, None]], dim=1)
            self._stream(chosen)
            told(len(live))
            self._stop(ids)
            live = [place for place in live if not self.rows[place].stopped]
            if not live or not left:
                break
            found = self._step([self.rows[place] for place in live]).to(logits.dtype)
            if len(live) == len(self.rows):
                logits = found
            else:
                logits[live] = found
        if self.streamer is not None:
            self.streamer.end()

    def children(self) -> list[Node]:
        """The nodes of what was drawn, which have what was fed for them."""
        residents = self.paths.residents
        made = []
        for parent, row in zip(self.parents, self.rows):
            child = self.paths.child(parent, tuple(row.drawn), row.seed)
            child.logprobs = row.logprobs
            child.finish_reason = "stop" if row.stopped else "length"
            child.scores = torch.stack(row.scores) if row.scores else None
            if row.seq is not None:
                residents.put(child.place.number, row.seq, child.tokens[: row.fed], None)
            made.append(child)
        residents.fit()
        return made

    def _padded(self) -> torch.Tensor:
        """The paths [rows, longest], padded on the left as `generate` does."""
        longest = max(len(row.path) for row in self.rows)
        pad = (self.recipe.pad,)
        rows = [pad * (longest - len(row.path)) + row.path for row in self.rows]
        return torch.tensor(rows, device=self.paths.runner.shape.device)

    def _choose(self, ids: torch.Tensor, logits: torch.Tensor, live: Sequence[int]) -> torch.Tensor:
        """The next token of each row [rows]; padding for those that have stopped."""
        raw = logits.float()
        scores = self.processors(ids, raw.clone())
        going = _taken(scores, live)
        if self.recipe.greedy:
            found = going.argmax(-1)
        else:
            numbers = [uniform(self.rows[place].seed, len(self.rows[place])) for place in live]
            found = drawn_from(going, numbers)
        own = _taken(raw, live)
        logprobs = own.gather(-1, found[:, None])[:, 0] - own.logsumexp(-1)
        for place, token, logprob in zip(live, found.tolist(), logprobs.tolist()):
            row = self.rows[place]
            row.drawn.append(token)
            row.logprobs.append(logprob)
            if self.whole:
                row.scores.append(scores[place].clone())
        chosen = ids.new_full((len(self.rows),), self.recipe.pad)
        chosen[live] = found
        return chosen

    def _stop(self, ids: torch.Tensor) -> None:
        """Note which rows have stopped."""
        done = torch.as_tensor(self.recipe.criteria(ids, None)).expand(len(self.rows))
        for row, stopped in zip(self.rows, done.tolist()):
            row.stopped = row.stopped or bool(stopped)

    def _step(self, rows: Sequence[Row]) -> torch.Tensor:
        """Feed what was drawn last; logits [rows, vocabulary] of what follows."""
        runner = self.paths.runner
        states: list[torch.Tensor] = []
        left = list(rows)
        while left:
            count = runner.rows(len(row) - self._known(row) for row in left)
            fed = runner.fitting(left, count, self._feed)
            states += fed
            del left[: len(fed)]
        return self.paths.say(torch.stack(states))

    def _known(self, row: Row) -> int:
        """Tokens that need not be fed: of a fresh row, those whose K/V its parent has."""
        return self.paths.length(row.path) if row.seq is None else row.fed

    def _feed(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """Feed what is left of rows, in one batch; the hidden states behind them."""
        pages = self.paths.residents.pages
        known = [self._known(row) for row in rows]
        fresh = [(row.path, length) for row, length in zip(rows, known) if row.seq is None]
        with pages.scope() as scope:
            made = iter(self.paths.bases(*zip(*fresh)) if fresh else ())
            seqs = [next(made) if row.seq is None else row.seq for row in rows]
            fed = self.paths.runner.feed(
                seqs, [row.behind(length) for row, length in zip(rows, known)]
            )
            scope.keep([seq for seq, _ in fed])
        pages.release([row.seq for row in rows if row.seq is not None])
        for row, (seq, _) in zip(rows, fed):
            row.seq = seq
            row.fed = len(row)
        return [hidden[-1] for _, hidden in fed]

    def _stream(self, tokens: torch.Tensor) -> None:
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())


def _taken(tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Rows of a tensor, in order; all of them are not copied."""
    return tensor if len(rows) == len(tensor) else tensor[rows]


def drawn_from(scores: torch.Tensor, numbers: Sequence[float]) -> torch.Tensor:
    """One token a row of scores [B, vocabulary]: where its number, from 0 to 1, falls among the
    sums of probabilities. Int64 [B]. Raises BadArgument where a row has nothing to be drawn.

    >>> drawn_from(torch.zeros(3, 4), [0.0, 0.5, 0.9]).tolist()
    [0, 2, 3]
    """
    sums = scores.double().softmax(-1).cumsum(-1)
    total = sums[:, -1:]
    if not bool(total.isfinite().all()):
        raise BadArgument("scores", scores, "such that each row has a token to be drawn")
    wanted = torch.tensor(numbers, dtype=torch.float64, device=sums.device)[:, None]
    found = torch.searchsorted(sums, wanted * total, right=True)[:, 0]
    # the last one that can be drawn, where rounding leads behind it
    return torch.minimum(found, (sums < total).sum(-1))

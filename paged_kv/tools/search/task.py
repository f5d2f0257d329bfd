"""What a search is to find: a prompt, and what is thought of every node."""

from __future__ import annotations

import math
import random
from typing import Any, Protocol

from paged_kv.tools.search.countdown import Game, checked, posed, question, solution
from paged_kv.tools.search.nodes import Node

LONGEST = 64  # tokens of an answer


class Task(Protocol):
    """A prompt and a judge."""

    name: str
    checks: bool  # whether it knows a solution when it sees one
    question: str

    def prompt(self, tokens: int) -> list[int]:
        """So many tokens."""
        ...

    def judge(self, node: Node) -> None:
        """Set text, value, solved and done of a node whose tokens are known."""
        ...

    def best(self, text: str) -> str:
        """What counts of a node's text."""
        ...


class Countdown:
    """The numbers game, behind as many solved examples as fit into the prompt.

    A node is worth 1 once an attempt reaches the target; before that, the nearer its nearest
    attempt comes, the more, and nothing where no attempt was allowed, or none can follow. Before
    the first one is whole, its value is the mean probability of its tokens.
    """

    name = "countdown"
    checks = True

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self._tokenizer = tokenizer
        self._draws = random.Random(seed)
        self.game: Game = posed(self._draws).game
        self.question = question(self.game)

    def prompt(self, tokens: int) -> list[int]:
        """Examples, then the question; the first example is cut where the prompt begins."""
        text = self.question
        found = self._ids(text)
        while len(found) < tokens:
            text = solution(posed(self._draws)) + text
            found = self._ids(text)
        return found[-tokens:]

    def judge(self, node: Node) -> None:
        """Check the answer."""
        judge_game(node, self.game, self._tokenizer)

    def best(self, text: str) -> str:
        """The nearest attempt."""
        return checked(self.game, text).nearest or ""

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


class Likely:
    """Random tokens as the prompt, and paths that the model holds likely: for models without
    sense.
    """

    name = "likely paths"
    checks = False
    question = ""

    def __init__(self, vocabulary: int, seed: int) -> None:
        self._vocabulary = vocabulary
        self._draws = random.Random(seed)

    def prompt(self, tokens: int) -> list[int]:
        """Random tokens."""
        return [self._draws.randrange(self._vocabulary) for _ in range(tokens)]

    def judge(self, node: Node) -> None:
        """Take the mean probability."""
        node.text = " ".join(map(str, node.drawn))
        node.value = likelihood(node)
        node.done = len(node.drawn) >= LONGEST

    def best(self, text: str) -> str:
        """All of it."""
        return text


def judge_game(node: Node, game: Game, tokenizer: Any) -> None:
    """Set text, value, solved and done of a node that answers a game; see `Countdown`."""
    node.text = tokenizer.decode(list(node.drawn))
    found = checked(game, node.text)
    node.solved = found.solved
    node.done = found.solved or found.ended or len(node.drawn) >= LONGEST
    if node.done and not node.solved:
        node.value = 0.0
    elif found.distance is not None:
        node.value = 1 / (1 + found.distance)
    else:
        node.value = 0.0 if found.tried else likelihood(node)


def likelihood(node: Node) -> float:
    """The mean (geometric) probability of the tokens that were drawn down to a node."""
    return math.exp(node.logprob / len(node.drawn))

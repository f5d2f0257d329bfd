"""Nodes of a search over texts."""

from __future__ import annotations

from dataclasses import dataclass, field

from paged_kv.integrations.huggingface.draws import seed_below


@dataclass(eq=False)
class Node:
    """A path of tokens, and what is thought of it.

    `value`, 0 to 1, is what the task says of the text, or else the mean probability of its tokens;
    `done`: nothing is to be gained below it.
    """

    number: int  # in the order in which they were made; 0 is the root
    parent: Node | None
    seed: int
    tokens: tuple[int, ...] = ()  # behind the parent's; none of a root, whose prompt is not drawn
    logprob: float = 0.0  # of all drawn tokens down to here
    text: str = ""  # all that was drawn down to here
    value: float = 0.0
    solved: bool = False
    done: bool = False
    children: list[Node] = field(default_factory=list)
    visits: int = 0
    total: float = 0.0  # of the values that were seen in it and below

    @property
    def depth(self) -> int:
        """Steps below the root."""
        return 0 if self.parent is None else self.parent.depth + 1

    @property
    def drawn(self) -> tuple[int, ...]:
        """All tokens behind the prompt."""
        return () if self.parent is None else self.parent.drawn + self.tokens

    def child(self, number: int) -> Node:
        """One more child. Its seed follows from where it stands."""
        found = Node(number, self, seed_below(self.seed, len(self.children)))
        self.children.append(found)
        return found

"""What a run needs of one side of the comparison, and the numbers it yields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from paged_kv.tools.profile.counters import Probe

if TYPE_CHECKING:
    from paged_kv.cache import PagedKVCache


# The two kinds of sides: one keeps a dense copy of each context, as LightZero does, one has pages.
DENSE = "dense"
PAGED = "paged"
KINDS = (DENSE, PAGED)
# What the cache of each kind is called, by client.
TITLES = {
    "lightzero": {DENSE: "LightZero's cache", PAGED: "paged"},
    "reference": {DENSE: "dense cache", PAGED: "paged"},
}


class RootStep(NamedTuple):
    """One root step to be played: its number, counted from the first that is measured and negative
    in the warm-up, its simulations and its seed.
    """

    number: int
    simulations: int
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What one root step decided: per environment the action, the visit counts of the root's
    children, two values.
    """

    actions: list[int]
    visits: list[list[int]]
    values: list[float]


@dataclass
class Held:
    """Bytes held at one moment."""

    kv: int
    working: int
    reserved: int = 0
    sharing: float = 0.0


class Lookups(NamedTuple):
    """Contexts that a search asked for, and those that the cache found."""

    asked: int
    found: int


class Side(Protocol):
    """One model with one cache, playing its own copy of the environments."""

    kind: str
    title: str  # as readers know its cache
    token_bytes: int
    envs: int
    on_simulation: Callable[[], None] | None

    def step(self, simulations: int, seed: int) -> Outcome:
        """One root step: search from every environment's state, then act."""

    def probes(self) -> list[Probe]:
        """The methods that are cache work or model work."""

    def parts(self) -> list[Probe]:
        """The methods that are work of the model's blocks, its heads, its transforms or the tree;
        what none of these is, such as what lies between them, is charged to the rest.
        """

    def held(self) -> Held:
        """What the stores and the working buffers take now."""

    def root_tokens(self) -> int:
        """Tokens in the root windows of all environments."""

    def lookups(self) -> Lookups:
        """Lookups since the side was made."""

    def pages(self) -> PagedKVCache | None:
        """The paged cache of this side, or None where it has another one."""

    def totals(self) -> dict[str, int]:
        """Counters that only some caches have."""


def unique_bytes(side: Side, roots: int, simulations: int) -> int:
    """Bytes that the unique tokens take, so many simulations after roots of so many tokens.

    Every simulation expands one node per environment, and a node adds an action and an observation.
    """
    return (roots + 2 * simulations * side.envs) * side.token_bytes


@dataclass(frozen=True)
class Setting:
    """Everything that both sides share."""

    envs: int
    simulations: int
    seed: int
    device: torch.device
    page_size: int
    at: str
    keys: str = "node"
    window: str = "cached"
    step: str = "lean"
    linears: str = "torch"
    attention: str = "gathered"
    storage: str = "exact"
    compile: bool = False

    @property
    def padding(self) -> str:
        """What LightZero's rows see in front of shorter windows: what its own cache shows them,
        since both sides are compared action by action; exact windows are always masked.
        """
        return "attended" if self.window == "cached" else "masked"

"""What a run needs of one side of the comparison, and the numbers it yields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Outcome:
    """What one root step decided: per environment the action, the visit counts of the root's children, two values."""

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


class Side(Protocol):
    """One model with one cache, playing its own copy of the environments."""

    kind: str
    token_bytes: int
    envs: int
    on_simulation: Callable[[], None] | None

    def step(self, simulations: int, seed: int) -> Outcome:
        """One root step: search from every environment's state, then act."""

    def probes(self) -> list[tuple[Any, str, str]]:
        """The methods that are cache work or model work, for `counters.Probes`."""

    def held(self) -> Held:
        """What the stores and the working buffers take now."""

    def root_tokens(self) -> int:
        """Tokens in the root windows of all environments."""

    def lookups(self) -> tuple[int, int]:
        """Lookups and hits since the side was made."""

    def totals(self) -> dict[str, int]:
        """Counters that only some caches have."""


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
    extra: dict[str, Any] = field(default_factory=dict)

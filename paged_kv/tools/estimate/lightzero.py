"""The contexts that LightZero's own caches hold: rings whose places are filled one by one and never
given back.

Every place is a tensor of the full context length. `wm` has a place for each row of the batch in
work.
"""

from __future__ import annotations

from typing import NamedTuple

from paged_kv.tools.estimate.workload import Workload

INITS = 2  # roots an environment that 0.2.0 keeps
MAIN_INITS = 256  # and main, at the least


class Entries(NamedTuple):
    """Places filled in each of LightZero's three kinds of rings."""

    init: int
    recur: int
    wm: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def of_0_2_0(load: Workload) -> Entries:
    """LightZero 0.2.0."""
    return _filled(load, INITS)


def of_main(load: Workload) -> Entries:
    """LightZero's main of August 2026, without its cache manager."""
    return _filled(load, kept_roots(load))


def kept_roots(load: Workload) -> int:
    """Roots that main keeps in each environment."""
    return min(load.max_cache_size, max(MAIN_INITS, 2 * load.ring))


def working(load: Workload) -> int:
    """Contexts of the batch in work and of two buffers for one row."""
    return load.envs + 2


def _filled(load: Workload, inits: int) -> Entries:
    recur = load.ring
    steps = load.root_steps
    if steps is not None:
        inits = min(inits, steps)
        recur = min(recur, steps * load.simulations)
    return Entries(load.envs * inits, load.envs * recur, load.envs)

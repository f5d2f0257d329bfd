"""Where the time of a search goes: to the model's blocks, its heads, the transforms of values, the
tree, the cache, and what lies between them.

A few root steps of their own with every part wrapped: what that costs touches no other figure. Only
the proportions of the parts are taken from them, but for the cache, which is measured beside the
whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from paged_kv.tools.profile.counters import (
    CACHE,
    HEADS,
    LAYER,
    MODEL,
    REST,
    TRANSFORMS,
    TREE,
    Probes,
    Regions,
)
from paged_kv.tools.profile.side import Outcome, RootStep, Side

GLUE = "glue"
PARTS = (MODEL, HEADS, TRANSFORMS, TREE, CACHE, GLUE)
# Where a region is not a part of its own.
PART_OF = {LAYER: CACHE, REST: GLUE}


def parted(
    side: Side,
    step: RootStep,
    spent: dict[str, float],
    overhead: float,
    synchronize: Callable[[], None] | None = None,
) -> Outcome:
    """Play one root step, and add the seconds of each part to `spent`: all of them are the whole.

    `overhead` is what a wrapped call adds to its region, see `wrap_overhead`; it is taken off.
    """
    regions = Regions(synchronize)
    cache = [probe for probe in side.probes() if probe.region in (CACHE, LAYER)]
    with Probes([*cache, *side.parts()], regions):
        outcome = side.step(step.simulations, step.seed)
        regions.stop()
    for region, seconds in regions.seconds.items():
        part = PART_OF.get(region, region)
        spent[part] += max(0.0, seconds - overhead * regions.calls[region])
    return outcome


def divided(whole: float, cache: float, spent: Mapping[str, float]) -> dict[str, float]:
    """A time of which the cache took so much, the rest in proportion to what was spent there.

    >>> divided(200.0, 40.0, {"model": 3.0, "glue": 1.0, "cache": 9.0})
    {'model': 120.0, 'heads': 0.0, 'transforms': 0.0, 'tree': 0.0, 'cache': 40.0, 'glue': 40.0}
    """
    others = {part: spent.get(part, 0.0) for part in PARTS if part != CACHE}
    scale = (whole - cache) / (sum(others.values()) or 1)
    found = {**{part: seconds * scale for part, seconds in others.items()}, CACHE: cache}
    return {part: round(found[part], 2) for part in PARTS}

"""Plays one preset with both caches, root step by root step in turn, and measures.

Two passes over freshly made sides, and a third one where the run is to be recorded. The timed pass
alternates: one root step measures the whole search with nothing wrapped, the next the time inside
the cache with its methods wrapped; a few more root steps at its end say where the whole time goes.
The metered pass samples what is held after every simulation, and runs its last root steps under the
kernel and host copy counters, which are slow.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from paged_kv.recording import Recording
from paged_kv.tools.profile.counters import (
    CACHE,
    LAYER,
    HostCopyCounter,
    KernelCounter,
    Probes,
    Regions,
    wrap_overhead,
)
from paged_kv.tools.profile.parts import PARTS, parted
from paged_kv.tools.profile.presets import Preset
from paged_kv.tools.profile.side import (
    DENSE,
    KINDS,
    Held,
    Lookups,
    Outcome,
    RootStep,
    Setting,
    Side,
    unique_bytes,
)
from paged_kv.tools.profile.watch import watched

WARMUP_SIMULATIONS = 2
# three to time the search and three for the cache: with fewer, a median follows a disturbed step
ENOUGH_ROOTS = 6
WATCHED = 6  # root steps at most
PARTED = 4  # root steps at most
MakeSide = Callable[[str], Side]
Tick = Callable[[str], None]
Watch = Callable[[Recording], None]


@dataclass
class Measured:
    """Everything measured on one side."""

    search_us: list[float] = field(default_factory=list)  # per simulation, one value per root step
    cache_us: list[float] = field(default_factory=list)
    # of the root steps of cache_us, by themselves
    cache_shares: list[float] = field(default_factory=list)
    # the part of cache_us inside the transformer
    layer_us: list[float] = field(default_factory=list)
    # seconds of each part of the search, in root steps of their own
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    kernels: float = 0.0  # per simulation, retrieval + assembly + update + commit
    layer_kernels: float = 0.0
    host_copies: float = 0.0
    kernel_names: dict[str, float] = field(default_factory=dict)
    peak: Held = field(default_factory=lambda: Held(0, 0))
    end: Held = field(default_factory=lambda: Held(0, 0))
    unique_peak: int = 0
    lookups: Lookups = field(default_factory=lambda: Lookups(0, 0))
    totals: dict[str, int] = field(default_factory=dict)


@dataclass
class Fidelity:
    """How far both sides agree."""

    compared: int = 0
    equal: int = 0
    visits_equal: bool = True
    value_difference: float = 0.0

    def add(self, first: Outcome, second: Outcome) -> None:
        """Compare one root step."""
        self.compared += len(first.actions)
        self.equal += sum(a == b for a, b in zip(first.actions, second.actions, strict=True))
        self.visits_equal = self.visits_equal and first.visits == second.visits
        apart = (abs(a - b) for a, b in zip(first.values, second.values, strict=True))
        self.value_difference = max(self.value_difference, *apart)


@dataclass
class Run:
    """The result of `run`."""

    sides: dict[str, Measured]
    fidelity: Fidelity
    roots: int
    metered: int
    seconds: float


def count_ticks(preset: Preset, roots: int, sides: int = 2, watch: bool = False) -> int:
    """How many times `run` calls its tick."""
    watched = preset.warmup + _watched(preset, roots) if watch else 0
    timed = roots + _parted(roots)
    return sides * (2 * preset.warmup + timed + _metered(preset, roots) + watched)


def run(
    preset: Preset,
    setting: Setting,
    roots: int,
    make: MakeSide,
    tick: Tick,
    kinds: tuple[str, ...] = KINDS,
    watch: Watch | None = None,
) -> Run:
    """Run both passes; `tick` is called after every root step of every side.

    With `watch` there is a third pass, which calls it with a recording of each side.
    """
    started = time.perf_counter()
    measured = {kind: Measured() for kind in kinds}
    fidelity = Fidelity()
    _timed_pass(
        {k: make(k) for k in kinds},
        measured,
        fidelity,
        _steps(preset, setting, roots + _parted(roots)),
        setting,
        tick,
        roots,
    )
    _metered_pass(
        {k: make(k) for k in kinds}, measured, preset, setting, _metered(preset, roots), tick
    )
    seconds = time.perf_counter() - started
    if watch is not None:
        for kind in kinds:
            steps = _steps(preset, setting, _watched(preset, roots))
            watch(watched(make(kind), steps, lambda: tick("recording")))
    return Run(measured, fidelity, roots, _metered(preset, roots), seconds)


def _watched(preset: Preset, roots: int) -> int:
    return min(WATCHED, _metered(preset, roots))


def _parted(roots: int) -> int:
    return min(PARTED, max(1, roots // 4))


def _metered(preset: Preset, roots: int) -> int:
    return max(1, min(preset.metered, roots))


def _steps(preset: Preset, setting: Setting, roots: int) -> Iterator[RootStep]:
    """Every root step, those of the warm-up first.

    The windows fill with few simulations a step; the last warm-up step is a full one, so that every
    buffer has grown.
    """
    for index in range(-preset.warmup, roots):
        few = min(WARMUP_SIMULATIONS, setting.simulations)
        simulations = setting.simulations if index >= -1 else few
        yield RootStep(index, simulations, setting.seed * 1_000_003 + index + preset.warmup)


def _timed_pass(
    sides: dict[str, Side],
    measured: dict[str, Measured],
    fidelity: Fidelity,
    steps: Iterator[RootStep],
    setting: Setting,
    tick: Tick,
    roots: int,
) -> None:
    overhead = wrap_overhead()
    synchronize = _synchronizer(setting.device)
    regions = {kind: Regions(synchronize) for kind in sides}
    for step in steps:
        outcomes = []
        for kind in _turn(sides, step.number):
            side = sides[kind]
            if step.number < 0:
                outcome = side.step(step.simulations, step.seed)
            elif step.number >= roots:
                outcome = parted(side, step, measured[kind].parts, overhead, synchronize)
            elif step.number % 2 == 0:
                outcome = _time_search(side, measured[kind], step, setting.device)
            else:
                outcome = _time_cache(side, measured[kind], regions[kind], step, overhead)
            outcomes.append(outcome)
            tick("timing")
        if len(outcomes) == 2 and step.number < roots:
            fidelity.add(*outcomes)
    for kind, side in sides.items():
        measured[kind].lookups = side.lookups()
        measured[kind].totals = side.totals()


def _turn(sides: dict[str, Side], index: int) -> list[str]:
    """Who goes first changes every two root steps, so that neither always finds the caches warm."""
    kinds = list(sides)
    return kinds[::-1] if index // 2 % 2 else kinds


def _time_search(side: Side, measured: Measured, step: RootStep, device: torch.device) -> Outcome:
    synchronize = _synchronizer(device)
    if synchronize:
        synchronize()
    start = time.perf_counter()
    outcome = side.step(step.simulations, step.seed)
    if synchronize:
        synchronize()
    measured.search_us.append((time.perf_counter() - start) / step.simulations * 1e6)
    return outcome


def _time_cache(
    side: Side, measured: Measured, regions: Regions, step: RootStep, overhead: float
) -> Outcome:
    start = time.perf_counter()
    with Probes(side.probes(), regions):
        outcome = side.step(step.simulations, step.seed)
    whole = time.perf_counter() - start - overhead * sum(regions.calls.values())
    scale = 1e6 / step.simulations
    cache = regions.seconds[CACHE] - overhead * regions.calls[CACHE]
    layer = regions.seconds[LAYER] - overhead * regions.calls[LAYER]
    measured.cache_us.append((cache + layer) * scale)
    measured.layer_us.append(layer * scale)
    measured.cache_shares.append((cache + layer) / whole)
    return outcome


def _synchronizer(device: torch.device) -> Callable[[], None] | None:
    return torch.cuda.synchronize if device.type == "cuda" else None


def _metered_pass(
    sides: dict[str, Side],
    measured: dict[str, Measured],
    preset: Preset,
    setting: Setting,
    roots: int,
    tick: Tick,
) -> None:
    counted = min(preset.counted, roots)
    for step in _steps(preset, setting, roots):
        unique: list[int] = []
        for kind, side in sides.items():
            if step.number >= 0:
                side.on_simulation = _sampler(
                    side, measured[kind], unique if kind == DENSE else None
                )
            if step.number >= roots - counted:
                _count(side, measured[kind], step, counted)
            else:
                side.step(step.simulations, step.seed)
            tick("counting")
        unique_bytes = max(unique, default=0)
        for m in measured.values():
            m.unique_peak = max(m.unique_peak, unique_bytes)
    for kind, side in sides.items():
        measured[kind].end = side.held()


def _sampler(side: Side, measured: Measured, unique: list[int] | None) -> Callable[[], None]:
    """Called after every simulation of one root step: keeps the peaks."""
    done = 0
    window = 0

    def sample() -> None:
        nonlocal done, window
        done += 1
        held = side.held()
        peak = measured.peak
        measured.peak = Held(
            max(held.kv, peak.kv),
            max(held.working, peak.working),
            max(held.reserved, peak.reserved),
            max(held.sharing, peak.sharing),
        )
        if unique is not None:
            window = window or side.root_tokens()
            unique.append(unique_bytes(side, window, done))

    return sample


def _count(side: Side, measured: Measured, step: RootStep, roots: int) -> None:
    regions = Regions()
    sample = side.on_simulation
    side.on_simulation = None
    with (
        Probes(side.probes(), regions),
        HostCopyCounter(regions) as copies,
        KernelCounter(regions) as kernels,
    ):
        side.on_simulation = _outside(sample, regions)
        side.step(step.simulations, step.seed)
    per = 1 / (step.simulations * roots)
    measured.kernels += kernels.counts[CACHE] * per
    measured.layer_kernels += kernels.counts[LAYER] * per
    measured.host_copies += copies.counts[CACHE] * per
    for (region, name), n in kernels.names.items():
        if region == CACHE:
            measured.kernel_names[name] = measured.kernel_names.get(name, 0.0) + n * per


def _outside(sample: Callable[[], None] | None, regions: Regions) -> Callable[[], None]:
    def sampled() -> None:
        around = regions.now
        regions.now = "sampling"
        if sample is not None:
            sample()
        regions.now = around

    return sampled


def typical(values: list[float]) -> float:
    """The median, which one disturbed root step does not move; 0 where there is nothing."""
    return statistics.median(values) if values else 0.0

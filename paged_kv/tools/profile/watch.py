"""A pass that is only looked at: both sides recorded after every simulation, for the page. Nothing
of it is timed.
"""

from __future__ import annotations

import dataclasses
import gc
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from paged_kv.recording import Recording, header, read_recording, record
from paged_kv.recording.figures import state
from paged_kv.tools.profile.counters import CACHE, LAYER, Probes, Regions, wrap_overhead
from paged_kv.tools.profile.side import RootStep, Side, unique_bytes

# seconds: the samples are taken here, after each simulation, and not by the recorder
RARELY = 3600.0


def watched(side: Side, steps: Iterable[RootStep], tick: Callable[[], None]) -> Recording:
    """Play the root steps of one side, and record those that are no warm-up; `tick` is called after
    each of all.

    On pages each root step leaves a tree and a page map, taken after its last simulation.
    """
    steps = list(steps)
    for step in steps:
        if step.number < 0:
            side.step(step.simulations, step.seed)
            tick()
    watcher = _Watcher(side)
    try:
        return watcher.recording([step for step in steps if step.number >= 0], tick)
    finally:
        side.on_simulation = None


class _Watcher:
    """Samples of one side, by simulation."""

    def __init__(self, side: Side) -> None:
        self._side = side
        self._samples: list[dict[str, Any]] = []
        self._regions = Regions()
        self._overhead = wrap_overhead()
        self._lookups = side.lookups()
        self._start = time.perf_counter()

    def recording(self, steps: list[RootStep], tick: Callable[[], None]) -> Recording:
        """Play these root steps, and return what was seen."""
        cache = self._side.pages()
        title = self._side.title
        sizes = {"token_bytes": self._side.token_bytes}
        gc.collect()  # else one of a third of a second may count as time in this side's cache
        with Probes(self._side.probes(), self._regions):
            if cache is None:
                self._play(steps, tick, lambda name: None)
                ends = [{"kind": "end", "t": time.perf_counter() - self._start, "reason": "done"}]
                return Recording(header(title, sizes), samples=self._samples, ends=ends)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "pages.jsonl"
                with record(cache, path, title=title, interval=RARELY) as recorder:
                    self._play(steps, tick, recorder.snapshot)
                return dataclasses.replace(read_recording(path), samples=self._samples)

    def _play(
        self, steps: list[RootStep], tick: Callable[[], None], snapshot: Callable[[str], None]
    ) -> None:
        for step in steps:
            self._side.on_simulation = self._sampler(step, snapshot)
            self._side.step(step.simulations, step.seed)
            tick()

    def _sampler(self, step: RootStep, snapshot: Callable[[str], None]) -> Callable[[], None]:
        done = 0
        roots = 0

        def sample() -> None:
            nonlocal done, roots
            done += 1
            cache = self._side.pages()
            if cache is None:
                roots = roots or self._side.root_tokens()
                filled = {
                    "bytes_in_use": self._side.held().kv,
                    "bytes_unique": unique_bytes(self._side, roots, done),
                }
            else:
                filled = state(cache)
            self._samples.append(
                {
                    "kind": "sample",
                    "simulation": len(self._samples) + 1,
                    "root": step.number + 1,
                    **self._counts(),
                    **filled,
                }
            )
            if done == step.simulations:
                snapshot(f"root step {step.number + 1}")

        return sample

    def _counts(self) -> dict[str, float]:
        """What only grows: lookups, and seconds inside the cache."""
        lookups = self._side.lookups()
        seconds = self._regions.seconds
        calls = self._regions.calls
        spent = sum(seconds[part] - self._overhead * calls[part] for part in (CACHE, LAYER))
        return {
            "t": time.perf_counter() - self._start,
            "queries": lookups.asked - self._lookups.asked,
            "hits": lookups.found - self._lookups.found,
            "cache_s": max(0.0, spent),
        }

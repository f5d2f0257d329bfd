"""A preset played on pages alone, under a recording."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from paged_kv.recording import record
from paged_kv.tools.profile import client
from paged_kv.tools.profile.presets import PRESETS, Preset
from paged_kv.tools.profile.reference_client import ReferenceSide
from paged_kv.tools.profile.side import Setting, Side
from paged_kv.tools.profile.workload import _steps


def play(
    path: str | os.PathLike[str],
    preset: str = "cartpole",
    *,
    envs: int | None = None,
    simulations: int | None = None,
    roots: int | None = None,
    seed: int = 0,
    threads: int = 1,
    device: str = "cpu",
    page_size: int = 2,
    reference: bool = False,
    interval: float = 0.05,
    accesses: bool = False,
    on_tick: Callable[[str, int, int], None] | None = None,
) -> None:
    """Search with the paged cache, and record it to a file. Arguments as for `profile`; `interval`
    and `accesses` as for `record`.

    Every root step leaves a mark, "warm-up" or "search". Raises as `record` does.
    """
    version = None if reference else client.lightzero_version()
    chosen = PRESETS[preset] if version else PRESETS[preset].without_lightzero()
    setting = Setting(
        envs or chosen.envs,
        simulations or chosen.simulations,
        seed,
        torch.device(device),
        page_size,
        "read",
    )
    steps = list(_steps(chosen, setting, roots or chosen.roots))
    labels = {
        "preset": preset,
        "environments": str(setting.envs),
        "simulations": str(setting.simulations),
        "client": f"lightzero {version}" if version else "reference",
    }
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        side, target = _paged(chosen, setting, bool(version))
        with record(
            target,
            path,
            title=f"{preset}, paged",
            labels=labels,
            interval=interval,
            accesses=accesses,
        ) as recorder:
            for done, step in enumerate(steps, 1):
                recorder.mark("warm-up" if step.number < 0 else "search")
                side.step(step.simulations, step.seed)
                if on_tick is not None:
                    on_tick("recording", done, len(steps))
    finally:
        torch.set_num_threads(before)


def _paged(preset: Preset, setting: Setting, lightzero: bool) -> tuple[Side, Any]:
    """A side on pages, and what of it is recorded."""
    if lightzero:
        side = client.LightZeroSide("paged", preset, setting)
        return side, side.wm
    reference = ReferenceSide("paged", preset, setting)
    return reference, reference.contexts

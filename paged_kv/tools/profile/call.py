"""One call that profiles one preset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from paged_kv.attention.in_pages import why_not
from paged_kv.errors import BadArgument
from paged_kv.integrations.ties import fixed_ties
from paged_kv.recording import Recording
from paged_kv.tools.profile import client
from paged_kv.tools.profile.presets import PRESETS, Preset
from paged_kv.tools.profile.result import About, as_dict
from paged_kv.tools.profile.side import Setting, Side
from paged_kv.tools.profile.workload import count_ticks, run


def profile(
    preset: str = "cartpole",
    *,
    envs: int | None = None,
    simulations: int | None = None,
    roots: int | None = None,
    seed: int = 0,
    threads: int = 1,
    device: str = "cpu",
    page_size: int = 2,
    at: str = "read",
    keys: str = "node",
    window: str = "cached",
    step: str = "lean",
    linears: str = "torch",
    attention: str = "gathered",
    storage: str = "exact",
    compile: bool = False,
    reference: bool = False,
    on_tick: Callable[[str, int, int], None] | None = None,
    on_recording: Callable[[Recording], None] | None = None,
) -> dict[str, Any]:
    """Measure one preset with both caches and return the result as plain data.

    `envs`, `simulations` and `roots` default to the preset's; `at`, `keys`, `window`, `step`,
    `linears`, `attention`, `storage` and `compile` are those of `integrations.lightzero.attach`.
    `reference` runs the small reference world model even where LightZero is installed.
    `on_tick(stage, done, total)` is called after every root step.
    `on_recording` is called with a recording of each side, made in a pass of its own beside those
    that are measured. Takes seconds to minutes. Sets torch's number of threads for the process, and
    puts it back. Raises BadArgument where `attention="pages"` cannot be used here, and whatever
    `attach` raises.
    """
    chosen = PRESETS[preset]
    missing = why_not(torch.device(device), torch.float32) if attention == "pages" else None
    if missing is not None:
        raise BadArgument("attention", attention, f"'gathered', since {missing}")
    setting = Setting(
        envs or chosen.envs,
        simulations or chosen.simulations,
        seed,
        torch.device(device),
        page_size,
        at,
        keys,
        window,
        step,
        linears,
        attention,
        storage,
        compile,
    )
    steps = roots or chosen.roots
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        version = None if reference else client.lightzero_version()
        runner = _reference if version is None else _lightzero
        total = count_ticks(chosen, steps, watch=on_recording is not None)
        return runner(chosen, setting, steps, _ticker(on_tick, total), on_recording)
    finally:
        torch.set_num_threads(before)


def _lightzero(
    preset: Preset,
    setting: Setting,
    roots: int,
    tick: Callable[[str], None],
    on_recording: Callable[[Recording], None] | None,
) -> dict[str, Any]:
    with client.quiet():
        file = client.tree_file()
    with fixed_ties(file) as fixed:
        measured = run(
            preset,
            setting,
            roots,
            lambda kind: client.LightZeroSide(kind, preset, setting),
            tick,
            watch=on_recording,
        )
    about = About(
        client="lightzero",
        client_version=client.lightzero_version() or "",
        weights=client.weights_of(preset),
        tie_breaking="fixed" if fixed else "clock",
    )
    return as_dict(measured, preset, setting, about)


def _reference(
    preset: Preset,
    setting: Setting,
    roots: int,
    tick: Callable[[str], None],
    on_recording: Callable[[Recording], None] | None,
) -> dict[str, Any]:
    from paged_kv import __version__
    from paged_kv.tools.profile.reference_client import ReferenceSide

    shaped = preset.without_lightzero()

    def make(kind: str) -> Side:
        return ReferenceSide(kind, shaped, setting)

    about = About(
        client="reference", client_version=__version__, weights="random", tie_breaking="fixed"
    )
    measured = run(shaped, setting, roots, make, tick, watch=on_recording)
    return as_dict(measured, shaped, setting, about)


def _ticker(on_tick: Callable[[str, int, int], None] | None, total: int) -> Callable[[str], None]:
    done = 0

    def tick(stage: str) -> None:
        nonlocal done
        done += 1
        if on_tick is not None:
            on_tick(stage, done, total)

    return tick

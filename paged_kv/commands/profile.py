"""`paged-kv profile`: the same search with LightZero's own cache and with pages."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import fail, natural, positive, two_or_more, unusable_device, unusable_file

if TYPE_CHECKING:
    from rich.console import Console

PRESET_NAMES = ("cartpole", "atari", "atari-8l", "long", "memory")


def add(commands: Any) -> None:
    """Add the command to the subparsers of `paged-kv`."""
    command = commands.add_parser(
        "profile", help="run the same search with LightZero's own cache and with pages, and compare",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("--preset", default="cartpole", choices=(*PRESET_NAMES, "all"), help="the workload")
    command.add_argument("--envs", type=positive, help="environments searched in one batch (default: the preset's)")
    command.add_argument("--simulations", type=positive, help="simulations per root step (default: the preset's)")
    command.add_argument("--roots", type=two_or_more, help="root steps to time (default: the preset's)")
    command.add_argument("--seed", type=natural, default=0, help="seed of both sides")
    command.add_argument("--threads", type=positive, default=1, help="torch threads")
    command.add_argument("--device", default="cpu", help="torch device of the model and both caches")
    command.add_argument("--page-size", type=positive, default=2, help="token slots per page")
    command.add_argument("--at", default="read", choices=("read", "write"), help="when learned positions are re-based")
    command.add_argument("--keys", default="node", choices=("node", "latent"), help="how search contexts are found")
    command.add_argument("--window", default="cached", choices=("cached", "exact"),
                         help="what a context keeps: keys and values, or tokens that each step computes anew")
    command.add_argument("--reference", action="store_true", help="use the reference world model, not LightZero")
    command.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    try:
        from rich.console import Console
    except ImportError:
        return fail("this command needs rich: pip install 'paged-kv[cli]'")
    import torch

    from ..errors import PagedKVError
    from ..profile import client

    wrong = unusable_device(options.device, torch) or unusable_file(options.json)
    if wrong:
        return fail(wrong, status=2)
    if client.lightzero_version() is None and not options.reference:
        print("paged-kv: LightZero is not installed; running the reference world model instead.", file=sys.stderr)
        options.reference = True
    try:
        results = _run_all(options, Console(stderr=True))
    except PagedKVError as error:
        return fail(str(error))
    from ..profile.table import show

    show(results, Console())
    if options.json:
        options.json.write_text(json.dumps(results[0] if len(results) == 1 else results, indent=2) + "\n")
    return 0


def _run_all(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ..profile import profile

    names = PRESET_NAMES if options.preset == "all" else (options.preset,)
    results = []
    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for name in names:
            task = progress.add_task(f"{name}: loading", total=None)

            def tick(stage: str, done: int, total: int, task: Any = task, name: str = name) -> None:
                progress.update(task, description=f"{name}: {stage}", completed=done, total=total)

            results.append(profile(
                name, envs=options.envs, simulations=options.simulations, roots=options.roots, seed=options.seed,
                threads=options.threads, device=options.device, page_size=options.page_size, at=options.at,
                keys=options.keys, window=options.window, reference=options.reference, on_tick=tick,
            ))
    return results

"""`paged-kv profile`: the same search with LightZero's own cache and with pages."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import fail, missing_report, natural, positive, two_or_more, unusable_device, unusable_file

if TYPE_CHECKING:
    from rich.console import Console

    from ..recording import Recording

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
    command.add_argument("--reference", action="store_true", help="use the reference world model, not LightZero")
    command.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    command.add_argument("--html", type=Path, metavar="FILE", help="also write a page that shows both caches to FILE")
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

    wrong = unusable_device(options.device, torch) or unusable_file(options.json) or unusable_file(options.html)
    if wrong:
        return fail(wrong, status=2)
    missing = missing_report() if options.html else None
    if missing:
        return fail(missing)
    if client.lightzero_version() is None and not options.reference:
        print("paged-kv: LightZero is not installed; running the reference world model instead.", file=sys.stderr)
        options.reference = True
    try:
        runs = _run_all(options, Console(stderr=True))
    except PagedKVError as error:
        return fail(str(error))
    from ..profile.table import show

    results = [result for result, _ in runs]
    show(results, Console())
    try:
        if options.json:
            options.json.write_text(json.dumps(results[0] if len(results) == 1 else results, indent=2) + "\n")
        for result, recordings in runs if options.html else ():
            _write_page(page_file(options, result), recordings, result)
    except OSError as error:  # a full disk, a file that may not be written
        return fail(str(error))
    return 0


def page_file(options: argparse.Namespace, result: dict[str, Any]) -> Path:
    """Where the page of a result goes: each of several presets gets one of its own, report-cartpole.html and so on."""
    path: Path = options.html
    return path if options.preset != "all" else path.with_stem(f"{path.stem}-{result['workload']['preset']}")


def _write_page(path: Path, recordings: list[Recording], result: dict[str, Any]) -> None:
    from ..html import page

    path.write_text(page(recordings, result), encoding="utf-8")
    print(f"Page: {path}")


def _run_all(options: argparse.Namespace, console: Console) -> list[tuple[dict[str, Any], list[Recording]]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ..profile import profile

    names = PRESET_NAMES if options.preset == "all" else (options.preset,)
    runs = []
    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for name in names:
            task = progress.add_task(f"{name}: loading", total=None)

            def tick(stage: str, done: int, total: int, task: Any = task, name: str = name) -> None:
                progress.update(task, description=f"{name}: {stage}", completed=done, total=total)

            recordings: list[Recording] = []
            result = profile(
                name, envs=options.envs, simulations=options.simulations, roots=options.roots, seed=options.seed,
                threads=options.threads, device=options.device, page_size=options.page_size, at=options.at,
                keys=options.keys, reference=options.reference, on_tick=tick,
                on_recording=recordings.append if options.html else None,
            )
            runs.append((result, recordings))
    return runs

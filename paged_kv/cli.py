"""The `paged-kv` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# Heavy imports (torch, LightZero, rich) wait until a command runs: `--help` answers at once, and Ctrl-C while they load
# is handled like any other.

PRESET_NAMES = ("cartpole", "atari", "atari-8l", "long", "memory")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, 1 for a failure, 2 for bad arguments, 130 after Ctrl-C."""
    options = parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        return status
    except KeyboardInterrupt:
        print("paged-kv: stopped, nothing was written.", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    top = argparse.ArgumentParser(prog="paged-kv", description="A paged key/value cache for tree search.")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    command = commands.add_parser(
        "profile", help="run the same search with LightZero's own cache and with pages, and compare",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("--preset", default="cartpole", choices=(*PRESET_NAMES, "all"), help="the workload")
    command.add_argument("--envs", type=_positive, help="environments searched in one batch (default: the preset's)")
    command.add_argument("--simulations", type=_positive, help="simulations per root step (default: the preset's)")
    command.add_argument("--roots", type=_two_or_more, help="root steps to time (default: the preset's)")
    command.add_argument("--seed", type=_natural, default=0, help="seed of both sides")
    command.add_argument("--threads", type=_positive, default=1, help="torch threads")
    command.add_argument("--device", default="cpu", help="torch device of the model and both caches")
    command.add_argument("--page-size", type=_positive, default=2, help="token slots per page")
    command.add_argument("--at", default="read", choices=("read", "write"), help="when learned positions are re-based")
    command.add_argument("--keys", default="node", choices=("node", "latent"), help="how search contexts are found")
    command.add_argument("--reference", action="store_true", help="use the reference world model, not LightZero")
    command.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    command.set_defaults(run=_profile)
    return top


def _at_least(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return value


def _positive(text: str) -> int:
    return _at_least(text, 1)


def _two_or_more(text: str) -> int:
    return _at_least(text, 2)  # one root step times the search, the next the cache


def _natural(text: str) -> int:
    return _at_least(text, 0)


def _profile(options: argparse.Namespace) -> int:
    try:
        from rich.console import Console
    except ImportError:
        return _fail("this command needs rich: pip install 'paged-kv[cli]'")
    import torch

    from .errors import PagedKVError
    from .profile import client

    wrong = _unusable_device(options.device, torch) or _unusable_file(options.json)
    if wrong:
        return _fail(wrong, status=2)
    if client.lightzero_version() is None and not options.reference:
        print("paged-kv: LightZero is not installed; running the reference world model instead.", file=sys.stderr)
        options.reference = True
    try:
        results = _run_all(options, Console(stderr=True))
    except PagedKVError as error:
        return _fail(str(error))
    from .report import show

    show(results, Console())
    if options.json:
        options.json.write_text(json.dumps(results[0] if len(results) == 1 else results, indent=2) + "\n")
    return 0


def _run_all(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from .profile import profile

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
                keys=options.keys, reference=options.reference, on_tick=tick,
            ))
    return results


def _unusable_device(device: str, torch: Any) -> str | None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        return f"device {device!r} cannot be used: {str(error).splitlines()[0]}"
    return None


def _unusable_file(path: Path | None) -> str | None:
    if path is None or (path.parent.is_dir() and not path.is_dir()):
        return None
    return f"cannot write to {str(path)!r}: {'it is a directory' if path.is_dir() else 'no such directory'}"


def _fail(message: str, status: int = 1) -> int:
    print(f"paged-kv: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())

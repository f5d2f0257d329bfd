"""`paged-kv record`: a search on pages, recorded to a file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .common import fail, natural, positive, unusable_device, unusable_file
from .profile import PRESET_NAMES


def add(commands: Any) -> None:
    """Add the command to the subparsers of `paged-kv`."""
    command = commands.add_parser(
        "record", help="search on pages, and record it to a file for `report` and `diff`",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("file", type=Path, metavar="FILE", help="where to record; an existing file is overwritten")
    command.add_argument("--preset", default="cartpole", choices=PRESET_NAMES, help="the workload")
    command.add_argument("--envs", type=positive, help="environments searched in one batch (default: the preset's)")
    command.add_argument("--simulations", type=positive, help="simulations per root step (default: the preset's)")
    command.add_argument("--roots", type=positive, help="root steps after the warm-up (default: the preset's)")
    command.add_argument("--seed", type=natural, default=0, help="seed of environments and search")
    command.add_argument("--threads", type=positive, default=1, help="torch threads")
    command.add_argument("--device", default="cpu", help="torch device of the model and the cache")
    command.add_argument("--page-size", type=positive, default=2, help="token slots per page")
    command.add_argument("--interval", type=_milliseconds, default=50.0, metavar="MS", help="ms between samples")
    command.add_argument("--reference", action="store_true", help="use the reference world model, not LightZero")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    import torch

    from ..errors import PagedKVError
    from ..profile import client
    from ..profile.play import play

    wrong = unusable_device(options.device, torch) or unusable_file(options.file)
    if wrong:
        return fail(wrong, status=2)
    if client.lightzero_version() is None and not options.reference:
        print("paged-kv: LightZero is not installed; recording the reference world model instead.", file=sys.stderr)
        options.reference = True
    try:
        play(
            options.file, options.preset, envs=options.envs, simulations=options.simulations, roots=options.roots,
            seed=options.seed, threads=options.threads, device=options.device, page_size=options.page_size,
            reference=options.reference, interval=options.interval / 1000,
        )
    except (PagedKVError, OSError) as error:
        return fail(str(error))
    except KeyboardInterrupt:
        written = f"what was recorded by then is in {options.file}" if options.file.exists() else "nothing was written"
        return fail(f"stopped, {written}.", status=130)
    print(f"recorded to {options.file}: paged-kv report {options.file}")
    return 0


def _milliseconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of milliseconds of at least 0")
    return value

"""`paged-kv record`: a search on pages, recorded to a file."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from paged_kv.tools.commands.common import (
    fail,
    file,
    positive,
    seed,
    threads,
    unusable_device,
    unusable_file,
)
from paged_kv.tools.commands.profile import PRESET_NAMES

DESCRIPTION = """\
Search on pages as `profile` does, and record what the cache does to a file, for
`report` and `diff`. Where LightZero is not installed, a small world model of
this package is searched. Ctrl-C ends it; what was recorded by then is kept."""
EXAMPLES = """\
examples:
  paged-kv record run.jsonl                       CartPole, some seconds
  paged-kv record long.jsonl --preset long        longer windows
  paged-kv record quick.jsonl --reference         without LightZero
  paged-kv report run.jsonl --html run.html       and look at it"""


def add(commands: Any) -> None:
    """Add the command to the subparsers of `paged-kv`."""
    command = commands.add_parser(
        "record",
        help="search on pages, and record it to a file for `report` and `diff`",
        usage="%(prog)s FILE [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    command.add_argument(
        "file", type=file, metavar="FILE", help="where to record; an existing file is overwritten"
    )
    what = command.add_argument_group("what to run")
    what.add_argument(
        "--preset",
        default="cartpole",
        choices=PRESET_NAMES,
        metavar="NAME",
        help=f"{', '.join(PRESET_NAMES)} (default: %(default)s)",
    )
    what.add_argument(
        "--envs",
        type=positive,
        metavar="N",
        help="environments searched in one batch (default: the preset's)",
    )
    what.add_argument(
        "--simulations",
        type=positive,
        metavar="N",
        help="simulations per root step (default: the preset's)",
    )
    what.add_argument(
        "--roots",
        type=positive,
        metavar="N",
        help="root steps after the warm-up (default: the preset's)",
    )
    what.add_argument(
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="seed of environments and search (default: %(default)s)",
    )
    what.add_argument(
        "--reference",
        action="store_true",
        help="search this package's own world model, not LightZero's",
    )
    how = command.add_argument_group("how")
    how.add_argument(
        "--interval",
        type=_milliseconds,
        default=50.0,
        metavar="N",
        help="milliseconds between samples (default: %(default)g)",
    )
    how.add_argument(
        "--page-size",
        type=positive,
        default=2,
        metavar="N",
        help="token slots per page (default: %(default)s)",
    )
    how.add_argument(
        "--device",
        default="cpu",
        metavar="NAME",
        help="torch device of the model and the cache (default: %(default)s)",
    )
    how.add_argument(
        "--threads",
        type=threads,
        default=1,
        metavar="N",
        help="torch threads (default: %(default)s)",
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    import torch

    from paged_kv.errors import PagedKVError
    from paged_kv.tools.commands.memory import memory, too_large
    from paged_kv.tools.profile import client
    from paged_kv.tools.profile.play import play

    wrong = unusable_device(options.device, torch) or unusable_file(options.file)
    sizes = {"envs": options.envs, "simulations": options.simulations}
    try:
        wrong = wrong or too_large(
            options.preset, sizes, options.page_size, memory(options.device, torch)
        )
    except PagedKVError as error:
        wrong = str(error)
    if wrong:
        return fail(wrong, status=2)
    if client.lightzero_version() is None and not options.reference:
        print(
            "paged-kv: LightZero is not installed; recording the reference world model instead.",
            file=sys.stderr,
        )
        options.reference = True
    try:
        play(
            options.file,
            options.preset,
            envs=options.envs,
            simulations=options.simulations,
            roots=options.roots,
            seed=options.seed,
            threads=options.threads,
            device=options.device,
            page_size=options.page_size,
            reference=options.reference,
            interval=options.interval / 1000,
        )
    except (PagedKVError, OSError) as error:
        return fail(str(error))
    except KeyboardInterrupt:
        written = (
            f"what was recorded by then is in {options.file}"
            if options.file.exists()
            else "nothing was written"
        )
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

"""`paged-kv record`: a search on pages, recorded to a file."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from paged_kv.tools.commands.common import (
    fail,
    file,
    positive,
    unusable_device,
)
from paged_kv.tools.commands.outputs import Named, unusable_outputs
from paged_kv.tools.commands.profile import PRESET_NAMES
from paged_kv.tools.commands.searching import Wording, add_machine, add_page_size, add_what

WORDING = Wording(
    presets=PRESET_NAMES,
    listed=", ".join(PRESET_NAMES),
    roots=positive,
    about_roots="root steps after the warm-up (default: the preset's)",
    about_seed="seed of environments and search (default: %(default)s)",
)
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
    add_what(command, WORDING)
    how = command.add_argument_group("how")
    how.add_argument(
        "--interval",
        type=_milliseconds,
        default=50.0,
        metavar="N",
        help="milliseconds between samples (default: %(default)g)",
    )
    how.add_argument(
        "--accesses", action="store_true", help="keep which sequences were read when, too"
    )
    add_page_size(how)
    add_machine(how, "the model and the cache")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    import torch

    from paged_kv.errors import PagedKVError
    from paged_kv.tools.profile import client

    wrong = _wrong(options, torch)
    if wrong:
        return fail(wrong, status=2)
    if client.lightzero_version() is None and not options.reference:
        print(
            "paged-kv: LightZero is not installed; recording the reference world model instead.",
            file=sys.stderr,
        )
        options.reference = True
    try:
        _play(options)
    except (PagedKVError, OSError) as error:
        return fail(str(error))
    except KeyboardInterrupt:
        written = "nothing was written"
        if options.file.exists():
            written = f"what was recorded by then is in {options.file}"
        return fail(f"stopped, {written}.", status=130)
    print(f"recorded to {options.file}: paged-kv report {options.file}")
    return 0


def _wrong(options: argparse.Namespace, torch: Any) -> str | None:
    """What cannot be run or written, or None."""
    from paged_kv.errors import PagedKVError
    from paged_kv.tools.commands.memory import memory, too_large

    wrong = unusable_device(options.device, torch) or unusable_outputs(
        [Named("the recording", options.file)]
    )
    if wrong:
        return wrong
    sizes = {"envs": options.envs, "simulations": options.simulations}
    there = memory(options.device, torch)
    try:
        return too_large(options.preset, sizes, options.page_size, there)
    except PagedKVError as error:
        return str(error)


def _play(options: argparse.Namespace) -> None:
    from paged_kv.tools.profile.play import play

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
        accesses=options.accesses,
    )


def _milliseconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of milliseconds of at least 0")
    return value

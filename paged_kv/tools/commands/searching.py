"""The options that `profile` and `record` share: which search is run, and on what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from paged_kv.tools.commands.common import file, positive, seed, threads


class Wording(NamedTuple):
    """Where the two commands differ: the presets to choose from and how they are listed, the type
    of `--roots`, and what `--roots` and `--seed` are for.
    """

    presets: Sequence[str]
    listed: str
    roots: Callable[[str], int]
    about_roots: str
    about_seed: str


def add_what(command: Any, wording: Wording) -> None:
    """What to run."""
    what = command.add_argument_group("what to run")
    what.add_argument(
        "--preset",
        default="cartpole",
        choices=wording.presets,
        metavar="NAME",
        help=f"{wording.listed} (default: %(default)s)",
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
    what.add_argument("--roots", type=wording.roots, metavar="N", help=wording.about_roots)
    what.add_argument("--seed", type=seed, default=0, metavar="N", help=wording.about_seed)
    what.add_argument(
        "--reference",
        action="store_true",
        help="search this package's own world model, not LightZero's",
    )


def add_outputs(command: Any, shown: str) -> None:
    """Where results go; a page shows what is named."""
    output = command.add_argument_group("output")
    output.add_argument(
        "--json",
        type=file,
        metavar="FILE",
        help="also write the results to FILE; - prints them in place of the table",
    )
    output.add_argument(
        "--html",
        type=file,
        metavar="FILE",
        help=f"also write a page that shows {shown} to FILE; of several presets, a page each",
    )


def add_page_size(how: Any) -> None:
    """The size of a page."""
    how.add_argument(
        "--page-size",
        type=positive,
        default=2,
        metavar="N",
        help="token slots per page (default: %(default)s)",
    )


def add_machine(how: Any, device_of: str) -> None:
    """What it runs on."""
    how.add_argument(
        "--device",
        default="cpu",
        metavar="NAME",
        help=f"torch device of {device_of} (default: %(default)s)",
    )
    how.add_argument(
        "--threads",
        type=threads,
        default=1,
        metavar="N",
        help="torch threads (default: %(default)s)",
    )

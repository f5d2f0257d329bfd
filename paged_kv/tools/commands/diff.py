"""`paged-kv diff`: two recordings side by side."""

from __future__ import annotations

import argparse
from typing import Any

from paged_kv.tools.commands.common import fail, file

DESCRIPTION = """\
Compare two recordings side by side: peaks, averages, totals and rates, and how
many times the one is of the other."""
EXAMPLES = """\
examples:
  paged-kv diff before.jsonl after.jsonl"""


def add(commands: Any) -> None:
    """Add the command to the subparsers of `paged-kv`."""
    command = commands.add_parser(
        "diff",
        help="compare two recordings",
        usage="%(prog)s A B",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    command.add_argument("a", type=file, metavar="A", help="a recording")
    command.add_argument("b", type=file, metavar="B", help="another one")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        return fail("this command needs rich: pip install 'paged-kv[cli]'")
    from paged_kv.errors import BadRecording, MissingPackage
    from paged_kv.recording import read_recording
    from paged_kv.tools.summary import pairs, times

    try:
        first = read_recording(options.a)
        second = read_recording(options.b)
    except (BadRecording, MissingPackage) as error:
        return fail(str(error))
    table = Table(
        caption=f"A: {escape(str(options.a))}, B: {escape(str(options.b))}", caption_justify="left"
    )
    table.add_column("")
    table.add_column("figure")
    for letter, recording in (("A", first), ("B", second)):
        table.add_column(f"{letter}: {escape(recording.title)}", justify="right")
    table.add_column("A / B", justify="right")
    group = ""
    for pair in pairs(first, second):
        one = pair.first
        two = pair.second
        ratio = pair.ratio
        figure = one or two
        assert figure is not None
        table.add_row(
            figure.group if figure.group != group else "",
            figure.name,
            "" if one is None else str(one),
            "" if two is None else str(two),
            "" if ratio is None else times(ratio),
        )
        group = figure.group
    Console().print(table)
    return 0

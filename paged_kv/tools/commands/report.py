"""`paged-kv report`: what a recording says, as a table, a page, a trace or scalars."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from paged_kv.tools.commands.common import fail, file, missing_report
from paged_kv.tools.commands.outputs import Named, unusable_folder, unusable_outputs

if TYPE_CHECKING:
    from rich.table import Table

    from paged_kv.recording import Recording


DESCRIPTION = """\
Show what a recording says as tables, and write it as a page, as a trace or as
scalars. Recordings come from `paged-kv record` or from a run of your own."""
EXAMPLES = """\
examples:
  paged-kv report run.jsonl                          tables
  paged-kv report run.jsonl --html run.html          a page, works offline
  paged-kv report run.jsonl --trace run.json         for ui.perfetto.dev
  paged-kv report run.jsonl --tensorboard logs       scalars"""


def add(commands: Any) -> None:
    """Add the command to the subparsers of `paged-kv`."""
    command = commands.add_parser(
        "report",
        help="show what a recording says, and export it",
        usage="%(prog)s FILE [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    command.add_argument("file", type=file, metavar="FILE", help="a recording")
    command.add_argument(
        "--html", type=file, metavar="FILE", help="also write it as a page that works offline"
    )
    command.add_argument(
        "--trace", type=file, metavar="FILE", help="also write a trace for ui.perfetto.dev (JSON)"
    )
    command.add_argument(
        "--tensorboard", type=file, metavar="PATH", help="also write scalars for TensorBoard"
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    try:
        from rich.console import Console
    except ImportError:
        return fail("this command needs rich: pip install 'paged-kv[cli]'")
    from paged_kv.errors import BadRecording, MissingPackage, PagedKVError
    from paged_kv.recording import read_recording
    from paged_kv.tools.summary import tiers

    wrong = _wrong(options)
    if wrong:
        return fail(wrong, status=2)
    missing = missing_report() if options.html else None
    if missing:
        return fail(missing)
    try:
        recording = read_recording(options.file)
    except (BadRecording, MissingPackage) as error:
        return fail(str(error))
    console = Console()
    tables = [figures_table(recording), verbs_table(recording)]
    if tiers(recording):
        tables.append(tiers_table(recording))
    for table in tables:
        console.print(table)
    if recording.torn:
        console.print("The last line was cut off, and left out.")
    if recording.reason != "done":
        cut = recording.reason is None
        console.print("It was cut off." if cut else f"It ended with {recording.reason}.")
    try:
        for line in _export(options, recording):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    except (PagedKVError, OSError) as error:
        return fail(str(error))
    return 0


def _wrong(options: argparse.Namespace) -> str | None:
    """What cannot be written, or None."""
    given = (("--html", options.html), ("--trace", options.trace))
    outputs = [Named(name, path) for name, path in given if path is not None]
    wrong = unusable_outputs(outputs, [Named("the recording", options.file)])
    if wrong or options.tensorboard is None:
        return wrong
    folder = Named("--tensorboard", options.tensorboard)
    return unusable_folder(folder.path) or unusable_outputs(outputs, [folder])


def _export(options: argparse.Namespace, recording: Recording) -> list[str]:
    """Write what was asked for; returns what to say of it."""
    said = []
    if options.html:
        from paged_kv.tools.html import page

        options.html.write_text(page([recording], None), encoding="utf-8")
        said.append(f"page: {options.html}")
    if options.trace:
        from paged_kv.recording.trace import trace

        options.trace.write_text(json.dumps(trace(recording)) + "\n")
        said.append(f"trace: {options.trace}, to be opened in https://ui.perfetto.dev")
    if options.tensorboard:
        from paged_kv.recording.tensorboard import export

        written = export(recording, options.tensorboard)
        said.append(f"{written:,} scalars: tensorboard --logdir {options.tensorboard}")
    return said


def figures_table(recording: Recording) -> Table:
    """The summary as a rich table."""
    from rich.markup import escape
    from rich.table import Table

    from paged_kv.tools.summary import summarize

    table = Table(title=escape(_title(recording)), title_justify="left", title_style="bold")
    for name, side in (("", "left"), ("figure", "left"), ("value", "right")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    group = ""
    for figure in summarize(recording):
        table.add_row(figure.group if figure.group != group else "", figure.name, str(figure))
        group = figure.group
    return table


def _title(recording: Recording) -> str:
    labels = ", ".join(f"{name} {text}" for name, text in recording.header["labels"].items())
    return f"{recording.title} ({labels})" if labels else recording.title


def verbs_table(recording: Recording) -> Table:
    """What the verbs took, as a rich table."""
    from rich.markup import escape
    from rich.table import Table

    from paged_kv.tools.summary import call_time, verbs
    from paged_kv.tools.units import count

    table = Table()
    table.add_column("verb")
    for name in ("calls", "sequences", "time", "a call", "longest"):
        table.add_column(name, justify="right")
    for verb in verbs(recording):
        table.add_row(
            escape(verb.name),
            count(verb.calls),
            count(verb.sequences),
            f"{verb.seconds * 1000:,.1f} ms",
            call_time(verb),
            f"{verb.longest * 1e6:,.0f} us",
        )
    return table


def tiers_table(recording: Recording) -> Table:
    """What lay where at the end, and what moved, as a rich table."""
    from rich.markup import escape
    from rich.table import Table

    from paged_kv.tools.summary import seconds, tiers
    from paged_kv.tools.units import count, size

    table = Table()
    table.add_column("tier")
    for name in ("pages", "bytes", "hits", "given up", "read", "time", "written", "time"):
        table.add_column(name, justify="right")
    for tier in tiers(recording):
        table.add_row(
            escape(tier.name),
            count(tier.pages),
            size(tier.bytes),
            count(tier.hits),
            count(tier.demotions),
            size(tier.bytes_read),
            seconds(tier.seconds_read),
            size(tier.bytes_written),
            seconds(tier.seconds_written),
        )
    return table

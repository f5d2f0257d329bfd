"""`paged-kv report`: what a recording says, as a table, a page, a trace or scalars."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paged_kv.tools.commands.common import fail, file, missing_report
from paged_kv.tools.commands.outputs import Named, unusable_folder, unusable_outputs

if TYPE_CHECKING:
    from rich.table import Table

    from paged_kv.recording import Recording


DESCRIPTION = """\
Show what a recording says as tables, and write it as a page, as a trace or as
scalars. Recordings come from `paged-kv record` or from a run of your own. Of
several, such as those of the workers of a pool, it shows each and all."""
EXAMPLES = """\
examples:
  paged-kv report run.jsonl                          tables
  paged-kv report run/ --html run.html               all workers of a pool
  paged-kv report run.jsonl --html run.html          a page, works offline
  paged-kv report run.jsonl --trace run.json         for ui.perfetto.dev
  paged-kv report run.jsonl --tensorboard logs       scalars"""


def add(commands: Any) -> None:
    """Add the command to the subparsers of `paged-kv`."""
    command = commands.add_parser(
        "report",
        help="show what a recording says, and export it",
        usage="%(prog)s FILE [FILE ...] [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    command.add_argument(
        "files",
        type=file,
        nargs="+",
        metavar="FILE",
        help="a recording, or a folder of recordings; several are those of workers",
    )
    command.add_argument(
        "--html", type=file, metavar="FILE", help="also write it as a page that works offline"
    )
    command.add_argument(
        "--trace", type=file, metavar="FILE", help="also write a trace for ui.perfetto.dev (JSON)"
    )
    command.add_argument(
        "--tensorboard", type=file, metavar="PATH", help="also write scalars for TensorBoard"
    )
    command.add_argument(
        "--merged", type=file, metavar="FILE", help="also write several as one recording"
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    try:
        from rich.console import Console
    except ImportError:
        return fail("this command needs rich: pip install 'paged-kv[cli]'")
    from paged_kv.errors import BadRecording, MissingPackage, PagedKVError
    from paged_kv.recording import merging

    try:
        files = [each for path in options.files for each in merging.recordings_in(path)]
        wrong = _wrong(options, files)
        if wrong:
            return fail(wrong, status=2)
        missing = missing_report() if options.html else None
        if missing:
            return fail(missing)
        recordings = merging.read_recordings(*files)
    except (BadRecording, MissingPackage) as error:
        return fail(str(error))
    console = Console()
    shown = _one(recordings[0]) if len(recordings) == 1 else _several(recordings)
    for part in shown:
        console.print(part)
    try:
        for line in _export(options, files, recordings):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    except (PagedKVError, OSError) as error:
        return fail(str(error))
    return 0


def _one(recording: Recording) -> Iterator[Table | str]:
    from paged_kv.tools.summary import tiers

    yield figures_table(recording)
    yield verbs_table(recording)
    if tiers(recording):
        yield tiers_table(recording)
    if recording.torn:
        yield "The last line was cut off, and left out."
    if recording.reason != "done":
        cut = recording.reason is None
        yield "It was cut off." if cut else f"It ended with {recording.reason}."


def _several(recordings: Sequence[Recording]) -> Iterator[Table | str]:
    from rich.markup import escape

    from paged_kv.recording import merged
    from paged_kv.tools.workers import PEAKS_ADD_UP, early

    whole = merged(recordings)
    yield workers_table(recordings)
    yield figures_table(whole)
    yield verbs_table(whole)
    yield PEAKS_ADD_UP
    yield from map(escape, early(recordings))


def _wrong(options: argparse.Namespace, files: Sequence[Path]) -> str | None:
    """What cannot be written, or None."""
    given = (("--html", options.html), ("--trace", options.trace), ("--merged", options.merged))
    outputs = [Named(name, path) for name, path in given if path is not None]
    wrong = unusable_outputs(outputs, [Named("the recording", path) for path in files])
    if wrong:
        return wrong
    if options.merged is not None:
        folders = [path.resolve() for path in options.files if path.is_dir()]
        if options.merged.resolve().parent in folders:
            name = str(options.merged)
            return f"--merged {name!r} would lie among those it is made of, and be read as one more"
    if options.tensorboard is None:
        return None
    folder = Named("--tensorboard", options.tensorboard)
    return unusable_folder(folder.path) or unusable_outputs(outputs, [folder])


def _export(
    options: argparse.Namespace, files: Sequence[Path], recordings: Sequence[Recording]
) -> Iterator[str]:
    """Write what was asked for; what to say of it."""
    one = recordings[0] if len(recordings) == 1 else None
    if options.html:
        from paged_kv.tools.html import page, workers_page

        text = workers_page(recordings) if one is None else page([one], None)
        options.html.write_text(text, encoding="utf-8")
        yield f"page: {options.html}"
    if options.trace:
        from paged_kv.recording.trace import trace, traces

        found = traces(recordings) if one is None else trace(one)
        options.trace.write_text(json.dumps(found) + "\n")
        yield f"trace: {options.trace}, to be opened in https://ui.perfetto.dev"
    if options.tensorboard:
        from paged_kv.recording.tensorboard import export

        where = options.tensorboard
        written = sum(
            export(each, where if one is not None else where / file.stem)
            for file, each in zip(files, recordings)
        )
        yield f"{written:,} scalars: tensorboard --logdir {where}"
    if options.merged:
        from paged_kv.recording import merged, write_recording

        write_recording(merged(recordings), options.merged)
        yield f"recording: {options.merged}"


def workers_table(recordings: Sequence[Recording]) -> Table:
    """Figures of each worker and of all, as a rich table."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    from paged_kv.tools.workers import COLUMNS, sides

    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("")
    for column in COLUMNS:
        table.add_column(column.short, justify="right")
    *each, whole = sides(recordings)
    for side in each:
        table.add_row(escape(side.name), *side.cells)
    table.add_section()
    table.add_row(whole.name, *whole.cells)
    return table


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

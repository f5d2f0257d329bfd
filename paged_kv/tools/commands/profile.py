"""`paged-kv profile`: the same search with LightZero's own cache and with pages."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from paged_kv.tools.commands.common import (
    fail,
    missing_report,
    save,
    two_or_more,
    unusable_device,
)
from paged_kv.tools.commands.outputs import Named, unusable_outputs
from paged_kv.tools.commands.searching import (
    Wording,
    add_machine,
    add_outputs,
    add_page_size,
    add_what,
)
from paged_kv.tools.profile.presets import PRESETS

if TYPE_CHECKING:
    from rich.console import Console

    from paged_kv.recording import Recording


class Run(NamedTuple):
    """What one preset gave: the result, and a recording of each side where pages are wanted."""

    result: dict[str, Any]
    recordings: list[Recording]


PRESET_NAMES = tuple(PRESETS)
# How the LightZero integration works, each with its default first; the reference world model has no
# such choices.
LIGHTZERO_CHOICES = {
    "at": ("read", "write"),
    "keys": ("node", "latent"),
    "window": ("cached", "exact"),
    "step": ("lean", "lightzero"),
    "linears": ("torch", "packed"),
    "attention": ("gathered", "pages"),
    "storage": ("exact", "int8"),
}
LIGHTZERO_OPTIONS = (*LIGHTZERO_CHOICES, "compile")
WORDING = Wording(
    presets=(*PRESET_NAMES, "all"),
    listed=f"{', '.join(PRESET_NAMES)} or all",
    roots=two_or_more,
    about_roots="root steps to time (default: the preset's)",
    about_seed="seed of both sides (default: %(default)s)",
)
DESCRIPTION = """\
Run the same search twice, once with LightZero's own cache and once with pages,
and compare: bytes held, kernels, time, and whether actions, visit counts and
values agree. Both sides have the same seeds and the same weights. Where
LightZero is not installed, a small world model of this package is searched.

CartPole takes about half a minute, each of the other presets one to two."""
EXAMPLES = """\
examples:
  paged-kv profile                               CartPole, with a trained agent
  paged-kv profile --preset long --roots 12      longer windows, timed longer
  paged-kv profile --linears packed --attention pages    faster, up to rounding
  paged-kv profile --preset all --json all.json  everything, and as numbers
  paged-kv profile --reference --roots 10        without LightZero: some seconds
  paged-kv estimate --preset atari --envs 32     bytes, without a search"""


def add(commands: Any) -> None:
    """Add the command to the subparsers of `paged-kv`."""
    command = commands.add_parser(
        "profile",
        help="run the same search with LightZero's own cache and with pages, and compare",
        usage="%(prog)s [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    add_what(command, WORDING)
    _add_how(command.add_argument_group("how"))
    add_outputs(command, "both caches")
    command.set_defaults(run=run)


def _add_how(how: Any) -> None:
    add_page_size(how)
    how.add_argument(
        "--at",
        choices=LIGHTZERO_CHOICES["at"],
        help="when learned positions are re-based (default: read; LightZero only)",
    )
    how.add_argument(
        "--keys",
        choices=LIGHTZERO_CHOICES["keys"],
        help="how search contexts are found (default: node; LightZero only)",
    )
    how.add_argument(
        "--window",
        choices=LIGHTZERO_CHOICES["window"],
        help="what a context keeps: keys and values, or tokens that each step computes anew "
        "(default: cached; LightZero only)",
    )
    how.add_argument(
        "--step",
        choices=LIGHTZERO_CHOICES["step"],
        help="how the model takes a step of a search: by one short function, or by LightZero's own "
        "code (default: lean; LightZero only)",
    )
    how.add_argument(
        "--linears",
        choices=LIGHTZERO_CHOICES["linears"],
        help="how linear layers compute in a search: as torch does, or from packed copies of their "
        "weights (default: torch; LightZero only)",
    )
    how.add_argument(
        "--attention",
        choices=LIGHTZERO_CHOICES["attention"],
        help="whether contexts are copied side by side to be attended to, or attended to in their "
        "pages, by a loop that numba compiles (default: gathered; LightZero only)",
    )
    how.add_argument(
        "--storage",
        choices=LIGHTZERO_CHOICES["storage"],
        help="what pages hold: numbers as they are, or codes of a byte (default: exact; LightZero "
        "only)",
    )
    how.add_argument(
        "--compile",
        action="store_true",
        default=None,
        help="compile short steps first, which takes minutes (LightZero only)",
    )
    add_machine(how, "the model and both caches")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    try:
        from rich.console import Console
    except ImportError:
        return fail("this command needs rich: pip install 'paged-kv[cli]'")
    import torch

    from paged_kv.tools.profile import client

    if client.lightzero_version() is None and not options.reference:
        print(
            "paged-kv: LightZero is not installed; running the reference world model instead.",
            file=sys.stderr,
        )
        options.reference = True
    wrong = _wrong(options, torch)
    if wrong:
        return fail(wrong, status=2)
    missing = missing_report() if options.html else None
    if missing:
        return fail(missing)
    runs: list[Run] = []
    status = 1
    try:  # whatever ends it early, what was measured by then is shown and written
        failure = _run_all(options, Console(stderr=True), runs)
    except KeyboardInterrupt:
        if not runs:
            raise
        failure = f"stopped after {len(runs)} of {len(_names(options))} presets"
        status = 130
    complaints = [failure, *(_tell(options, runs) if runs else ())]
    failure = "; ".join(filter(None, complaints))
    return fail(failure, status) if failure else 0


def _tell(options: argparse.Namespace, runs: list[Run]) -> list[str | None]:
    """Write the files, then print, which may fail, too. Returns what could not be written."""
    from paged_kv.tools.profile.table import Screen, show

    results = [each.result for each in runs]
    numbers = json.dumps(results if options.preset == "all" else results[0], indent=2) + "\n"
    on_screen = str(options.json) == "-"
    complaints = []
    pages = []
    if options.json and not on_screen:
        complaints.append(save(options.json, numbers))
    if options.html:
        from paged_kv.tools.html import page

        for each in runs:
            path = page_file(options, each.result["workload"]["preset"])
            complaints.append(save(path, page(each.recordings, each.result)))
            pages += [path] if complaints[-1] is None else []
    if on_screen:
        print(numbers, end="")
    else:
        show(results, Screen())
    for path in pages:
        print(f"Page: {path}", file=sys.stderr if on_screen else sys.stdout)
    return complaints


def page_file(options: argparse.Namespace, preset: str) -> Path:
    """Where the page of a preset goes: each of several presets gets one of its own,
    report-cartpole.html and so on.
    """
    path: Path = options.html
    return path if options.preset != "all" else path.with_stem(f"{path.stem}-{preset}")


def _outputs(options: argparse.Namespace) -> list[Named]:
    """All files that will be written."""
    found = []
    if options.json is not None and str(options.json) != "-":
        found.append(Named("--json", options.json))
    if options.html is not None:
        found += [Named("--html", page_file(options, preset)) for preset in _names(options)]
    return found


def _wrong(options: argparse.Namespace, torch: Any) -> str | None:
    """What cannot be run or written, or None."""
    from paged_kv.errors import PagedKVError
    from paged_kv.tools.commands.memory import memory, too_large

    given = [f"--{name}" for name in LIGHTZERO_OPTIONS if getattr(options, name) is not None]
    if options.reference and given:
        return (
            f"the reference world model has no {' and no '.join(given)}: only the LightZero "
            "integration has"
        )
    wrong = unusable_device(options.device, torch) or unusable_outputs(_outputs(options))
    if wrong:
        return wrong
    sizes = {"envs": options.envs, "simulations": options.simulations}
    try:
        found = (
            too_large(name, sizes, options.page_size, memory(options.device, torch))
            for name in _names(options)
        )
        return next(filter(None, found), None)
    except PagedKVError as error:
        return str(error)


def _names(options: argparse.Namespace) -> tuple[str, ...]:
    return PRESET_NAMES if options.preset == "all" else (options.preset,)


def _run_all(options: argparse.Namespace, console: Console, runs: list[Run]) -> str | None:
    """Run the presets one after the other and append what they gave; returns why it ended early, or
    None.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from paged_kv.errors import PagedKVError
    from paged_kv.tools.commands.memory import is_out_of_memory

    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for name in _names(options):
            task = progress.add_task(f"{name}: loading", total=None)

            def tick(stage: str, done: int, total: int, task: Any = task, name: str = name) -> None:
                progress.update(task, description=f"{name}: {stage}", completed=done, total=total)

            try:
                runs.append(_run_one(options, name, tick))
            except PagedKVError as error:
                return str(error)
            except (MemoryError, RuntimeError) as error:
                if is_out_of_memory(error):
                    return (
                        f"{name}: memory ran out: give fewer --envs or --simulations (see "
                        "paged-kv estimate)"
                    )
                raise
    return None


def _run_one(options: argparse.Namespace, name: str, tick: Callable[[str, int, int], None]) -> Run:
    from paged_kv.tools.profile import profile

    given = {name: getattr(options, name) for name in LIGHTZERO_OPTIONS}
    recordings: list[Recording] = []
    result = profile(
        name,
        envs=options.envs,
        simulations=options.simulations,
        roots=options.roots,
        seed=options.seed,
        threads=options.threads,
        device=options.device,
        page_size=options.page_size,
        reference=options.reference,
        on_tick=tick,
        on_recording=recordings.append if options.html else None,
        **{name: value for name, value in given.items() if value is not None},
    )
    return Run(result, recordings)

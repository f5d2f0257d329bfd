"""`paged-kv search`: the same tree search with a language model on several kinds of cache."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paged_kv.tools.commands import search_workers
from paged_kv.tools.commands.common import (
    fail,
    file,
    missing_report,
    positive,
    save,
    seed,
    unusable_device,
)
from paged_kv.tools.commands.outputs import Named, unusable_outputs
from paged_kv.tools.commands.searching import add_machine, add_outputs
from paged_kv.tools.search.presets import DTYPES, LINEARS, METHODS, PRESETS, Preset

if TYPE_CHECKING:
    from rich.console import Console

    from paged_kv.tools.search.models import Loaded
    from paged_kv.tools.search.trial import Trial

PRESET_NAMES = tuple(PRESETS)
SIZES = {
    "prompt_tokens": "tokens of the root",
    "simulations": "batches of children",
    "width": "children in a batch",
    "tokens": "tokens of a child",
}
DESCRIPTION = """\
Search with a language model, and keep its keys and values in several ways: not
at all, the root's alone, a copy per node, in pages that are gathered for each
batch, and in pages that are attended as a tree; the last once more with packed
weights, where a processor gains by them. All draw the same tokens of the same
nodes in the same batches; what they hold and how long they take is compared.
The model is SmolLM2-135M where it can be had (`make demo-llm` sees to that), and
plays a numbers game.

The demo takes about a minute, the other presets two to four."""
EXAMPLES = """\
examples:
  paged-kv search                                a short search
  paged-kv search --preset all --json all.json   everything, and as numbers
  paged-kv search --method beam --html beam.html
  paged-kv search --model Llama-3.2-1B/ --dtype bfloat16
  paged-kv search --workers 8 --searches 100     many searches on workers of Ray"""


class Refused(Exception):
    """Why nothing is searched."""


def add(commands: Any) -> None:
    """Add the command to the subparsers of `paged-kv`."""
    command = commands.add_parser(
        "search",
        help="search with a language model on several kinds of cache, and compare",
        usage="%(prog)s [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    what = command.add_argument_group("what to run")
    what.add_argument(
        "--preset",
        default="demo",
        choices=(*PRESET_NAMES, "all"),
        metavar="NAME",
        help=f"{', '.join(PRESET_NAMES)} or all (default: %(default)s)",
    )
    what.add_argument(
        "--method",
        default="mcts",
        choices=METHODS,
        metavar="NAME",
        help=f"{', '.join(METHODS)} (default: %(default)s)",
    )
    what.add_argument(
        "--model",
        type=file,
        metavar="FOLDER",
        help="a model and its tokenizer, as save_pretrained leaves them (default: SmolLM2-135M)",
    )
    for name, about in SIZES.items():
        flag = "--" + name.replace("_", "-")
        help_ = f"{about} (default: the preset's)"
        what.add_argument(flag, type=positive, metavar="N", help=help_)
    what.add_argument(
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="seed of the task and of all draws (default: %(default)s)",
    )
    _add_how(command.add_argument_group("how"))
    search_workers.add(command)
    add_outputs(command, "the search")
    command.set_defaults(run=run)


def _add_how(how: Any) -> None:
    how.add_argument(
        "--page-size",
        type=positive,
        default=2,
        metavar="N",
        help="token slots per page (default: %(default)s)",
    )
    how.add_argument(
        "--dtype",
        default="float32",
        choices=DTYPES,
        metavar="NAME",
        help="of the model, keys and values (default: %(default)s)",
    )
    how.add_argument(
        "--linears",
        default="packed",
        choices=LINEARS,
        metavar="NAME",
        help="packed: search once more with packed weights, which take as much memory as the "
        "model; own: do not (default: %(default)s)",
    )
    add_machine(how, "the model and all caches")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    try:
        from rich.console import Console
    except ImportError:
        return fail("this command needs rich: pip install 'paged-kv[cli]'")
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError:
        return fail("this command needs transformers: pip install 'paged-kv[huggingface]'")
    missing = missing_report() if options.html else None
    if missing:
        return fail(missing)
    wrong = (
        search_workers.unusable(options)
        or unusable_device(options.device, torch)
        or unusable_outputs(_outputs(options))
    )
    if wrong:
        return fail(wrong, status=2)
    console = Console(stderr=True)
    torch.set_num_threads(options.threads)
    try:
        if options.workers is not None:
            return search_workers.run(options, _loaded(options, console))
        trials = _trials(options, console, torch)
    except Refused as error:
        return fail(str(error), status=2)
    results: list[dict[str, Any]] = []
    status = 1
    try:  # whatever ends it early, what was searched by then is shown and written
        failure = _run_all(trials, console, results)
    except KeyboardInterrupt:
        if not results:
            raise
        failure = "stopped: what was done so far is shown"
        status = 130
    complaints = [failure, *(_tell(options, results) if results else ())]
    failure = "; ".join(filter(None, complaints))
    return fail(failure, status) if failure else 0


def _tell(options: argparse.Namespace, results: list[dict[str, Any]]) -> list[str | None]:
    """Write the files, then print, which may fail, too. Returns what could not be written."""
    from paged_kv.tools.profile.table import Screen
    from paged_kv.tools.search.table import show

    numbers = json.dumps(results if options.preset == "all" else results[0], indent=2) + "\n"
    on_screen = str(options.json) == "-"
    complaints = []
    pages = []
    if options.json and not on_screen:
        complaints.append(save(options.json, numbers))
    if options.html:
        from paged_kv.tools.html.search import page

        for result in results:
            path = page_file(options, result["workload"]["preset"])
            complaints.append(save(path, page(result)))
            pages += [path] if complaints[-1] is None else []
    if on_screen:
        print(numbers, end="")
    else:
        show(results, Screen())
    for path in pages:
        print(f"Page: {path}", file=sys.stderr if on_screen else sys.stdout)
    return complaints


def page_file(options: argparse.Namespace, preset: str) -> Path:
    """Where the page of a preset goes: each of several presets gets one of its own."""
    path: Path = options.html
    return path if options.preset != "all" else path.with_stem(f"{path.stem}-{preset}")


def _outputs(options: argparse.Namespace) -> list[Named]:
    """All files that will be written."""
    found = []
    if options.json is not None and str(options.json) != "-":
        found.append(Named("--json", options.json))
    if options.html is not None:
        names = [preset.name for preset in _presets(options)]
        found += [Named("--html", page_file(options, name)) for name in names]
    return found


def _presets(options: argparse.Namespace) -> list[Preset]:
    """What is run, with the sizes that were given."""
    names = PRESET_NAMES if options.preset == "all" else (options.preset,)
    given = {name: getattr(options, name) for name in SIZES}
    sizes = {name: value for name, value in given.items() if value is not None}
    return [PRESETS[name]._replace(**sizes) for name in names]


def _loaded(options: argparse.Namespace, console: Console) -> Loaded:
    """The model. Raises Refused."""
    from paged_kv.tools.search import models, weights

    folder: Path = options.model or weights.FOLDER
    if options.model is None and not weights.there(folder):
        missing = weights.missing()
        if missing:
            print(
                f"paged-kv: no SmolLM2-135M in {str(folder)!r}, and to make it these are missing: "
                f"{', '.join(missing)}; searching a random Llama of the same shape instead.",
                file=sys.stderr,
            )
            return models.random_model(options.dtype, options.device)
        with console.status(f"reading SmolLM2-135M into {folder}: about a minute, once"):
            _make(folder)
    if not weights.there(folder):
        raise Refused(f"no model in {str(folder)!r}: there is no config.json")
    try:
        return models.from_folder(folder, options.dtype, options.device)
    except (OSError, ValueError, KeyError) as error:
        raise Refused(
            f"no model could be read from {str(folder)!r}: {_first_line(error)}"
        ) from None


def _make(folder: Path) -> None:
    from paged_kv.tools.search import weights

    try:
        weights.save(folder)
    except OSError as error:
        raise Refused(f"cannot save the model to {str(folder)!r}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _trials(options: argparse.Namespace, console: Console, torch: Any) -> list[Trial]:
    """All that will be run, checked. Raises Refused."""
    from paged_kv.errors import PagedKVError
    from paged_kv.tools.commands.memory import memory
    from paged_kv.tools.search.trial import Trial, needed_bytes
    from paged_kv.tools.units import size

    loaded = _loaded(options, console)
    there = memory(options.device, torch)
    trials = []
    for preset in _presets(options):
        try:
            trial = Trial(
                loaded,
                preset,
                method=options.method,
                seed=options.seed,
                page_size=options.page_size,
                sides=_sides(options, loaded),
            )
        except PagedKVError as error:
            raise Refused(str(error)) from None
        needed = needed_bytes(trial)
        if there is not None and needed > there:
            raise Refused(
                f"{preset.name}: no room: the caches may take {size(needed)}, and "
                f"{size(there)} are there; give fewer --prompt-tokens, --simulations or --width"
            )
        trials.append(trial)
    return trials


def _sides(options: argparse.Namespace, loaded: Loaded) -> list[str]:
    """The caches to compare."""
    from paged_kv.tools.search.side import PACKED, sides_for

    found = sides_for(loaded.model.device, loaded.model.dtype)
    return [name for name in found if name != PACKED or options.linears == "packed"]


def _run_all(trials: list[Trial], console: Console, results: list[dict[str, Any]]) -> str | None:
    """Run one after the other, and append what they gave; returns why it ended early, or None."""
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
        while trials:
            trial = trials.pop(0)  # with its caches it goes before the next one runs
            preset = trial.preset
            task = progress.add_task(f"{preset.name}: simulations", total=preset.simulations)
            try:
                _run_one(trial, partial(progress.advance, task), results)
            except PagedKVError as error:
                return str(error)
            except (MemoryError, RuntimeError) as error:
                if is_out_of_memory(error):
                    return f"{preset.name}: memory ran out: give fewer --simulations or --width"
                raise
    return None


def _run_one(trial: Trial, on_batch: Callable[[], None], results: list[dict[str, Any]]) -> None:
    """Run one, and append its result, even where it is stopped."""
    from paged_kv.tools.search.result import as_dict

    try:
        trial.run(on_batch)
    finally:
        if trial.lockstep.batches:
            results.append(as_dict(trial))

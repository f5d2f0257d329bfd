"""`paged-kv search --workers N`: many searches at once, on workers that Ray runs."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paged_kv.tools.commands.common import fail, file, positive, save
from paged_kv.tools.commands.outputs import unusable_folder
from paged_kv.tools.search.presets import PRESETS, Preset

if TYPE_CHECKING:
    from paged_kv.integrations.ray import SearchPool
    from paged_kv.tools.search.forest import Growth
    from paged_kv.tools.search.models import Loaded
    from paged_kv.tools.search.task import Task

EACH = 4  # searches of a worker, where their number is not given
TEMPERATURE = 0.8
SIZES = ("prompt_tokens", "simulations", "width", "tokens")


def add(command: Any) -> None:
    """The options of the command."""
    many = command.add_argument_group("many searches (needs ray)")
    many.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        help="search many problems on N workers, on pages alone; nothing is compared",
    )
    many.add_argument(
        "--searches",
        type=positive,
        metavar="N",
        help=f"problems, of successive seeds (default: {EACH} for each worker)",
    )
    many.add_argument(
        "--record",
        type=file,
        metavar="FOLDER",
        help="record what the cache of each worker does, for `paged-kv report FOLDER`",
    )


def unusable(options: argparse.Namespace) -> str | None:
    """What cannot be asked for together, or None."""
    if options.workers is None:
        needs = "--searches" if options.searches else "--record"
        return f"{needs} needs --workers" if options.searches or options.record else None
    if options.record is not None:
        wrong = unusable_folder(options.record)
        if wrong:
            return wrong
    if options.html is not None:
        return "--html shows caches side by side, which --workers does not compare"
    if options.preset == "all":
        return "--workers takes one preset"
    return None


def run(options: argparse.Namespace, loaded: Loaded) -> int:
    """Search, and tell what became of it; returns the exit status."""
    from paged_kv.errors import PagedKVError

    try:
        result = _searched(options, loaded)
    except PagedKVError as error:
        return fail(str(error), status=2)
    numbers = json.dumps(result, indent=2) + "\n"
    if str(options.json) == "-":
        print(numbers, end="")
        return 0
    _show(result)
    wrong = save(options.json, numbers) if options.json else None
    return fail(wrong) if wrong else 0


def make_model(folder: Path | None, dtype: str, device: str) -> Any:
    """The model of a worker."""
    from paged_kv.tools.search import models

    if folder is None:
        return models.random_model(dtype, device).model
    return models.from_folder(folder, dtype, device).model


def preset_of(options: argparse.Namespace) -> Preset:
    """What is run, with the sizes that were given."""
    preset = PRESETS[options.preset]
    given = {name: getattr(options, name) for name in SIZES}
    return preset._replace(**{name: value for name, value in given.items() if value is not None})


def _searched(options: argparse.Namespace, loaded: Loaded) -> dict[str, Any]:
    from rich.console import Console
    from rich.progress import Progress

    from paged_kv.integrations.huggingface.shapes import shape_of
    from paged_kv.integrations.ray import SearchPool
    from paged_kv.tools.search import weights
    from paged_kv.tools.search.forest import Forest
    from paged_kv.tools.search.side import Rule

    preset = preset_of(options)
    count = options.searches or EACH * options.workers
    vocabulary = shape_of(loaded.model).vocabulary
    tasks = [_task(loaded, vocabulary, options.seed + place) for place in range(count)]
    folder = None if loaded.tokenizer is None else (options.model or weights.FOLDER).resolve()
    make = partial(make_model, folder, options.dtype, options.device)
    with SearchPool(
        make,
        options.workers,
        options={"page_size": options.page_size},
        threads=options.threads,
        gpus=0 if options.device == "cpu" else 1,
    ) as pool:
        forest = Forest(pool, tasks, preset, Rule(preset.tokens, TEMPERATURE))
        console = Console(stderr=True)
        recording = nullcontext() if options.record is None else pool.record(options.record)
        shown = Progress(console=console, disable=not console.is_terminal)
        with recording, shown as progress:
            bar = progress.add_task(f"{preset.name}: simulations", total=preset.simulations)
            growth = forest.grow(options.method, options.seed, partial(progress.advance, bar))
        return _told(options, loaded, count, growth, pool)


def _task(loaded: Loaded, vocabulary: int, seed: int) -> Task:
    from paged_kv.tools.search.task import Countdown, Likely

    if loaded.tokenizer is None:
        return Likely(vocabulary, seed)
    return Countdown(loaded.tokenizer, seed)


def _told(
    options: argparse.Namespace, loaded: Loaded, count: int, growth: Growth, pool: SearchPool
) -> dict[str, Any]:
    """The result as plain data."""
    stats = pool.stats()
    return {
        "schema": 1,
        "workload": {
            **preset_of(options)._asdict(),
            "method": options.method,
            "model": loaded.name,
            "dtype": options.dtype,
            "seed": options.seed,
            "workers": options.workers,
            "searches": count,
        },
        "nodes": growth.nodes,
        "tokens": growth.tokens,
        "seconds": round(growth.seconds, 3),
        "tokens_per_second": round(growth.tokens / growth.seconds, 1),
        "solved": growth.solved if loaded.tokenizer is not None else None,
        "moved": stats.moved,
        "restarts": stats.restarts,
        "workers": [
            {
                "worker": worker.worker,
                "trees": worker.trees,
                **({} if worker.figures is None else worker.figures._asdict()),
            }
            for worker in stats.workers
        ],
        "texts": [_best(root) for root in growth.roots],
    }


def _best(root: Any) -> str:
    """The text of the best node of a tree."""
    waiting = [root]
    best = root
    while waiting:
        node = waiting.pop()
        if (node.value, -node.number) > (best.value, -best.number):
            best = node
        waiting += node.children
    return str(best.text)


def _show(result: dict[str, Any]) -> None:
    from rich.table import Table

    from paged_kv.tools.profile.table import Screen
    from paged_kv.tools.units import size

    work = result["workload"]
    workers = "1 worker" if work["workers"] == 1 else f"{work['workers']} workers"
    named = f"{work['searches']} searches of {work['model']} on {workers}"
    made = Table(title=named, title_justify="left")
    for heading in ("worker", "trees", "nodes", "tokens fed", "K/V held", "evicted", "busy"):
        made.add_column(heading, justify="right")
    for worker in result["workers"]:
        made.add_row(
            str(worker["worker"]),
            str(worker["trees"]),
            f"{worker['nodes']:,}",
            f"{worker['tokens_fed']:,}",
            size(worker["bytes_in_use"]),
            f"{worker['evicted']:,}",
            f"{worker['busy_seconds']:.1f} s",
        )
    screen = Screen()
    screen.print(made)
    solved = "" if result["solved"] is None else f", {result['solved']} solved"
    screen.print(
        f"{result['nodes']:,} nodes, {result['tokens']:,} tokens in {result['seconds']:.1f} s: "
        f"{result['tokens_per_second']:,.1f} tokens a second{solved}."
    )

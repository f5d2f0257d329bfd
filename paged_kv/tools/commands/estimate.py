"""`paged-kv estimate`: how many bytes a tree search's KV caches will take, before anything runs."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any, NamedTuple

from paged_kv.tools.commands import estimate_workers
from paged_kv.tools.commands.common import fail, file, shortened
from paged_kv.tools.commands.outputs import Named, unusable_outputs
from paged_kv.tools.commands.profile import PRESET_NAMES

if TYPE_CHECKING:
    from paged_kv.tools.estimate import Estimate
    from paged_kv.tools.estimate.machines import Machines

NEEDED = ("layers", "heads", "head_size", "context", "envs", "simulations")
NO_DTYPE = "the configuration names no dtype: float32 is taken"
DESCRIPTION = """\
Say how many bytes the KV caches of a tree search will take: in LightZero's
own caches, as one dense tensor a node, and in pages. Sizes come from options,
a preset or a configuration file; options win. No search is run, and the answer
comes at once."""
EXAMPLES = """\
examples:
  paged-kv estimate --preset atari --envs 32
  paged-kv estimate --layers 2 --heads 8 --head-size 96 --context 8 \\
                    --envs 8 --simulations 50
  paged-kv estimate --transformers-config Llama/ --context 4096 \\
                    --root-tokens 1000 --simulations 100 \\
                    --envs 64 --workers 16 --machines 2"""
SIZES = {
    "layers": "transformer layers",
    "heads": "attention heads",
    "head_size": "numbers of a key in one head",
    "kv_heads": "heads of keys and values (default: --heads)",
    "value_head_size": "numbers of a value in one head (default: --head-size)",
    "context": "tokens of a full window",
    "envs": "environments, or trees, searched in one batch (default with --transformers-config: 1)",
    "simulations": "simulations per root step: nodes added to each tree",
    "tokens_per_step": "tokens a node adds (default: 2, an action and an observation)",
    "root_tokens": "tokens of a root's window (default: as many as it keeps once it is full)",
    "root_steps": "estimate after so many root steps (default: when windows and LightZero's "
    "rings are full)",
    "page_size": "token slots per page (default: the advised one)",
}


class Refused(Exception):
    """Why a workload has no estimate."""


class Source(NamedTuple):
    """A workload as far as a preset or a file gives it, and what to know of it."""

    name: str
    fields: dict[str, Any]
    notes: tuple[str, ...] = ()


class Answer(NamedTuple):
    """What is printed of one workload."""

    name: str
    estimate: Estimate
    machines: Machines | None
    notes: tuple[str, ...]


def add(commands: Any) -> None:
    """Add the command to the subparsers of `paged-kv`."""
    command = commands.add_parser(
        "estimate",
        help="say how many bytes the caches of a search will take, before anything runs",
        usage="%(prog)s [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    sources = command.add_argument_group("where sizes come from")
    source = sources.add_mutually_exclusive_group()
    source.add_argument(
        "--preset",
        choices=(*PRESET_NAMES, "all"),
        metavar="NAME",
        help=f"a workload of `paged-kv profile`: {', '.join(PRESET_NAMES)} or all",
    )
    source.add_argument(
        "--lightzero-config",
        type=file,
        metavar="FILE.py",
        help="a LightZero configuration, a python module that sets main_config; it is run",
    )
    source.add_argument(
        "--transformers-config",
        type=file,
        metavar="PATH",
        help="a transformer's config.json, or its folder",
    )
    sizes = command.add_argument_group("sizes")
    for name, about in SIZES.items():
        sizes.add_argument("--" + name.replace("_", "-"), type=whole, metavar="N", help=about)
    sizes.add_argument(
        "--dtype",
        metavar="NAME",
        help="of keys and values (default: float32, or the configuration's)",
    )
    sizes.add_argument(
        "--storage",
        metavar="NAME",
        help="of the pages: exact, or int8, a byte a number (default: exact)",
    )
    estimate_workers.add(command, whole)
    output = command.add_argument_group("output")
    output.add_argument(
        "--json",
        type=file,
        metavar="FILE",
        help="also write the figures to FILE; - prints them in place of the table",
    )
    command.set_defaults(run=run)


def whole(text: str) -> int:
    """A whole number of any size, for argparse; whether it makes sense is checked where all are
    known.
    """
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shortened(text)!r} is not a whole number") from None


def run(options: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    from paged_kv.errors import PagedKVError

    to_screen = str(options.json) == "-"
    wrong = estimate_workers.unusable(options)
    if wrong is None and options.json is not None and not to_screen:
        wrong = _wrong(options)
    if wrong:
        return fail(wrong, status=2)
    try:
        found = _answers(options)
    except (PagedKVError, Refused) as error:
        return fail(str(error), status=2)
    figures = [_figures(each) for each in found]
    written = json.dumps(figures[0] if len(figures) == 1 else figures, indent=2) + "\n"
    if to_screen:
        print(written, end="")
        return 0
    _show(found, lightzero=options.transformers_config is None)
    try:
        if options.json:
            options.json.write_text(written)
    except OSError as error:
        return fail(f"cannot write to {str(options.json)!r}: {error.strerror}")
    return 0


def _figures(answer: Answer) -> dict[str, Any]:
    shared = {} if answer.machines is None else {"machines": answer.machines.as_dict()}
    found = answer.estimate.as_dict()
    return {"name": answer.name, **found, **shared, "notes": answer.notes}


def _show(found: list[Answer], lightzero: bool) -> None:
    from paged_kv.tools.estimate import machines_table
    from paged_kv.tools.estimate.table import text

    tables = []
    for each in found:
        tables.append(text(each.estimate, each.name, lightzero=lightzero, notes=each.notes))
        if each.machines is not None:
            tables.append(machines_table.text(each.machines))
    print("\n\n".join(tables))


def _answers(options: argparse.Namespace) -> list[Answer]:
    """The estimate of each workload. Raises Refused, and BadConfig where a file has none."""
    given = {
        name: value
        for name in (*SIZES, "dtype", "storage")
        if (value := getattr(options, name)) is not None
    }
    return [_answer(options, source, given) for source in _sources(options)]


def _answer(options: argparse.Namespace, source: Source, given: dict[str, Any]) -> Answer:
    from paged_kv.errors import PagedKVError
    from paged_kv.tools.estimate import estimate

    fields = source.fields | given
    missing = [field for field in NEEDED if field not in fields]
    if missing:
        raise Refused(_incomplete(missing, options))
    try:
        found = estimate(**fields)
        shared = estimate_workers.shared(options, found)
    except PagedKVError as error:
        raise Refused(f"{source.name}: {error}" if source.name else str(error)) from None
    unnamed = options.transformers_config is not None and "dtype" not in fields
    notes = (*source.notes, NO_DTYPE) if unnamed else source.notes
    return Answer(source.name or "search", found, shared, notes)


def _wrong(options: argparse.Namespace) -> str | None:
    """Why the figures cannot be written, or None."""
    inputs = []
    if options.lightzero_config is not None:
        inputs.append(Named("--lightzero-config", options.lightzero_config))
    if options.transformers_config is not None:
        path = options.transformers_config
        inputs += [Named("the configuration", each) for each in (path, path / "config.json")]
    return unusable_outputs([Named("--json", options.json)], inputs)


def _sources(options: argparse.Namespace) -> list[Source]:
    """Each workload, as far as a preset or a file gives it."""
    from paged_kv.tools.estimate import configs, huggingface

    if options.preset:
        from paged_kv.tools.profile.presets import PRESETS

        names = PRESET_NAMES if options.preset == "all" else (options.preset,)
        return [Source(name, configs.preset(PRESETS[name])) for name in names]
    if options.lightzero_config is not None:
        path = options.lightzero_config
        return [Source(path.name, configs.lightzero(path))]
    if options.transformers_config is not None:
        path = options.transformers_config
        name = path.parent.name if path.name == "config.json" else path.name
        found = huggingface.transformers(path)
        return [Source(name or "transformer", {"envs": 1, **found.fields}, found.notes)]
    return [Source("", {})]


def _incomplete(missing: list[str], options: argparse.Namespace) -> str:
    """What to add where sizes are missing."""
    from paged_kv.tools.estimate.configs import LIGHTZERO_NAMES
    from paged_kv.tools.estimate.huggingface import TRANSFORMERS_NAMES

    flags = ", ".join("--" + field.replace("_", "-") for field in missing)
    path = options.lightzero_config or options.transformers_config
    if path is None:
        return f"give {flags}, or one of --preset, --lightzero-config, --transformers-config"
    names = LIGHTZERO_NAMES if options.lightzero_config else TRANSFORMERS_NAMES
    absent = ", ".join(names[field] for field in missing if field in names)
    if absent:
        return f"{str(path)!r} has no {absent}: give {flags}"
    return f"with {str(path)!r}, give {flags}, too"

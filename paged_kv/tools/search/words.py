"""A search in words and numbers, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from paged_kv.tools.search.side import PACKED, TITLES
from paged_kv.tools.units import count, size

Side = dict[str, Any]


class Column(NamedTuple):
    """One figure of all caches: what it is called, and how it is shown."""

    label: str
    show: Callable[[Side], str]


def title(workload: dict[str, Any]) -> str:
    """One line on what was run."""
    return (
        f"{workload['preset']}: {workload['method']} with {workload['model']} "
        f"({workload['parameters'] / 1e6:,.3g}M parameters), a root of "
        f"{workload['prompt_tokens']:,} tokens, {workload['nodes']} nodes"
    )


def heads() -> list[str]:
    """What stands above the comparison."""
    return ["", *(column.label for column in COLUMNS)]


def rows(result: dict[str, Any]) -> list[list[str]]:
    """The comparison as text: a row for each cache."""
    caches = result["caches"].items()
    return [[TITLES[name], *(column.show(side) for column in COLUMNS)] for name, side in caches]


def _seconds(field: str) -> Callable[[Side], str]:
    return lambda side: f"{side[field]:.1f} s"


def _size(field: str) -> Callable[[Side], str]:
    return lambda side: size(side[field])


def _over_unique(side: Side) -> str:
    needed = side["unique_token_bytes_peak"]
    return f"{side['kv_bytes_peak'] / needed:.2f}" if needed else ""


def _cache_share(side: Side) -> str:
    return f"{100 * side['cache_seconds'] / side['seconds']:.1f} %" if side["seconds"] else ""


COLUMNS = (
    Column("tokens/s", lambda side: f"{side['tokens_per_second']:.1f}"),
    Column("K/V peak", _size("kv_bytes_peak")),
    Column("/ unique", _over_unique),
    Column("buffers", _size("working_bytes_peak")),
    Column("search", _seconds("seconds")),
    Column("cache", _cache_share),
    Column("root", _seconds("root_seconds")),
    Column("fed", lambda side: count(side["tokens_prefilled"])),
)


def ratios(result: dict[str, Any]) -> str:
    """What pages attended once are worth."""
    found = result["ratios"]
    said = (
        f"Pages as a tree: {found['tokens_per_second']:.2f}x the tokens per second of the best "
        f"cache without pages, {found['kv_bytes_peak']:.1f}x less K/V than a copy per node."
    )
    return " ".join([said, *packed(result)])


def packed(result: dict[str, Any]) -> list[str]:
    """What packed weights add; nothing where they were not tried."""
    if PACKED not in result["caches"]:
        return []
    found = result["ratios"]["packed_tokens_per_second"]
    taken = size(result["workload"]["packed_bytes"])
    return [f"With packed weights, which take {taken}: {found:.2f}x."]


def agreement(result: dict[str, Any]) -> str:
    """Whether all sides drew the same tokens.

    >>> agreement({"tokens_compared": 2048, "tokens_different": 0})
    'Tokens compared: 2,048; different: 0.'
    """
    return (
        f"Tokens compared: {result['tokens_compared']:,}; different: "
        f"{result['tokens_different']:,}."
    )


def found(result: dict[str, Any]) -> list[str]:
    """What came of the search; nothing where nobody can tell."""
    task = result["task"]
    if "solved_nodes" not in task:
        return []
    asked = " ".join(task["question"].split())
    if task["solution"] is None:
        return [f"{asked}: no node solves it."]
    of = len(result["tree"]) - 1
    return [f"{asked}: {task['solution']} (solved by {task['solved_nodes']} of {of} nodes)"]


def notes(result: dict[str, Any]) -> str:
    """What was run, and on what."""
    workload = result["workload"]
    machine = result["machine"]
    done = workload["simulations_done"]
    planned = workload["simulations"]
    said = [
        f"{done} simulations" if done == planned else f"{done} of {planned} simulations",
        f"{workload['width']} children of {workload['tokens']} tokens",
        workload["dtype"],
        f"pages of {workload['page_size']} tokens",
        f"seed {workload['seed']}",
        f"{workload['threads']} thread(s)",
        f"transformers {machine['transformers']}",
        machine["processor"],
    ]
    return ", ".join(said) + "."

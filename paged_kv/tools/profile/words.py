"""The comparison in words and numbers, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from paged_kv.tools.profile.counters import CACHE, HEADS, MODEL, TRANSFORMS, TREE
from paged_kv.tools.profile.parts import GLUE, PARTS
from paged_kv.tools.profile.side import DENSE, PAGED, TITLES
from paged_kv.tools.profile.workload import ENOUGH_ROOTS
from paged_kv.tools.units import count, micros, size

Cell = Callable[[float], str]
PART_NAMES = {
    MODEL: "the model's blocks",
    HEADS: "its heads",
    TRANSFORMS: "transforms of values",
    TREE: "the tree",
    CACHE: "the cache",
    GLUE: "what lies between",
}


OPTIONS = ("at", "keys", "padding", "window", "step", "linears", "attention")


class Row(NamedTuple):
    """One line of the comparison, as text."""

    label: str
    dense: str
    paged: str
    ratio: str = ""


class Names(NamedTuple):
    """What both caches are called."""

    dense: str
    paged: str


class Both(NamedTuple):
    """The figures of both caches."""

    dense: dict[str, Any]
    paged: dict[str, Any]


def title(workload: dict[str, Any]) -> str:
    """One line on what was run."""
    return (
        f"{workload['preset']}: {workload['layers']} layers x {workload['embed_dim']}, "
        f"context {workload['context_length']}, {workload['envs']} envs, "
        f"{workload['simulations']} simulations"
    )


def sides(workload: dict[str, Any]) -> Names:
    """What the two caches are called."""
    titles = TITLES[workload["client"]]
    return Names(titles[DENSE], titles[PAGED])


def caches(result: dict[str, Any]) -> Both:
    """What a result holds of each cache."""
    found = result["caches"]
    return Both(found[DENSE], found[PAGED])


def rows(result: dict[str, Any]) -> list[Row]:
    """The comparison; labels that begin with spaces belong to the row above.

    Times of fewer than `ENOUGH_ROOTS` root steps are not compared.
    """
    both = caches(result)
    timed = result["workload"]["roots"] >= ENOUGH_ROOTS
    paged = both.paged
    moved = f"{count(paged['copied_pages'])}, {count(paged['evictions'])}"
    return [
        _measure(both, "K/V held, peak", "kv_bytes_peak", size),
        _measure(both, "K/V held, end", "kv_bytes_end", size),
        Row(
            "  tokens needed, each once", *(size(side["unique_token_bytes_peak"]) for side in both)
        ),
        Row("  held / needed", *map(_over_unique, both)),
        _measure(both, "Working buffers, peak", "working_bytes_peak", size),
        Row("Pool reserved", "", size(paged["pool_bytes_reserved"])),
        _measure(both, "Cache kernels / simulation", "tensor_kernels_per_simulation", count),
        _measure(
            both, "  and inside the transformer", "transformer_cache_kernels_per_simulation", count
        ),
        _measure(both, "Host copies / simulation", "host_copies_per_simulation", count),
        _measure(both, "Cache time / simulation", "cache_us_per_simulation", micros, timed),
        _measure(both, "Search time / simulation", "search_us_per_simulation", micros, timed),
        Row("  the cache's share", *(_share(side) if timed else "" for side in both)),
        *(_part(both, part) for part in PARTS if timed),
        Row("Hits + misses", *map(_lookups, both)),
        Row("Sharing ratio, peak", "1.00", f"{paged['sharing_ratio_peak']:.2f}"),
        Row("Pages copied, evictions", "", moved),
    ]


def _measure(both: Both, label: str, key: str, show: Cell, comparable: bool = True) -> Row:
    dense = both.dense[key]
    paged = both.paged[key]
    ratio = f"{dense / paged:.1f}x" if comparable and dense and paged else ""
    return Row(label, show(dense), show(paged), ratio)


def _over_unique(side: dict[str, Any]) -> str:
    needed = side["unique_token_bytes_peak"]
    return f"{side['kv_bytes_peak'] / needed:.2f}" if needed else ""


def _part(both: Both, part: str) -> Row:
    dense, paged = (side["search_parts_us_per_simulation"][part] for side in both)
    ratio = f"{dense / paged:.1f}x" if dense and paged else ""
    return Row(f"  {PART_NAMES[part]}", micros(dense), micros(paged), ratio)


def _lookups(side: dict[str, Any]) -> str:
    return f"{count(side['hits'])} + {count(side['misses'])}"


def _share(side: dict[str, Any]) -> str:
    return f"{100 * side['cache_share_of_search']:.1f} %"


def agreement(result: dict[str, Any]) -> str:
    """Whether both sides decided alike, and under which options of `attach`.

    >>> found = {"actions_compared": 8, "actions_equal": 8, "visit_counts_equal": True}
    >>> found["max_abs_value_difference"] = 2.5e-07
    >>> agreement({"fidelity": found, "workload": {"client": "reference"}})
    'Actions equal: 8 of 8; visit counts equal; values differ by at most 2.5e-07.'
    """
    found = result["fidelity"]
    visits = "equal" if found["visit_counts_equal"] else "DIFFER"
    told = (
        f"Actions equal: {found['actions_equal']:,} of {found['actions_compared']:,}; visit "
        f"counts {visits}; "
        f"values differ by at most {found['max_abs_value_difference']:.2g}."
    )
    return " ".join([told, *measured_with(result["workload"])])


def options_of(workload: dict[str, Any]) -> str:
    """Options of `attach` as they are written in a call; rare ones only where they were taken.

    >>> options_of({"at": "read", "step": "lean", "storage": "exact", "compile": True})
    'at="read", step="lean", compile=True'
    """
    said = [f'{name}="{workload[name]}"' for name in OPTIONS if name in workload]
    if workload.get("storage", "exact") != "exact":
        said.append(f'storage="{workload["storage"]}"')
    if workload.get("compile"):
        said.append("compile=True")
    return ", ".join(said)


def measured_with(workload: dict[str, Any]) -> list[str]:
    """Under which options of `attach` LightZero was compared; nothing of other clients.

    >>> measured_with({"client": "lightzero", "keys": "node", "padding": "masked"})
    ['Measured with keys="node", padding="masked".']
    """
    if workload["client"] != "lightzero":
        return []
    options = options_of(workload)
    if workload.get("padding") != "attended":
        return [f"Measured with {options}."]
    return [
        f"Measured with {options}: both sides see the zeros in front of shorter windows. With "
        'padding="masked", the default of attach(), pages do not, and rows that have such zeros '
        "get other numbers."
    ]


def notes(result: dict[str, Any]) -> str:
    """What was run, and on what."""
    workload = result["workload"]
    machine = result["machine"]
    said = [
        f"{workload['client']} {workload['client_version']}",
        f"{workload['weights']} weights",
        workload["observations"],
        f"{workload['roots']} root steps",
        f"{workload['threads']} thread(s)",
        machine["processor"],
    ]
    fixed = workload["tie_breaking"] == "fixed"
    return (
        ", ".join(said)
        + "."
        + ("" if fixed else " Tie-breaking could not be fixed here, so actions may differ.")
    )


def too_few_roots(result: dict[str, Any]) -> list[str]:
    """What to say of times where few root steps were timed; bytes and counts need no more."""
    roots = result["workload"]["roots"]
    if roots >= ENOUGH_ROOTS:
        return []
    return [
        f"Too few root steps to compare times: {roots}, of which every other one times the "
        "search and the rest the "
        f"cache. Give --roots {ENOUGH_ROOTS} or more."
    ]

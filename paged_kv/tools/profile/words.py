"""The comparison in words and numbers, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paged_kv.tools.profile.side import DENSE, PAGED, TITLES
from paged_kv.tools.profile.workload import ENOUGH_ROOTS
from paged_kv.tools.units import count, micros, size

Cell = Callable[[float], str]


def title(workload: dict[str, Any]) -> str:
    """One line on what was run."""
    return (
        f"{workload['preset']}: {workload['layers']} layers x {workload['embed_dim']}, "
        f"context {workload['context_length']}, {workload['envs']} envs, "
        f"{workload['simulations']} simulations"
    )


def sides(workload: dict[str, Any]) -> tuple[str, str]:
    """What the two caches are called."""
    titles = TITLES[workload["client"]]
    return titles[DENSE], titles[PAGED]


def rows(old: dict[str, Any], new: dict[str, Any], roots: int) -> list[tuple[str, str, str, str]]:
    """Label, both values and their ratio; labels that begin with spaces belong to the row above.

    Times of fewer than `ENOUGH_ROOTS` root steps are not compared.
    """

    def row(label: str, key: str, show: Cell) -> tuple[str, str, str, str]:
        a = old[key]
        b = new[key]
        comparable = a and b and (show is not micros or roots >= ENOUGH_ROOTS)
        return label, show(a), show(b), f"{a / b:.1f}x" if comparable else ""

    def over_unique(side: dict[str, Any]) -> str:
        needed = side["unique_token_bytes_peak"]
        return f"{side['kv_bytes_peak'] / needed:.2f}" if needed else ""

    def lookups(side: dict[str, Any]) -> str:
        return f"{count(side['hits'])} + {count(side['misses'])}"

    def share(side: dict[str, Any]) -> str:
        return (
            f"{side['cache_share_of_search']:.1%}".replace("%", " %")
            if roots >= ENOUGH_ROOTS
            else ""
        )

    return [
        row("K/V held, peak", "kv_bytes_peak", size),
        row("K/V held, end", "kv_bytes_end", size),
        (
            "  tokens needed, each once",
            size(old["unique_token_bytes_peak"]),
            size(new["unique_token_bytes_peak"]),
            "",
        ),
        ("  held / needed", over_unique(old), over_unique(new), ""),
        row("Working buffers, peak", "working_bytes_peak", size),
        ("Pool reserved", "", size(new["pool_bytes_reserved"]), ""),
        row("Cache kernels / simulation", "tensor_kernels_per_simulation", count),
        row("  and inside the transformer", "transformer_cache_kernels_per_simulation", count),
        row("Host copies / simulation", "host_copies_per_simulation", count),
        row("Cache time / simulation", "cache_us_per_simulation", micros),
        row("Search time / simulation", "search_us_per_simulation", micros),
        ("  the cache's share", share(old), share(new), ""),
        ("Hits + misses", lookups(old), lookups(new), ""),
        ("Sharing ratio, peak", "1.00", f"{new['sharing_ratio_peak']:.2f}", ""),
        (
            "Pages copied, evictions",
            "",
            f"{count(new['copied_pages'])}, {count(new['evictions'])}",
            "",
        ),
    ]


def agreement(result: dict[str, Any]) -> str:
    """One line on whether both sides decided alike.

    >>> found = {"actions_compared": 8, "actions_equal": 8, "visit_counts_equal": True}
    >>> agreement({"fidelity": found | {"max_abs_value_difference": 2.5e-07}})
    'Actions equal: 8 of 8; visit counts equal; values differ by at most 2.5e-07.'
    """
    found = result["fidelity"]
    visits = "equal" if found["visit_counts_equal"] else "DIFFER"
    return (
        f"Actions equal: {found['actions_equal']:,} of {found['actions_compared']:,}; visit "
        f"counts {visits}; "
        f"values differ by at most {found['max_abs_value_difference']:.2g}."
    )


def notes(result: dict[str, Any]) -> str:
    """What was run, and on what."""
    workload = result["workload"]
    machine = result["machine"]
    lightzero = workload["client"] == "lightzero"
    choices = [f'{name}="{workload[name]}"' for name in ("at", "keys", "window") if lightzero]
    said = [
        f"{workload['client']} {workload['client_version']}",
        f"{workload['weights']} weights",
        workload["observations"],
        f"{workload['roots']} root steps",
        *choices,
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

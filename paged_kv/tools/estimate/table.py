"""An estimate as text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from paged_kv.tools.estimate.call import Estimate, Held
from paged_kv.tools.units import size


class Row(NamedTuple):
    """One line of the table, as text."""

    label: str
    held: str
    over_unique: str
    working: str


def text(found: Estimate, name: str, *, lightzero: bool = True, notes: Sequence[str] = ()) -> str:
    """A title, the table, what to choose, and notes; without the rows of LightZero's caches where
    there is no LightZero.

    >>> from paged_kv.tools.estimate import estimate
    >>> tiny = estimate(layers=1, heads=1, head_size=8, context=8, envs=1, simulations=40)
    >>> print(text(tiny, "tiny", lightzero=False))
    tiny: 1 layer x 1 head x 8 float32 (64 B a token), 1 environment, ... context 8
                             K/V held   / unique    working
    one dense copy a node    20.5 KiB      3.86x      512 B
    unique tokens: 85         5.3 KiB      1.00x
    pages of 2 tokens: 43     5.4 KiB      1.01x    1.6 KiB
    Choose page_size=2, num_pages=43: the 2 tokens of a step fill ... the pool never grows.
    A snapshot of its pages takes 6.7 KiB.
    """
    rows = [Row("", "K/V held", "/ unique", "working"), *_rows(found, lightzero)]
    width = max(len(row.label) for row in rows)
    lines = [
        f"{row.label:<{width}}  {row.held:>10}  {row.over_unique:>9}  {row.working:>9}".rstrip()
        for row in rows
    ]
    told = [f"Note: {note}." for note in notes]
    return "\n".join([_title(found, name), *lines, _advice(found, lightzero), *told])


def _title(found: Estimate, name: str) -> str:
    load = found.workload
    value = load.head_size if load.value_head_size is None else load.value_head_size
    sizes = f"{load.head_size}" if value == load.head_size else f"{load.head_size} and {value}"
    return (
        f"{name}: {_count(load.layers, 'layer')} x {_count(load.stored_heads, 'head')} x {sizes} "
        f"{load.dtype} "
        f"({size(found.token_bytes)} a token), {_count(load.envs, 'environment')}, "
        f"{_count(load.simulations, 'simulation')}, "
        f"roots of {_count(found.root_tokens, 'token')}, context {load.context:,}"
    )


def _rows(found: Estimate, lightzero: bool) -> list[Row]:
    def row(label: str, held: Held) -> Row:
        over = f"{held.kv / found.unique_bytes:.2f}x"
        return Row(label, size(held.kv), over, size(held.working))

    steps = found.workload.root_steps
    kind = "pages" if found.workload.storage == "exact" else f"{found.workload.storage} pages"
    when = "rings full" if steps is None else f"after {_count(steps, 'root step')}"
    rows = [
        row("one dense copy a node", found.dense),
        Row(f"unique tokens: {found.unique_tokens:,}", size(found.unique_bytes), "1.00x", ""),
        row(f"{kind} of {_count(found.page_size, 'token')}: {_pages(found)}", found.paged),
    ]
    if lightzero:
        older = found.older_root_pages
        with_older = Held(found.paged.kv + older * found.page_bytes, found.paged.working)
        rows = [
            row(f"LightZero 0.2.0, {when}", found.lightzero),
            row(f"LightZero main, {when}", found.lightzero_main),
            *rows,
        ]
        if older:
            rows.append(
                row(
                    f"  on LightZero main, with {_count(found.older_roots, 'older root')} "
                    f"an environment: {_pages(found, older)}",
                    with_older,
                )
            )
    return rows


def _pages(found: Estimate, more: int = 0) -> str:
    likely = found.pages.likely + more
    if found.pages.least == found.pages.most:
        return f"{likely:,}"
    return f"about {likely:,} ({found.pages.least + more:,} to {found.pages.most + more:,})"


def _advice(found: Estimate, lightzero: bool) -> str:
    older = found.older_root_pages if found.page_size == found.advised_page_size else 0
    more = f" ({found.num_pages + older:,} on LightZero main)" if lightzero and older else ""
    lines = [
        f"Choose page_size={found.advised_page_size}, num_pages={found.num_pages}: "
        f"{found.why}{more}.",
        f"A snapshot of its pages takes {size(found.snapshot_bytes)}.",
    ]
    load = found.workload
    if lightzero and load.simulations > load.ring:
        lines.append(
            f"LightZero's ring has places for {load.ring:,} simulations: with "
            f"{load.simulations:,} it "
            "overwrites nodes of the living tree. Set num_simulations in its world_model_cfg."
        )
    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")

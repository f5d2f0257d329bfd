"""`generate()` with beams, on a `DynamicCache` and on pages.

The same prompt, a piece of prose, is continued with a width of 8 by each way: *DynamicCache*, as
`generate()` does it without us; *pages*, the cache of a node (`PagedLM.cache`) and
attn_implementation="paged_kv"; *pages, sdpa*, the same where the model keeps its own sdpa, for
which rows are gathered; *pages, from nothing*, an empty `PagedCache(expand_size=8)` to which
`generate()` feeds the prompt once for each beam. Of the last one only the bytes of the first tokens
are looked at: it goes on as the others.

Bytes are the largest seen behind any token: K/V of the dense cache; of pages those in use, the
working buffers, and what the pool has reserved, which doubles where it is used up. Seconds are of
one token, medians over all of them; speed is the median of the ratios token by token, so at equal
lengths. The prompt is not among them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from llm.models import as_argument, facts, held_bytes, language_model, prose
from paged_kv.integrations.huggingface import PagedCache, PagedLM, shape_of
from paged_kv.integrations.huggingface.attention import NAME

WIDTH = 8
NEW = 256
PROMPTS = (32, 512)
DENSE = "DynamicCache"


class Held(NamedTuple):
    """Bytes at one moment."""

    kv: int
    working: int
    reserved: int


class Watch(StoppingCriteria):
    """Looks at the bytes and the time behind every token, and stops nothing."""

    def __init__(self, held: Callable[[], Held]) -> None:
        self.held = held
        self.seen: list[Held] = []
        self.times: list[float] = []

    def __call__(self, ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        self.times.append(time.process_time())
        self.seen.append(self.held())
        return torch.zeros(len(ids), dtype=torch.bool)

    @property
    def seconds(self) -> list[float]:
        """Of each token but the first."""
        return [after - before for before, after in zip(self.times, self.times[1:])]


class Run(NamedTuple):
    """What came of one way."""

    tokens: list[int]
    watch: Watch


def dense(model: Any, ids: torch.Tensor, new: int) -> Run:
    """`generate()` without us."""
    cache = DynamicCache()
    return _generated(model, ids, new, cache, lambda: Held(held_bytes(cache), 0, 0))


def on_pages(model: Any, ids: torch.Tensor, new: int, attention: str) -> Run:
    """`generate()` from a node."""
    lm = PagedLM(model, progress=False)
    cache = lm.cache(lm.prefill(ids), expand_size=WIDTH)
    return _paged(model, ids, new, cache, attention)


def from_nothing(model: Any, ids: torch.Tensor) -> Run:
    """`generate()` on an empty cache."""
    cache = PagedCache(shape_of(model).pages(), model, expand_size=WIDTH)
    return _paged(model, ids, 3, cache, NAME)


def _paged(model: Any, ids: torch.Tensor, new: int, cache: PagedCache, attention: str) -> Run:
    pages = cache.rows.pages

    def held() -> Held:
        return Held(pages.bytes_in_use, pages.working_bytes, pages.bytes_reserved)

    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(attention)
        return _generated(model, ids, new, cache, held)
    finally:
        model.set_attn_implementation(before)


def _generated(
    model: Any, ids: torch.Tensor, new: int, cache: Any, held: Callable[[], Held]
) -> Run:
    watch = Watch(held)
    with torch.no_grad():
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=WIDTH,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([watch]),
            **as_argument(cache),
        )
    return Run(found[0].tolist(), watch)


def measured(model: Any, tokens: list[int], new: int) -> dict[str, Any]:
    """All ways with one prompt."""
    ids = torch.tensor([tokens])
    runs = {
        DENSE: dense(model, ids, new),
        "pages": on_pages(model, ids, new, NAME),
        "pages, sdpa": on_pages(model, ids, new, "sdpa"),
    }
    ways = {
        name: {**_bytes(run, runs[DENSE]), **_speed(run, runs[DENSE])} for name, run in runs.items()
    }
    ways["pages, from nothing"] = _bytes(from_nothing(model, ids), runs[DENSE])
    return {"prompt": len(tokens), "new_tokens": new, "ways": ways}


def _bytes(run: Run, other: Run) -> dict[str, Any]:
    """What one way holds at its peak, and beside the dense one."""
    seen = run.watch.seen
    kv = max(each.kv for each in other.watch.seen)
    used = max(each.kv + each.working for each in seen)
    reserved = max(max(each.kv, each.reserved) + each.working for each in seen)
    return {
        "kv_bytes": max(each.kv for each in seen),
        "working_bytes": max(each.working for each in seen),
        "reserved_bytes": max(each.reserved for each in seen),
        "dense_over_used": kv / used,
        "dense_over_reserved": kv / reserved,
    }


def _speed(run: Run, other: Run) -> dict[str, Any]:
    """How fast one way is, alone and beside the dense one."""
    pairs = zip(other.watch.seconds, run.watch.seconds)
    return {
        "token_seconds": statistics.median(run.watch.seconds),
        "all_seconds": sum(run.watch.seconds),
        "speed": statistics.median([one / mine for one, mine in pairs]),
        "same_tokens": run.tokens == other.tokens,
    }


def measure(options: Any) -> dict[str, Any]:
    """All prompts."""
    model = language_model(options.model)
    prompts, new = ((6, 12), 8) if options.quick else (PROMPTS, NEW)
    return {
        "model": facts(model),
        "width": WIDTH,
        "page_size": shape_of(model).pages().page_size,
        "prompts": [
            measured(model, prose(model, options.model, length), new) for length in prompts
        ],
    }


def table(found: dict[str, Any]) -> list[str]:
    """The figures as markdown."""
    lines = [
        "| prompt | cache | K/V | working buffers | pool | DynamicCache / in use and buffers "
        "| DynamicCache / pool and buffers | a token | speed | same tokens |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in found["prompts"]:
        for name, way in row["ways"].items():
            sizes = [way[key] / 2**20 for key in ("kv_bytes", "working_bytes", "reserved_bytes")]
            cells = [f"{size:.1f} MiB" if size else "" for size in sizes]
            cells += [f"{way[key]:.2f}x" for key in ("dense_over_used", "dense_over_reserved")]
            lines.append(f"| {row['prompt']} | {name} | {' | '.join(cells)} | {_timed(way)} |")
    new = found["prompts"][0]["new_tokens"]
    return [
        *lines,
        "",
        f"Beams of width {found['width']}, {new} new tokens, pages of {found['page_size']}.",
    ]


def _timed(way: dict[str, Any]) -> str:
    """The last cells of a row."""
    if "speed" not in way:
        return " | | "
    same = "yes" if way["same_tokens"] else "no"
    return f"{way['token_seconds'] * 1e3:.0f} ms | {way['speed']:.2f}x | {same}"

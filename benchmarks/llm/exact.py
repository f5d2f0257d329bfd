"""Logits of nodes against logits of the same tokens without any cache.

Random trees are grown by every verb of `PagedLM`, with pages of several sizes and in little memory,
so that nodes are evicted and computed again. Each path is recomputed by the model itself with
transformers' `sdpa` and with its `eager` attention. *HF* is the largest difference between these
two, *pages* that between pages and `sdpa`; *of float64* are the largest differences to the same
weights in float64. An argmax *differs* where pages choose another token than `sdpa`, and it is a
*tie* where the two logits are closer than HF's largest difference.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llm.models import facts, language_model
from llm.walk import Checked, Sizes, Walk

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

from tiny_models import FAMILIES
from tiny_models import tiny_model as tiny_family

from paged_kv.integrations.huggingface import PagedLM

DTYPES = (torch.float32, torch.bfloat16)
PAGE_SIZES = (1, 4, 16)
TINY = Sizes(prompt=24, step=9, longest=90)
LARGE = Sizes(prompt=16, step=6, longest=48)
TINY_NODES = 10_000  # all families and dtypes together
LARGE_NODES = 300
ROOM = 5  # times the K/V of the longest path: all that is held


class Expected(NamedTuple):
    """Logits behind a path, in three ways."""

    sdpa: torch.Tensor
    eager: torch.Tensor
    precise: torch.Tensor  # of float64


class Walked(NamedTuple):
    """Nodes, and how many were evicted."""

    checked: list[Checked]
    evicted: int


class Reference:
    """What a model says of paths without a cache."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.precise = copy.deepcopy(model).double()

    def __call__(self, checked: Sequence[Checked]) -> list[Expected]:
        """Of each node. A path is run once for all nodes that it passes."""
        wanted = {node.tokens for node in checked}
        found: dict[tuple[int, ...], Expected] = {}
        for path in sorted(wanted, key=len, reverse=True):
            if path in found:
                continue
            said = self._said(path)
            for end in range(1, len(path) + 1):
                if path[:end] in wanted:
                    found[path[:end]] = Expected(*[logits[end - 1].clone() for logits in said])
        return [found[node.tokens] for node in checked]

    def _said(self, path: tuple[int, ...]) -> list[torch.Tensor]:
        ids = torch.tensor([path])
        sdpa, eager = (self._run(self.model, ids, kind) for kind in ("sdpa", "eager"))
        return [sdpa, eager, self._run(self.precise, ids, "eager")]

    @torch.no_grad()
    def _run(self, model: Any, ids: torch.Tensor, attention: str) -> torch.Tensor:
        before = model.config._attn_implementation
        try:
            model.set_attn_implementation(attention)
            seen = torch.ones_like(ids)
            logits: torch.Tensor = model(ids, attention_mask=seen, use_cache=False).logits[0]
            return logits.double()
        finally:
            model.set_attn_implementation(before)


def compared(checked: Sequence[Checked], expected: Sequence[Expected]) -> dict[str, Any]:
    """The largest differences, and how many nodes would go on with another token."""
    ours = torch.stack([node.logits for node in checked]).double()
    sdpa, eager, precise = (torch.stack(each) for each in zip(*expected))
    largest = float((eager - sdpa).abs().max())
    tokens = ours.argmax(-1, keepdim=True)
    gaps = sdpa.max(-1).values - sdpa.gather(-1, tokens)[:, 0]
    others = gaps > 0
    return {
        "nodes": len(checked),
        "hf_difference": largest,
        "pages_difference": float((ours - sdpa).abs().max()),
        "of_float64": {
            name: float((logits - precise).abs().max())
            for name, logits in (("pages", ours), ("sdpa", sdpa), ("eager", eager))
        },
        "largest_logit": float(sdpa.abs().max()),
        "argmax_differs": int(others.sum()),
        "of_them_ties": int((others & (gaps <= largest)).sum()),
        "sdpa_and_eager_argmax_differ": int((sdpa.argmax(-1) != eager.argmax(-1)).sum()),
    }


def walked(model: Any, sizes: Sizes, nodes: int, page_size: int, seed: int) -> Walked:
    """Nodes of random trees over a model."""
    token_bytes = facts(model)["token_bytes"]
    room = ROOM * sizes.longest * token_bytes
    lm = PagedLM(model, page_size=page_size, max_bytes=room, progress=False)
    checked = Walk(lm, sizes, seed).take(nodes)
    return Walked(checked, lm.stats().evicted)


def family(name: str, dtype: torch.dtype, nodes: int) -> dict[str, Any]:
    """A row of the table: a tiny model of a family, with every page size."""
    model = copy.deepcopy(tiny_family(name, dtype=dtype))
    parts = [
        walked(model, TINY, -(-nodes // len(PAGE_SIZES)), size, seed)
        for seed, size in enumerate(PAGE_SIZES)
    ]
    return row(name, dtype, parts, Reference(model))


def row(
    name: str, dtype: torch.dtype, parts: Sequence[Walked], reference: Reference
) -> dict[str, Any]:
    """What was found on one model."""
    checked = [node for part in parts for node in part.checked]
    verbs = sorted({node.verb for node in checked})
    return {
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        **compared(checked, reference(checked)),
        "evicted": sum(part.evicted for part in parts),
        "made_by": {verb: sum(node.verb == verb for node in checked) for verb in verbs},
        "longest_path": max(len(node.tokens) for node in checked),
    }


def measure(options: Any) -> dict[str, Any]:
    """All families in both dtypes, and the language model."""
    model = language_model(options.model)
    total, large = (240, 12) if options.quick else (TINY_NODES, LARGE_NODES)
    each = -(-total // (len(FAMILIES) * len(DTYPES)))
    rows = [family(name, dtype, each) for name in FAMILIES for dtype in DTYPES]
    part = walked(model, LARGE, large, 4, seed=0)
    last = row("language model", torch.float32, [part], Reference(model))
    return {"model": facts(model), "page_sizes": PAGE_SIZES, "rows": [*rows, last]}


def table(found: dict[str, Any]) -> list[str]:
    """The figures as markdown."""
    lines = [
        "| model | dtype | nodes | evicted | HF | pages | of float64: pages | sdpa | eager "
        "| argmax differs | of them ties |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for each in found["rows"]:
        precise = each["of_float64"]
        cells = [f"{precise[name]:.1e}" for name in ("pages", "sdpa", "eager")]
        lines.append(
            f"| {each['model']} | {each['dtype']} | {each['nodes']:,} | {each['evicted']:,} | "
            f"{each['hf_difference']:.1e} | {each['pages_difference']:.1e} | "
            f"{' | '.join(cells)} | {each['argmax_differs']} | {each['of_them_ties']} |"
        )
    nodes = sum(each["nodes"] for each in found["rows"][:-1])
    return [*lines, "", f"Nodes of tiny models: {nodes:,}."]

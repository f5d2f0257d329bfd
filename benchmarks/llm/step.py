"""One step of a search: rows that share a long beginning, and have some tokens of their own.

Each way feeds one token of every row and asks for its logits:

- *empty*: the model with an empty cache, so hardly any attention: nothing can be faster;
- *pages*: `PagedLM.extend`, opening, publishing and releasing included;
- *pages, row by row*: the same, where attention gathers each row by itself;
- *DynamicCache*: one dense batch that was expanded to all rows before, which is not timed here;
- *attention*: what the layers of *pages* attend, alone: step opened, K/V written, attended, closed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from llm.models import as_argument, dynamic_cache, facts, language_model, random_rows
from llm.timing import core, in_turns, medians, ratios, timed
from paged_kv.integrations.huggingface import Node, PagedLM


class Case(NamedTuple):
    """How many rows, and of how many tokens."""

    rows: int
    shared: int
    own: int


CASES = (Case(16, 2048, 32), Case(64, 512, 32), Case(1, 2048, 32))
QUICK = (Case(3, 24, 4), Case(1, 24, 4))
ROW_BY_ROW = "pages, row by row"
FEW = 2  # rounds of what is slow


class Scene:
    """The rows of a case, on pages and in a dense cache."""

    def __init__(self, lm: PagedLM, root: Node, case: Case) -> None:
        self.lm = lm
        self.model = lm.model
        (trunk,) = lm.crop([root], [case.shared])
        own = random_rows(self.model, case.rows, case.own, seed=1)
        self.nodes = lm.extend([trunk] * case.rows, own).nodes
        self.tokens = random_rows(self.model, case.rows, 1, seed=2)
        self.ids = torch.tensor(self.tokens)
        self.case = case
        self.length = case.shared + case.own
        self.seqs = [lm.paths.residents.sequence(node.place.number) for node in self.nodes]
        self.dense: Any = None
        self.expand_seconds = timed(self._expand)

    def _expand(self) -> None:
        """Make the dense batch of what is on pages."""
        found = self.lm.pages.gather(self.seqs)
        self.dense = dynamic_cache(list(zip(found.keys, found.values)))

    def calls(self) -> dict[str, Callable[[], Any]]:
        """The ways to make a step."""
        return {
            "empty": self.empty,
            "pages": self.pages,
            "DynamicCache": self.dynamic,
            "attention": self.attention,
        }

    def slow_calls(self) -> dict[str, Callable[[], Any]]:
        """A way that takes too long to be made often, and what it is compared with."""
        return {"empty": self.empty, ROW_BY_ROW: self.row_by_row}

    @torch.no_grad()
    def empty(self) -> torch.Tensor:
        """The model alone."""
        logits: torch.Tensor = self.model(self.ids, **as_argument(DynamicCache())).logits
        return logits

    def pages(self) -> torch.Tensor:
        """Children, and their logits [rows, vocabulary]; the children are given up."""
        return torch.cat(self.lm.extend(self.nodes, self.tokens).logits)

    def row_by_row(self) -> torch.Tensor:
        """The same with the reference attention."""
        runner = self.lm.paths.runner
        before = runner.backend
        try:
            runner.backend = "dense"
            return self.pages()
        finally:
            runner.backend = before

    @torch.no_grad()
    def dynamic(self) -> torch.Tensor:
        """A step of the dense batch, which is then cut to what it was."""
        positions = torch.full((self.case.rows, 1), self.length)
        logits = self.model(self.ids, position_ids=positions, **as_argument(self.dense)).logits
        for layer in self.dense.layers:
            layer.keys = layer.keys[:, :, : self.length]
            layer.values = layer.values[:, :, : self.length]
        found: torch.Tensor = logits[:, 0]
        return found

    def attention(self) -> None:
        """Attention of all layers."""
        rows = self.case.rows
        pages = self.lm.pages
        heads = self.model.config.num_attention_heads
        queries = torch.randn(rows, heads, 1, pages.head_size)
        new = torch.randn(rows, pages.heads, 1, pages.head_size)
        with pages.attend(self.seqs, 1) as step:
            for layer in step.layers:
                layer.attend(queries, new, new)

    @property
    def flops(self) -> int:
        """Of all scores and sums of a step, for each token that a query sees."""
        config = self.model.config
        pages = self.lm.pages
        per_token = 4 * pages.layers * config.num_attention_heads * pages.head_size
        return per_token * self.case.rows * (self.length + 1)

    @property
    def unique_bytes(self) -> int:
        """K/V that a step has to read, each token once."""
        case = self.case
        return self.lm.pages.token_bytes * (case.shared + case.rows * (case.own + 1))


def measured(scene: Scene, rounds: int) -> dict[str, Any]:
    """Times and ratios of a case."""
    paged = scene.pages()
    difference = float((paged - scene.dynamic()).abs().max())
    times = in_turns(scene.calls(), rounds)
    few = in_turns(scene.slow_calls(), FEW)
    seconds = {**medians(few), **medians(times)}
    beside = [
        one - other - attended
        for one, other, attended in zip(times["pages"], times["empty"], times["attention"])
    ]
    return {
        **scene.case._asdict(),
        "seconds": seconds,
        "over_empty": {**ratios(few, "empty"), **ratios(times, "empty")},
        "dynamic_over_pages": ratios(times, "pages")["DynamicCache"],
        "expand_seconds": scene.expand_seconds,
        "beside_attention_seconds": sorted(beside)[len(beside) // 2],
        "attention_gflops": scene.flops / seconds["attention"] / 1e9,
        "attention_gbytes": scene.unique_bytes / seconds["attention"] / 1e9,
        "largest_difference": difference,
        "largest_logit": float(paged.abs().max()),
    }


def measure(options: Any) -> dict[str, Any]:
    """All cases, one after the other."""
    model = language_model(options.model)
    cases = QUICK if options.quick else CASES
    lm = PagedLM(model, progress=False)
    (root,) = lm.prefill(random_rows(model, 1, max(case.shared for case in cases), seed=0))
    machine = core()
    rows = []
    for case in cases:
        scene = Scene(lm, root, case)
        rows.append(measured(scene, 3 if options.quick else 9))
    return {"model": facts(model), "core": machine, "page_size": lm.pages.page_size, "cases": rows}


def table(found: dict[str, Any]) -> list[str]:
    """The figures as markdown."""
    lines = [
        "| rows | shared | empty | pages / empty | row by row / empty | DynamicCache / empty "
        "| expanding, once / empty | DynamicCache / pages | attention / empty "
        "| beside it / empty |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found["cases"]:
        ratio = row["over_empty"]
        empty = row["seconds"]["empty"]
        found_ratios = [
            ratio["pages"],
            ratio[ROW_BY_ROW],
            ratio["DynamicCache"],
            row["expand_seconds"] / empty,
            row["dynamic_over_pages"],
            ratio["attention"],
            row["beside_attention_seconds"] / empty,
        ]
        cells = " | ".join(f"{each:.2f}x" for each in found_ratios)
        lines.append(f"| {row['rows']} | {row['shared']:,} | {empty * 1e3:.0f} ms | {cells} |")
    lines += [
        "",
        "| rows | shared | attention | of sgemm | K/V read once | of reading memory "
        "| largest difference of logits to DynamicCache |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    machine = found["core"]
    for row in found["cases"]:
        flops = row["attention_gflops"]
        read = row["attention_gbytes"]
        lines.append(
            f"| {row['rows']} | {row['shared']:,} | {flops:.1f} GFLOP/s | "
            f"{flops / machine['sgemm_gflops']:.0%} | {read:.1f} GB/s | "
            f"{read / machine['read_gbytes']:.0%} | {row['largest_difference']:.1g} "
            f"of {row['largest_logit']:.0f} |"
        )
    return [
        *lines,
        "",
        f"Pages of {found['page_size']}. The core: {machine['sgemm_gflops']:.0f} GFLOP/s of sgemm, "
        f"{machine['read_gbytes']:.1f} GB/s read, {machine['copy_gbytes']:.1f} GB/s read and "
        "written by a copy.",
    ]

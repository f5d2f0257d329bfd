"""What every order costs on one pool of one workload: contents are compared first, then timed."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from memory_orders.orders import Ints, Order, Sizes, all_at_once, blocks, each_row, exact
from memory_orders.page_runs import BATCH, Pool, Shape, Table, at_least, spans

VARIETY = 16  # batches that are measured in turn, so that no order lives on what a cache kept
GROWING = 64 << 20  # bytes of the pool that is doubled
HEAVY = 64 << 20  # bytes of a batch from which on there are fewer rounds
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
Call = Callable[[int], object]  # gets the number of the round
Times = dict[str, list[float]]
Figures = dict[str, dict[str, float]]  # of each order


class Workload(NamedTuple):
    """A model and its windows."""

    sizes: Sizes
    shape: Shape
    group: int  # heads of queries a head of K and V
    prefixes: tuple[int, ...]  # pages of shared prefixes
    window: int  # pages of a window that is gathered


def windowed(
    model: tuple[int, int, int], prompts: tuple[int, ...], pages: int, prefixes: tuple[int, ...]
) -> Workload:
    """A world model: windows as long as the longest prompt, pages of two tokens, two new ones."""
    most = max(prompts)
    return Workload(
        Sizes(*model, 2, pages, torch.float32),
        Shape(prompts, most, 2, 2, pages, BATCH),
        1,
        tuple(tokens // 2 for tokens in prefixes),
        -(-most // 2),
    )


def text(model: tuple[int, int, int], group: int, dtype: torch.dtype) -> Workload:
    """A language model: prompts of several lengths, pages of 16 tokens, one new token."""
    pages = 1024
    return Workload(
        Sizes(*model, 16, pages, dtype),
        Shape((512, 1024, 2048), None, 16, 1, pages, 4),
        group,
        (32, 128),
        32,
    )


WORKLOADS: dict[str, Workload] = {
    "small": windowed((2, 2, 32), (1, 3, 5), 8192, (4,)),
    "atari": windowed((2, 8, 96), (1, 3, 5), 4096, (4,)),
    "long": windowed((2, 8, 96), (41, 51, 61), 8192, (16, 40)),
    "llm": text((30, 3, 64), 3, torch.float32),
    "llm-bf16": text((8, 8, 64), 1, torch.bfloat16),
}


def names(sizes: Sizes, chunks: Sequence[int]) -> dict[str, int]:
    """Orders by the pages of their chunks; 0 stands for the whole pool."""
    return {("pool" if not chunk else str(chunk)): chunk or sizes.pages for chunk in (1, *chunks)}


def few(rounds: int) -> int:
    """Rounds of what takes long."""
    return max(min(rounds, 5), rounds // 10)


def interleaved(calls: dict[str, Call], rounds: int) -> Times:
    """Seconds of each call, round by round. Every round has an order of its own: drift of the
    machine, and what a call leaves in the processor's caches for the next, then hit all alike.
    """
    names_ = list(calls)
    times: Times = {name: [] for name in names_}
    draw = random.Random(0)
    warm = max(1, rounds // 10)
    for round_ in range(rounds + warm):
        for name in draw.sample(names_, len(names_)):
            begin = time.perf_counter()
            calls[name](round_)
            took = time.perf_counter() - begin
            if round_ >= warm:
                times[name].append(took)
    return times


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """The median of the ratios within each round."""
    return statistics.median(one / other for one, other in zip(times, base))


def figures(times: Times) -> Figures:
    """Median microseconds, and the ratio to the first."""
    base = next(iter(times.values()))
    return {
        name: {"us": statistics.median(values) * 1e6, "ratio": ratio(values, base)}
        for name, values in times.items()
    }


class Bench:
    """All orders of one workload with the same contents, and the windows of one pool of pages."""

    def __init__(self, work: Workload, chunks: Sequence[int]) -> None:
        self.work = work
        sizes = work.sizes
        first = Order(sizes, 1)
        self.orders = {
            name: Order(sizes, chunk, first) if chunk > 1 else first
            for name, chunk in names(sizes, chunks).items()
        }
        layers = sizes.layers
        shape = layers, BATCH, sizes.heads, work.shape.new * work.group, sizes.size
        self.queries = torch.randn(shape).to(sizes.dtype)
        self._memory = torch.empty(0, dtype=sizes.dtype)

    def use(self, pool: Pool, tables: Sequence[Table], seed: int = 0) -> None:
        """Draw windows and prefixes from these tables of a pool, and pages to write to."""
        work = self.work
        draw = random.Random(seed)
        windows = [table[-work.window :] for table in at_least(work.window, tables)]
        self.windows = [np.array(draw.choices(windows, k=BATCH)) for _ in range(VARIETY)]
        self.prefixes: dict[int, list[Table]] = {}
        for pages in work.prefixes:
            long = [table[:pages] for table in at_least(pages, tables)]
            self.prefixes[pages] = draw.choices(long, k=VARIETY)
        batches = min(VARIETY, pool.tables.books.pages.free_count // BATCH)
        free = pool.tables.books.pages.peek(batches * BATCH)
        self.fresh = [free[i : i + BATCH] for i in range(0, len(free), BATCH)]
        slots = np.random.default_rng(seed)
        shape = BATCH, work.shape.new
        every = work.sizes.pages * work.sizes.page
        self.slots = [
            slots.choice(every, size=shape, replace=False).astype(np.int64) for _ in range(VARIETY)
        ]

    def dense(self, rows: int, pages: int) -> tuple[torch.Tensor, Ints]:
        """A batch to gather to, on reused memory, and space for its row numbers."""
        sizes = self.work.sizes
        shape = sizes.parts, rows, sizes.heads, pages * sizes.page, sizes.size
        count = int(np.prod(shape))
        if count > self._memory.numel():
            self._memory = self._memory.new_zeros(count)
        numbers = np.zeros((*shape[:3], pages), dtype=np.int64)
        return self._memory[:count].view(shape), numbers

    def tokens(self) -> torch.Tensor:
        """New tokens at the end of a dense batch, as a model step leaves them."""
        dense, _ = self.dense(BATCH, self.work.window + 1)
        return dense[:, :, :, -self.work.shape.new :]

    # -- contents

    def check(self) -> float:
        """Raise AssertionError unless all orders read and write alike. Returns the largest
        difference of an attention to that in 64 bits.
        """
        self._check_writes()
        self._check_gathers()
        worst = 0.0
        for pages in self.work.prefixes:
            for table in self.prefixes[pages][:2]:
                worst = max(worst, self._check_attention(table))
        assert worst < TOLERANCE[self.work.sizes.dtype], f"attention differs by {worst}"
        return worst

    def _check_gathers(self) -> None:
        first = self.orders["1"].by_page()
        for tables in self.windows[:2]:
            wanted = first[torch.from_numpy(tables)].permute(2, 0, 3, 1, 4, 5).flatten(3, 4)
            for name, order in self.orders.items():
                dense, rows = self.dense(BATCH, tables.shape[1])
                dense.zero_()
                order.gather(tables, dense, rows)
                assert torch.equal(dense, wanted), f"chunks of {name}: another batch"

    def _check_writes(self) -> None:
        source = torch.randn(self.tokens().shape).to(self.work.sizes.dtype)
        for order in self.orders.values():
            order.scatter(*self.placed(0), source)
            order.write_pages(self.fresh[0], source)
            order.copy_pages(self.fresh[0], self.fresh[1])
        touched = [*self.fresh[0], *self.fresh[1], *self.placed(0)[0].flatten().tolist()]
        wanted = self.orders["1"].by_page()[touched]
        new = source.shape[3]
        for first in (0, BATCH):  # what was written, and the copy of it
            found = wanted[first : first + BATCH, :, :, :new]
            assert torch.equal(found.transpose(0, 1), source)
        for name, order in self.orders.items():
            chunks = [page // order.chunk for page in touched]
            found = order.pool[chunks, :, :, [page % order.chunk for page in touched]]
            assert torch.equal(found, wanted), f"chunks of {name}: other contents"

    def _check_attention(self, table: Table) -> float:
        """The largest difference, over all orders and ways."""
        pages = np.array([table])
        prefix = self.orders["1"].by_page()[torch.from_numpy(pages[0])]
        wanted = exact(prefix.permute(1, 2, 0, 3, 4).flatten(2, 3), self.queries)
        worst = 0.0
        for order in self.orders.values():
            for way in self.ways(order, len(table)).values():
                found = torch.stack(way(table))
                worst = max(worst, float((found - wanted).abs().max()))
        return worst

    # -- calls

    def placed(self, round_: int) -> tuple[Ints, Ints]:
        """Pages and offsets of single slots."""
        slots = self.slots[round_ % VARIETY]
        return slots // self.work.sizes.page, slots % self.work.sizes.page

    def ways(self, order: Order, pages: int) -> dict[str, Callable[[Table], list[torch.Tensor]]]:
        """The ways to attend from a batch to a shared prefix of so many pages."""
        dense, rows = self.dense(BATCH, pages)
        shared, shared_rows = self.dense(1, pages)

        def gather_each(table: Table) -> list[torch.Tensor]:
            order.gather(np.array([table] * BATCH), dense, rows)
            return each_row(dense, self.queries)

        def gather_once(table: Table) -> list[torch.Tensor]:
            order.gather(np.array([table]), shared, shared_rows)
            return all_at_once(shared, self.queries)

        def in_place(table: Table) -> list[torch.Tensor]:
            return order.in_place(list(spans(table)), self.queries)

        return {"gather each": gather_each, "gather once": gather_once, "in place": in_place}

    def each(self, make: Callable[[Order], Call]) -> dict[str, Call]:
        """A call for every order."""
        return {name: make(order) for name, order in self.orders.items()}

    def cases(self) -> Iterator[tuple[str, dict[str, Call], bool]]:
        """What is timed: a name, a call an order, whether it is heavy."""
        window = self.work.window
        dense, rows = self.dense(BATCH, window)
        heavy = BATCH * window * self.work.sizes.page_bytes > HEAVY
        tokens = self.tokens()
        windows = self.windows
        fresh = self.fresh
        last = len(fresh) - 1
        yield (
            "gather",
            self.each(lambda o: lambda n: o.gather(windows[n % VARIETY], dense, rows)),
            heavy,
        )
        yield (
            "write pages",
            self.each(lambda o: lambda n: o.write_pages(fresh[n % last], tokens)),
            False,
        )
        yield (
            "write slots",
            self.each(lambda o: lambda n: o.scatter(*self.placed(n), tokens)),
            False,
        )
        yield (
            "copy pages",
            self.each(lambda o: lambda n: o.copy_pages(fresh[n % last + 1], fresh[n % last])),
            False,
        )

    def attentions(self, pages: int) -> dict[str, dict[str, Call]]:
        """Calls to attend to prefixes of so many pages: for each way, a call an order."""
        tables = self.prefixes[pages]

        def attending(order: Order, way: str) -> Call:
            attend = self.ways(order, pages)[way]
            return lambda n: attend(tables[n % VARIETY])

        kept = self.dense(1, pages)[0].clone()
        return {
            way: {name: attending(order, way) for name, order in self.orders.items()}
            for way in ("gather each", "gather once", "in place")
        } | {"kept": {"1": lambda _: all_at_once(kept, self.queries)}}

    def measure(self, rounds: int) -> Iterator[dict[str, Any]]:
        """The figures of one case after the other."""
        for case, calls, heavy in self.cases():
            count = few(rounds) if heavy else rounds
            yield {"case": case, "rounds": count, "orders": figures(interleaved(calls, count))}
        for pages in self.work.prefixes:
            yield from self.measure_attention(pages, rounds)

    def measure_attention(self, pages: int, rounds: int) -> Iterator[dict[str, Any]]:
        """All ways within one round, so that they can be compared to what is done today."""
        tokens = pages * self.work.sizes.page
        count = few(rounds) if tokens >= 256 else rounds
        ways = self.attentions(pages)
        calls = {f"{way}/{name}": ways[way][name] for way in ways for name in ways[way]}
        times = interleaved(calls, count)
        today = times["gather each/1"]
        for way, names_ in ways.items():
            found = figures({name: times[f"{way}/{name}"] for name in names_})
            for name, figure in found.items():
                figure["over_today"] = ratio(times[f"{way}/{name}"], today)
            row = {"case": f"attend {tokens}, {way}", "rounds": count, "orders": found}
            yield row | ({"parts": self.parts(tokens)} if way == "in place" else {})

    def parts(self, tokens: int) -> dict[str, float]:
        """Views that the drawn prefixes fall into, on average, for each order."""
        tables = self.prefixes[tokens // self.work.sizes.page]
        return {
            name: statistics.mean(
                sum(1 for run in spans(table) for _ in blocks(*run, order.chunk))
                for table in tables
            )
            for name, order in self.orders.items()
        }


def doubling(order: Order) -> Call:
    """A call that doubles this pool, and drops the result."""
    return lambda _: order.grown()


def growth(work: Workload, chunks: Sequence[int], rounds: int) -> dict[str, Any]:
    """Doubling of a pool of some megabytes, the old pages copied."""
    unit = max(1, *chunks)
    fitting = GROWING // work.sizes.page_bytes // unit * unit
    pages = min(work.sizes.pages, max(fitting, unit))
    sizes = work.sizes._replace(pages=pages)
    first = Order(sizes, 1)
    calls: dict[str, Call] = {}
    for name, chunk in names(sizes, chunks).items():
        order = Order(sizes, chunk, first) if chunk > 1 else first
        grown = order.grown()
        assert grown.numel() == 2 * order.pool.numel()
        calls[name] = doubling(order)
    count = few(rounds)
    return {
        "case": "growth",
        "bytes": pages * sizes.page_bytes,
        "rounds": count,
        "orders": figures(interleaved(calls, count)),
    }

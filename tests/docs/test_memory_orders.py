"""The benchmark of memory orders: all orders hold and give the same, and allocators keep order."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from memory_orders import run
from memory_orders.measure import Bench, Workload, growth
from memory_orders.orders import Order, Sizes, blocks
from memory_orders.page_runs import (
    ALLOCATORS,
    Need,
    Pool,
    Shape,
    best_fit,
    lowest_first,
    mean_run,
    roomy,
    spans,
    used,
)

from paged_kv.pages.audit import audit

CHUNKS = (4, 16, 0)


def tiny(dtype: torch.dtype = torch.float32) -> Workload:
    """Three pages a window, in a pool of 192."""
    shape = Shape((3, 5), 5, 2, 2, 192, 2)
    return Workload(Sizes(2, 2, 8, 2, 192, dtype), shape, 2, (2, 3), 3)


@pytest.mark.parametrize("kind", ["fresh", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_orders_give_the_same(kind: str, dtype: torch.dtype) -> None:
    work = tiny(dtype)
    bench = Bench(work, CHUNKS)
    assert list(bench.orders) == ["1", "4", "16", "pool"]
    bench.use(*used(work.shape, "of the package", kind, 300))
    bench.check()
    rows = {row["case"]: row for row in bench.measure(1)}
    assert {"gather", "copy pages", "attend 6, in place", "attend 6, kept"} <= set(rows)
    assert rows["gather"]["orders"]["1"]["ratio"] == 1.0


def test_a_wrong_order_is_found() -> None:
    bench = Bench(tiny(), CHUNKS)
    bench.use(*used(tiny().shape, "of the package", "fresh", 0))
    bench.orders["4"].pool.zero_()
    with pytest.raises(AssertionError, match="chunks of 4: other contents"):
        bench.check()


def test_a_long_run_is_cut_at_chunks_and_merged() -> None:
    sizes = tiny().sizes
    queries = torch.randn(2, 8, 2, 1, 8)
    first = Order(sizes, 1)
    wanted = first.in_place([(3, 30), (40, 1)], queries)
    for chunk in (4, 16, 192):
        found = Order(sizes, chunk, first).in_place([(3, 30), (40, 1)], queries)
        for one, other in zip(wanted, found):
            torch.testing.assert_close(one, other)
    assert [block.pages for block in blocks(3, 30, 4)] == [1, 28, 1]
    assert [block.pages for block in blocks(3, 30, 192)] == [30]


def test_growth_keeps_the_contents() -> None:
    sizes = tiny().sizes
    for chunk in (1, 16, 192):
        order = Order(sizes, chunk)
        before = order.by_page().clone()
        order.pool = order.grown()
        assert torch.equal(order.by_page()[:192], before)
    assert list(growth(tiny(), CHUNKS, 1)["orders"]) == ["1", "4", "16", "pool"]


def test_allocators_choose_as_they_say() -> None:
    free = [2, 3, 5, 9, 10, 11, 12]
    needs = [Need(4, 1), Need(0, 2), Need(20, 1)]
    assert lowest_first(needs, free) == [2, 3, 5, 9]
    assert best_fit(needs, free) == [5, 2, 3, 9]
    assert roomy(needs, free) == [5, 9, 10, 11]
    assert best_fit([Need(0, 6)], free) == [9, 10, 11, 12, 2, 3]
    assert list(spans([4, 5, 6, 1, 3])) == [(4, 3), (1, 1), (3, 1)]
    assert mean_run([(4, 5, 6), (1,)]) == 2.0


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_a_pool_stays_whole_whatever_allocates(allocator: str) -> None:
    for kind in ("random", "searches"):
        pool = Pool(Shape((20, 40), None, 4, 1, 1000, 2), allocator)
        pool.wear(kind, 1500)
        audit(pool.tables.books)
        assert pool.done >= 1500
        assert set(pool.live) == set(pool.tables.books.live())


def test_the_table_and_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All is told and written; Ctrl-C keeps what was measured."""
    out = tmp_path / "orders.json"
    shape = Shape((3, 5), 5, 2, 2, 512, 2)
    monkeypatch.setitem(
        run.WORKLOADS, "small", tiny()._replace(sizes=tiny().sizes._replace(pages=512), shape=shape)
    )
    words = ["run.py", "--only", "small", "--rounds", "1", "--operations", "400"]
    monkeypatch.setattr(sys, "argv", [*words, "--json", str(out)])
    assert run.main() == 0
    found = json.loads(out.read_text())
    assert found["stopped"] is None
    assert found["command"].endswith("run.py --rounds 1 --operations 400 --only small")
    assert {row["pool"] for row in found["times"]} == {"any", *run.POOLS}
    assert {row["allocator"] for row in found["runs"]} == set(ALLOCATORS)
    assert "all orders alike" in capsys.readouterr().out

    def stopped(*_: object) -> Iterator[str]:
        yield "a line"
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure", stopped)
    assert run.main() == 130
    assert json.loads(out.read_text())["stopped"] == "by hand"

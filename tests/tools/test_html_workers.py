"""The page of several workers: rows, cells and cards are those of the recordings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from html_recordings import HOSTILE, charts_of, of_workers

from paged_kv.errors import BadArgument
from paged_kv.recording import Recording, by_worker
from paged_kv.recording.format import header
from paged_kv.tools import cli
from paged_kv.tools.html import workers_page
from paged_kv.tools.html.heat import STRETCHES, Cell, Measure, Named, cells, heat
from paged_kv.tools.html.workers import MOST_WORKERS
from paged_kv.tools.units import count

HELD = Measure("held", "held", count, grows=False)
DONE = Measure("done", "done", count, grows=True)


def named(rows: list[tuple[float, int]], later: float = 0.0, ended: float = 60.0) -> Named:
    samples: list[dict[str, Any]] = [
        {"kind": "sample", "t": t, "held": value, "done": value} for t, value in rows
    ]
    ends = [{"kind": "end", "t": ended, "reason": "done"}]
    return Named("one", Recording(header("one", None), samples=samples, ends=ends), later)


def test_a_cell_has_the_most_that_stood_in_it() -> None:
    """Stretches of a second: a value stands until the next one, and until the end."""
    found = cells(named([(1.2, 5), (1.8, 9), (4.5, 2)], ended=6.5), HELD, 60.0)
    assert found == [Cell(1, 9), Cell(2, 9), Cell(3, 9), Cell(4, 9), Cell(5, 2), Cell(6, 2)]
    later = cells(named([(0.5, 4)], later=30.0, ended=1.5), HELD, 60.0)
    assert later == [Cell(30, 4), Cell(31, 4)]


def test_a_cell_of_a_count_has_what_was_added() -> None:
    found = cells(named([(0.0, 0), (1.5, 4), (1.9, 6), (59.9, 7), (60.0, 9)]), DONE, 60.0)
    assert found == [Cell(0, 0), Cell(1, 6), Cell(STRETCHES - 1, 3)]
    assert sum(cell.value for cell in found) == 9


def test_nothing_but_zeros_is_no_figure() -> None:
    assert heat("x", "x", "x", [named([(0.0, 0), (3.0, 0)])], HELD) is None
    assert heat("x", "x", "x", [], HELD) is None


def test_every_worker_has_a_row_and_all_have_one(tmp_path: Path) -> None:
    recordings = of_workers(tmp_path, 3)
    text = workers_page(recordings)
    assert "<h1>run: 3 workers</h1>" in text
    rows = re.findall(r"<tr><td>([^<]*)</td>", text)
    assert rows == ["worker 0", "worker 1", "worker 2", "all"]
    assert "worker 1: the recording ends early" in text
    specs = charts_of(text)
    assert {"memory-of-workers", "evictions-of-workers", "lookups-of-workers"} <= set(specs)
    drawn = next(iter(specs["lookups-of-workers"]["datasets"].values()))
    for name, each in zip(("worker 0", "worker 1", "worker 2"), by_worker(recordings)):
        last = each.samples[-1]
        bars = {row["k"]: row["y"] for row in drawn if row["n"] == name}
        assert bars == {"hits": last["hits"], "misses": last["queries"] - last["hits"]}
    evicted = sum(each.samples[-1]["evictions"] for each in by_worker(recordings))
    assert f"{count(evicted)} contexts were evicted" in text


def test_many_workers_have_the_largest_drawn(tmp_path: Path) -> None:
    (one,) = of_workers(tmp_path, 1)
    many = []
    for worker in range(MOST_WORKERS + 6):
        first = {**one.header, "labels": {"worker": str(worker)}}
        samples = [{**row, "bytes_peak": row["bytes_peak"] + worker} for row in one.samples]
        many.append(Recording(first, samples=samples, ends=one.ends))
    text = workers_page(many)
    assert f"Charts show {MOST_WORKERS} of {MOST_WORKERS + 6} workers" in text
    rows = next(iter(charts_of(text)["memory-of-workers"]["datasets"].values()))
    assert {row["w"] for row in rows} == {f"worker {place}" for place in range(6, 70)}


def test_odd_recordings_make_a_page(tmp_path: Path) -> None:
    empty = Recording({**header(HOSTILE, None), "labels": {"worker": HOSTILE}})
    assert "0 samples" in workers_page([empty, empty])
    text = workers_page([*of_workers(tmp_path, 2), empty])
    assert "<script>alert" not in text
    with pytest.raises(BadArgument):
        workers_page([])


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    of_workers(tmp_path, 2)
    out = tmp_path / "page.html"
    assert cli.main(["report", str(tmp_path), "--html", str(out)]) == 0
    assert "memory-of-workers" in charts_of(out.read_text(encoding="utf-8"))

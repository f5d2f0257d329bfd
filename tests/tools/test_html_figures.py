"""The charts and cards of the page: they show what was recorded and measured."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from html_recordings import small_search
from hypothesis import given
from hypothesis import strategies as st

from paged_kv.recording import Recording
from paged_kv.tools.html import charts, page
from paged_kv.tools.html.figure import Across, Line, Up, lines
from paged_kv.tools.html.glance import cards
from paged_kv.tools.html.histograms import fill, lives
from paged_kv.tools.html.pagemap import cells_of, page_map
from paged_kv.tools.html.series import MAX_SAMPLES, axis, sources, thinned
from paged_kv.tools.html.style import BIN_LABELS
from paged_kv.tools.html.tree import MAX_TREES, grown, tree
from paged_kv.tools.profile import profile
from paged_kv.tools.profile.workload import ENOUGH_ROOTS

LIMIT = 5_000_000  # bytes of a page

# -- the numbers


def points(spec: dict[str, Any], key: str) -> list[float]:
    """The heights of one line of a chart."""
    return [row["y"] for data in spec["datasets"].values() for row in data if row.get("k") == key]


def test_the_lines_are_those_of_the_recordings(pair: list[Recording]) -> None:
    spec = charts.held(sources(pair), axis(sources(pair)))
    assert spec is not None
    made = spec.spec()
    unit = {"B": 1, "KiB": 1 << 10}[re.search(r"\((\w+)\)", json.dumps(made))[1]]  # type: ignore[index]
    assert points(made, "r0_bytes_in_use") == [
        round(row["bytes_in_use"] / unit, 4) for row in pair[0].samples
    ]
    assert points(made, "r1_bytes_unique") == [
        round(row["bytes_unique"] / unit, 4) for row in pair[1].samples
    ]
    assert spec.title.startswith("another cache peaks at")


@pytest.mark.parametrize(("places", "least"), [([0, 1, 2], 1), ([0, 0.5, 2], None)])
def test_whole_numbers_have_whole_ticks(places: list[float], least: int | None) -> None:
    line = Line("held", "pages", "green", [], [(place, 1.0) for place in places])
    spec = lines([line], Across("simulation"), Up("held", "B")).to_dict()
    axes = [layer["encoding"]["x"]["axis"] for layer in spec["layer"]]
    assert [drawn.get("tickMinStep") for drawn in axes] == [least] * len(axes)


def test_pages_by_references_add_up(pair: list[Recording]) -> None:
    found = sources(pair)
    figure = charts.references(found[1], axis(found))
    assert figure is not None
    rows = next(iter(figure.spec()["datasets"].values()))
    at = Counter[float]()
    for row in rows:
        at[row["x"]] += row["y"]
    page_bytes = pair[1].cache["page_bytes"]
    assert [at[row["simulation"]] * page_bytes for row in pair[1].samples] == [
        row["bytes_in_use"] for row in pair[1].samples
    ]


def test_the_page_map_is_that_of_the_cache(tmp_path: Path) -> None:
    recording, cache = small_search(tmp_path / "one.jsonl")
    source = sources([recording])[0]
    cells = cells_of(source)
    used = [cell for cell in cells if cell["r"]]
    assert len(cells) >= len(used) == 5 // 2 + 1 + 36  # the root's pages, and one a node
    assert sum(cell["f"] for cell in used) == 5 + 2 * 36
    assert {cell["b"] for cell in used} <= set(BIN_LABELS)
    figure = page_map(source)
    slots = fill(source)
    assert figure is not None
    assert slots is not None
    assert figure.title.startswith(f"{len(used)} of {len(cells)} pages in use")
    assert slots.title.startswith("1 of 78 slots are dead")  # the one in front of the root
    assert lives(source) is not None
    cache.check()


def test_a_root_step_is_marked(pair: list[Recording]) -> None:
    assert axis(sources(pair)).breaks == list(range(7, len(pair[0].samples) + 1, 6))


def test_hits_say_whose_they_are(pair: list[Recording]) -> None:
    figure = charts.hits(sources(pair), axis(sources(pair)))
    assert figure is not None
    assert (
        figure.title == "a small search: 87.5 % of lookups hit; another cache: 100 % of lookups hit"
    )


@given(st.lists(st.integers(0, 10**9), max_size=60), st.integers(1, 20))
def test_thinning_keeps_order_and_peak(held: list[int], limit: int) -> None:
    samples = [{"t": float(n), "bytes_in_use": value} for n, value in enumerate(held)]
    kept = thinned(samples, limit)
    assert len(kept) == min(len(samples), limit)
    assert [row["t"] for row in kept] == sorted({row["t"] for row in kept})
    assert max((row["bytes_in_use"] for row in kept), default=0) == max(held, default=0)


def test_a_long_recording_is_thinned_and_says_so(pair: list[Recording]) -> None:
    row = pair[1].samples[-1]
    many = [{**row, "simulation": n, "t": float(n)} for n in range(20_000)]
    made = page([dataclasses.replace(pair[1], samples=many)])
    assert f"{MAX_SAMPLES} of 20,000 samples are drawn" in made
    assert len(made.encode()) < LIMIT


@given(st.lists(st.integers(-3, 40), max_size=40))
def test_trees_are_laid_out_without_overlap(parents: list[int]) -> None:
    """Node i hangs below one before it, or is a root; parents that do not exist make roots, too."""
    known = [None if parent < 0 else parent for parent in parents]
    nodes = [
        {"id": n, "parent": parent + 100 if parent is not None and parent >= n else parent}
        for n, parent in enumerate(known)
    ]
    forest = grown(nodes)
    assert sorted(node["id"] for placed in forest for node, _, _ in placed) == list(
        range(len(nodes))
    )
    assert [len(placed) for placed in forest] == sorted(
        (len(placed) for placed in forest), reverse=True
    )
    for placed in forest:
        assert len({(x, depth) for _, x, depth in placed}) == len(placed)
        at = {node["id"]: (x, depth) for node, x, depth in placed}
        for node, _, depth in placed:
            below = [
                at[child["id"]]
                for child in nodes
                if child["parent"] == node["id"] and child["id"] in at
            ]
            assert all(down == depth + 1 for _, down in below)
            if below:
                assert min(x for x, _ in below) <= at[node["id"]][0] <= max(x for x, _ in below)


def test_the_tree_counts_holders_over_the_whole_forest(tmp_path: Path) -> None:
    recording, _ = small_search(tmp_path / "one.jsonl")
    figure = tree(sources([recording])[0])
    assert figure is not None
    nodes = recording.trees[0]["nodes"]
    holders = Counter(page for node in nodes for page in node["pages"])
    rows = {row["id"]: row for row in next(iter(figure.spec()["datasets"].values()))}
    assert {node["id"]: holders[node["pages"][-1]] for node in nodes} == {
        name: row["h"] for name, row in rows.items()
    }


def test_large_forests_are_cut_and_say_so(tmp_path: Path) -> None:
    recording, _ = small_search(tmp_path / "one.jsonl")
    roots = [{"id": n, "parent": None, "tokens": 1, "pages": [n + 1]} for n in range(3000)]
    chain = [
        {"id": n, "parent": n - 1 if n else None, "tokens": 1, "pages": [1]} for n in range(3000)
    ]
    for nodes, said in ((roots, f"The {MAX_TREES} largest of 3000 trees"), (chain, "")):
        lines = [{"kind": "tree", "t": 0.1, "title": "many", "nodes": nodes}]
        figure = tree(sources([dataclasses.replace(recording, trees=lines)])[0])
        assert figure is not None
        assert said in figure.reading
        assert len(json.dumps(figure.spec())) < 300_000


def test_cards_say_when_something_got_worse(
    profiled: tuple[dict[str, Any], list[Recording]],
) -> None:
    worse = json.loads(json.dumps(profiled[0]))
    worse["workload"]["roots"] = ENOUGH_ROOTS
    old = worse["caches"]["dense"]
    new = worse["caches"]["paged"]
    old["search_us_per_simulation"] = 100.0
    new["search_us_per_simulation"] = 150.0
    worse["fidelity"]["actions_equal"] -= 1
    worse["workload"]["client"] = "lightzero"
    found = {card.label: card for card in cards(worse)}
    assert (found["Search time per simulation"].big, found["Search time per simulation"].mood) == (
        "1.5x slower",
        "bad",
    )
    assert (found["Decisions of the agent"].big, found["Decisions of the agent"].mood) == (
        "they differ",
        "bad",
    )
    assert 'padding="attended"' in found["Decisions of the agent"].note


def test_times_of_few_root_steps_are_not_compared(
    profiled: tuple[dict[str, Any], list[Recording]],
) -> None:
    assert profiled[0]["workload"]["roots"] < ENOUGH_ROOTS
    found = {card.label: card for card in cards(profiled[0])}
    assert (
        found["Search time per simulation"].big
        == found["Cache time per simulation"].big
        == "not compared"
    )
    assert found["Cache kernels per simulation"].mood == "good"


# -- where the data comes from


def test_the_recorded_pass_sees_what_was_measured(
    profiled: tuple[dict[str, Any], list[Recording]],
) -> None:
    result, (dense, paged) = profiled
    assert (dense.title, paged.title) == ("dense cache", "paged")
    assert len(dense.samples) == len(paged.samples) == 4 * 6
    for recording, name in ((dense, "dense"), (paged, "paged")):
        side = result["caches"][name]
        assert max(row["bytes_in_use"] for row in recording.samples) == side["kv_bytes_peak"]
        assert (
            max(row["bytes_unique"] for row in recording.samples) == side["unique_token_bytes_peak"]
        )
        assert [row["simulation"] for row in recording.samples] == list(range(1, 25))
        spent = [row["cache_s"] for row in recording.samples]
        assert spent == sorted(spent)
        assert recording.samples[-1]["queries"] == recording.samples[-1]["hits"] > 0
        assert recording.reason == "done"
    assert [line["title"] for line in paged.trees if line["title"].startswith("root step")] == [
        f"root step {n}" for n in range(1, 5)
    ]
    assert dense.trees == []


@pytest.mark.lightzero
def test_both_caches_of_lightzero_are_recorded() -> None:
    recordings: list[Recording] = []
    result = profile("cartpole", envs=2, simulations=5, roots=2, on_recording=recordings.append)
    theirs, ours = recordings
    assert (theirs.title, ours.title) == ("LightZero's cache", "paged")
    assert (
        max(row["bytes_in_use"] for row in theirs.samples)
        == result["caches"]["dense"]["kv_bytes_peak"]
    )
    assert (
        max(row["bytes_in_use"] for row in ours.samples)
        == result["caches"]["paged"]["kv_bytes_peak"]
    )
    roots = [node for node in ours.trees[-1]["nodes"] if node["parent"] is None]
    assert len(roots) >= 2
    assert "LightZero&#39;s cache peaks at" in page(recordings, result)

"""Recorded searches on simulated workers: nothing is lost, and the page says what was found."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "benchmarks"))

import ray_replay  # noqa: E402
import ray_searches  # noqa: E402
from ray_replay import BOUNDED, HASH, POOL, WAYS, Case, Material, World  # noqa: E402

SEARCHES = json.loads((RESULTS / "ray_searches.json").read_text())["searches"]
FOUND = json.loads((RESULTS / "ray_replay.json").read_text())
KINDS = (ray_searches.WORLD, ray_searches.LANGUAGE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_every_tree_lives_somewhere_and_does_what_was_recorded(kind: str, way: str) -> None:
    found = ray_replay.material(SEARCHES, kind)
    world = World(Case(5, 4, 1.1, way), found, seed=3)
    for _ in range(40):
        world.turn()
        assert world.trees().sum() == 5 * 4
        assert world.rows().sum() == found.rows[world.searches(), world.ages()].sum()
        assert world.held().sum() == found.bytes[world.searches(), world.ages()].sum()
        assert (world.ages() < found.rounds[world.searches()]).all()
        assert world.homes() == world.placed()
    assert (world.traffic.moves > 0) == (way == POOL)
    assert world.traffic.evicted_bytes > 0


def test_where_all_fits_nothing_moves() -> None:
    found = ray_replay.material(SEARCHES, ray_searches.WORLD)
    ways = [ray_replay.replayed(Case(4, 3, 9.0, way), found, 20, 1) for way in WAYS]
    for figures in ways:
        assert figures["moved_of_written"] == figures["evicted_of_written"] == 0
    _, bounded, pool = ({**figures, "way": None} for figures in ways)
    assert bounded == pool


def test_figures_by_hand() -> None:
    """Trees of one round, one row and ten bytes each: what is uneven is their number alone."""
    ones = np.ones((1, 1), dtype=np.int64)
    found = Material(ones, 10 * ones, np.array([1]))
    for way in (HASH, BOUNDED):
        figures = ray_replay.replayed(Case(4, 25, 2.0, way), found, 5, 0)
        assert figures["trees_over_mean"] == figures["rows_over_mean"] == figures["held_over_mean"]
    assert figures["trees_over_mean"] <= 1.1


def told(kind: str, workers: int, trees: int, room: float) -> str:
    """The cells of a row of the page."""
    rows = {
        (row["kind"], row["workers"], row["trees"], row["room"], row["way"]): row
        for row in FOUND["rows"]
    }
    sides = [rows[f"{kind} model", workers, trees, room, way] for way in WAYS]
    cells = [f"{side['rows_over_mean']:.2f}" for side in sides]
    cells += [f"{100 * side['evicted_of_written']:.1f}" for side in sides]
    cells.append(f"{100 * sides[2]['moved_of_written']:.1f}")
    cells.append(f"{1000 * sides[2]['moves_per_worker_and_round']:.0f}")
    return " | ".join(cells)


def test_the_page_says_what_was_found() -> None:
    page = (ROOT / "docs" / "ray.md").read_text()
    by_workers = re.findall(r"^\| (\w+) model \| ([\d,]+) \| (.*) \|$", page, re.MULTILINE)
    by_trees = re.findall(r"^\| (\w+) \| (\d+) \| (1\.\d+) \| (.*) \|$", page, re.MULTILINE)
    assert len(by_workers) == len(by_trees) == 8
    for kind, workers, cells in by_workers:
        assert cells == told(kind, int(workers.replace(",", "")), 8, 1.25)
    for kind, trees, room, cells in by_trees:
        assert cells == told(kind, 100, int(trees), float(room))


def test_the_searches_are_those_of_recordings(tmp_path: Path) -> None:
    """The world model again: rows and pages come out the same."""
    again = ray_searches.world_searches(tmp_path, steps=ray_searches.ROOT_STEPS[:1])
    recording = ray_searches.read_recording(again[0])
    (kept,) = (each for each in SEARCHES if each["name"] == "world-0")
    assert [list(each) for each in ray_searches.rounds(recording)] == kept["rounds"]

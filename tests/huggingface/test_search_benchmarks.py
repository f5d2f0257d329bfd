"""The benchmark of solved games runs, and the page says what the results say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_folder import saved

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import search_solves  # noqa: E402
import search_table  # noqa: E402
from search_solves import compared, wilson, within  # noqa: E402


def test_games_are_searched_and_counted(tmp_path: Path) -> None:
    folder = saved(tmp_path / "tiny", max_position_embeddings=2048)
    out = tmp_path / "solves.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "search_solves.py")]
    sizes = ["--games", "2", "--simulations", "2", "--width", "3"]
    run = [*command, "--model", str(folder), *sizes, "--json", str(out)]
    subprocess.run(run, check=True, capture_output=True, cwd=ROOT)
    result = json.loads(out.read_text())
    assert result["workload"]["games"] == 2
    assert result["greedy"]["solved"] == 0
    assert list(result["methods"]) == ["mcts", "best-of-n"]
    for found in result["methods"].values():
        assert sum(found["beside_greedy"].values()) == 2
        assert list(found["solved_within_children"]) == ["3", "6"]


def measured(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> Any:
    """What the benchmark leaves in out.json."""
    out = folder / "out.json"
    sizes = ["--simulations", "1", "--width", "2", "--json", str(out)]
    model = ["--model", str(folder / "tiny")]
    monkeypatch.setattr(sys, "argv", ["search_solves.py", *model, *sizes, *arguments])
    search_solves.main()
    return json.loads(out.read_text())


def test_what_was_searched_is_not_searched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "tiny", max_position_embeddings=2048)
    monkeypatch.setattr(search_solves, "GROUP", 1)
    whole = measured(monkeypatch, tmp_path, "--games", "3")
    measured(monkeypatch, tmp_path, "--games", "2")
    searched: list[int] = []
    inner = search_solves.Bench.greedy

    def greedy(bench: Any, games: Any, seed: int) -> Any:
        searched.append(seed)
        return inner(bench, games, seed)

    monkeypatch.setattr(search_solves.Bench, "greedy", greedy)
    assert measured(monkeypatch, tmp_path, "--games", "3", "--resume") == whole
    assert searched == [2]
    with pytest.raises(SystemExit, match="cannot go on"):
        measured(monkeypatch, tmp_path, "--games", "4", "--resume", "--methods", "beam")


def test_intervals() -> None:
    half = wilson(50, 100)
    assert (half.share, half.low, half.high) == pytest.approx((0.5, 0.4038, 0.5962), abs=1e-4)
    none = wilson(0, 10)
    assert (none.low, none.high) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(0, 0).high == pytest.approx(0.79, abs=0.01)  # nothing is known


def test_counts() -> None:
    assert within([3, None, 8, 9], 8) == 2
    assert compared([True, False, True], [True, True, False]) == {
        "both": 1,
        "greedy_alone": 1,
        "search_alone": 1,
        "neither": 0,
    }


def test_the_page_shows_what_was_measured() -> None:
    page = search_table.PAGE.read_text()
    shown = page.partition(search_table.BEGIN)[2].partition(search_table.END)[0]
    assert shown.strip() == search_table.text()

"""The arithmetic of `benchmarks/against.py`, which says whether a checkout kept its speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "against.py"
sys.path.insert(0, str(BENCHMARKS))

import against  # noqa: E402
import against_rows  # noqa: E402

STEADY = [0.98, 1.0, 1.02, 0.99, 1.01, 1.0, 0.97, 1.03, 1.0, 1.01]


def row_of(ratios: list[float]) -> against_rows.Row:
    """The row of pairs with these ratios."""
    return against_rows.row("figure", [against_rows.Pair(20.0, 20.0 * ratio) for ratio in ratios])


def scaled(factor: float) -> list[float]:
    """The steady ratios of a checkout that is so much slower."""
    return [factor * ratio for ratio in STEADY]


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        (STEADY, "kept"),
        (scaled(0.5), "kept"),
        (scaled(1.05), "kept"),
        (scaled(1.10), "unclear"),
        (scaled(1.3), "lost"),
        ([1.0, 2.0] * 5, "unclear"),
        ([1.0] * 5, "too few"),
        ([1.3] * 5, "too few"),
        ([1.10] * 6, "kept"),
        ([1.11] * 6, "lost"),
    ],
)
def test_verdicts(ratios: list[float], verdict: str) -> None:
    assert row_of(ratios).verdict == verdict


def test_a_row_has_medians_of_both_sides_and_of_the_ratios() -> None:
    times = [(10.0, 11.0), (20.0, 20.0), (40.0, 36.0), (10.0, 12.0), (20.0, 21.0), (30.0, 30.0)]
    row = against_rows.row("figure", [against_rows.Pair(*pair) for pair in times])
    assert row.pairs == 6
    assert (row.old, row.new) == (20.0, 20.5)
    assert row.ratios == [1.1, 1.0, 0.9, 1.2, 1.05, 1.0]
    assert row.ratio == pytest.approx(1.05**0.5)  # the middle of 1 and 1.05, as logarithms
    assert 0.9 <= row.low < row.ratio < row.high <= 1.2


def test_equal_ratios_leave_no_doubt() -> None:
    low, high = against_rows.interval([1.25] * 8)
    assert low == pytest.approx(1.25)
    assert high == pytest.approx(1.25)


def test_the_interval_does_not_depend_on_which_side_is_new() -> None:
    there = against_rows.interval(STEADY)
    back = against_rows.interval([1 / ratio for ratio in STEADY])
    assert there.high == pytest.approx(1 / back.low, rel=0.01)
    assert there == against_rows.interval(STEADY)  # and is the same each time


def test_a_disturbed_round_moves_it_little() -> None:
    calm = against_rows.interval(STEADY)
    disturbed = against_rows.interval([*STEADY[:-1], 5.0])
    assert disturbed.high < calm.high + 0.03


def test_too_few_pairs_show_no_interval() -> None:
    row = row_of([1.0])
    assert row.high is None
    text = against_rows.table([row, row_of(scaled(1.3))]).splitlines()
    assert len(text) == 3
    assert text[1].split() == ["figure", "1", "20.00", "20.00", "1.000", "-", "too", "few"]
    assert text[2].endswith("lost")


def test_figures_of_each_part() -> None:
    line = {"live_sequences": 1000, "parents": "near", "step_us": 2.0, "verbs_us": 3.0}
    told = {"results": [line]}
    assert against.READERS["control_plane"]("control_plane", told) == {
        "control_plane step, 1,000 live, near": 2.0,
        "control_plane verbs, 1,000 live, near": 3.0,
    }
    told = {"results": [{"workload": "llm", "staging": {"staging": 4.0, "copy": 5.0}}]}
    assert against.READERS["data_plane"]("data_plane", told) == {"data_plane staging, llm": 4.0}
    paged = {"cache_us_per_simulation": 6.0, "search_us_per_simulation": 7.0}
    told = {"caches": {"paged": paged}}
    assert against.READERS["atari"]("atari", told) == {"atari cache": 6.0, "atari search": 7.0}


def checkout(path: Path, step_us: float) -> Path:
    """What the script needs of a checkout, with a control plane that takes so long."""
    (path / "paged_kv").mkdir(parents=True)
    (path / "paged_kv" / "__init__.py").write_text("")
    (path / "benchmarks").mkdir()
    for name in ("against.py", "against_rows.py", "machine.py"):
        (path / "benchmarks" / name).write_text((BENCHMARKS / name).read_text())
    line = {"live_sequences": 1, "parents": "any", "step_us": step_us, "verbs_us": 1.0}
    (path / "benchmarks" / "control_plane.py").write_text(
        "import json, pathlib, sys\n"
        f"pathlib.Path(sys.argv[-1]).write_text(json.dumps({{'results': [{line!r}]}}))\n"
    )
    return path


def compare(new: Path, old: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Six rounds of the control plane alone."""
    command = [sys.executable, str(new / "benchmarks" / "against.py"), str(old), "--rounds", "6"]
    command += ["--only", "control_plane", "--json", str(out)]
    return subprocess.run(command, capture_output=True, text=True)


def test_two_checkouts(tmp_path: Path) -> None:
    new = checkout(tmp_path / "new", 3.0)
    old = checkout(tmp_path / "old", 2.0)
    done = compare(new, old, tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 6
    told = json.loads((tmp_path / "out.json").read_text())
    assert [line["verdict"] for line in told["rows"]] == ["lost", "kept"]
    assert told["rows"][0]["ratio"] == pytest.approx(1.5)
    assert told["stopped"] is None
    assert told["command"].endswith("CHECKOUT --rounds 6 --only control_plane")
    assert str(tmp_path) not in json.dumps(told)


def test_a_run_that_fails_says_so(tmp_path: Path) -> None:
    new = checkout(tmp_path / "new", 3.0)
    old = checkout(tmp_path / "old", 2.0)
    (new / "paged_kv" / "__init__.py").write_text("raise ValueError('broken')\n")
    done = compare(new, old, tmp_path / "out.json")
    assert done.returncode == 1
    assert "control_plane failed in the new checkout" in done.stderr
    assert "ValueError: broken" in done.stderr


def test_the_package_of_another_place_is_refused(tmp_path: Path) -> None:
    old = checkout(tmp_path / "old", 2.0)
    script = str(SCRIPT)
    command = [sys.executable, script, against.INSIDE, str(old), "control_plane"]
    environment = os.environ | {"PYTHONPATH": str(checkout(tmp_path / "elsewhere", 2.0))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert f"which is not in {old}" in done.stderr

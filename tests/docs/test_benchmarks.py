"""The benchmark scripts run, and the results table says what the JSON says."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

SIDE = {
    "kv_bytes_peak": 2 << 20,
    "kv_bytes_end": 1_000,
    "unique_token_bytes_peak": 900,
    "working_bytes_peak": 512,
    "tensor_kernels_per_simulation": 3.0,
    "host_copies_per_simulation": 1.0,
    "cache_us_per_simulation": 1234.5,
    "search_us_per_simulation": 5678.9,
    "lookups": 10,
    "hits": 9,
    "misses": 1,
}
RESULT: dict[str, Any] = {
    "schema": 2,
    "machine": {"processor": "abacus", "cores": 2, "accelerator": None},
    "workload": {
        "preset": "cartpole",
        "client": "lightzero",
        "client_version": "0.2.0",
        "envs": 8,
        "simulations": 25,
        "roots": 40,
        "layers": 2,
        "context_length": 8,
        "seed": 0,
        "threads": 1,
        "at": "read",
        "keys": "node",
        "padding": "attended",
        "window": "cached",
    },
    "caches": {
        "dense": SIDE,
        "paged": {**SIDE, "kv_bytes_peak": 500, "sharing_ratio_peak": 4.25},
    },
    "ratios": {
        "kv_bytes_peak": 40.0,
        "kv_bytes_over_unique": 1.03,
        "tensor_kernels": 33.0,
        "cache_time": 9.0,
        "search_time": 1.2,
    },
    "fidelity": {
        "actions_compared": 320,
        "actions_equal": 320,
        "visit_counts_equal": True,
        "max_abs_value_difference": 1e-6,
    },
}


def run(script: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """A benchmark script in a process of its own."""
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=check)


def test_attention(tmp_path: Path) -> None:
    out = tmp_path / "attention.json"
    text = run("attention.py", "--rounds", "1", "--only", "UniZero", "--json", str(out)).stdout
    found = json.loads(out.read_text())
    assert found["processor"]
    assert len(found["cases"]) == 2
    for case in found["cases"]:
        assert case["case"] in text
        assert case["most_difference"] < 1e-5
        assert case["dense_over"]["dense"] == 1
        assert case["milliseconds"]["tree"] > 0


def test_control_plane(tmp_path: Path) -> None:
    out = tmp_path / "control.json"
    text = run(
        "control_plane.py", "--live", "50", "100", "--rounds", "3", "--json", str(out)
    ).stdout
    results = json.loads(out.read_text())["results"]
    assert [row["live_sequences"] for row in results] == [50, 50, 100, 100]
    assert all(row["step_us"] > 0 and row["floor_us"] > 0 for row in results)
    assert len(text.splitlines()) == 5


SOAK = """
import soak
trials = [soak.Trial(scenario) for scenario in soak.SCENARIOS if scenario.name == "append"]
made = soak.Soak(seed=0)
made.finalizers(20)
made.places(trials, 200)
made.releases(trials, 50)
made.faults(trials)
made.walks(3)
print(made.table())
print(made.broken, all(part.done > 0 for part in made.parts))
"""


def test_soak() -> None:
    """A little of it, on one scenario: it is meant to run for long."""
    done = subprocess.run(
        [sys.executable, "-c", SOAK], cwd=BENCHMARKS, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == [
        "finalizers",
        "places",
        "releases",
        "faults",
        "walks",
    ]
    assert lines[-1] == "0 True"


def test_snapshot(tmp_path: Path) -> None:
    target = tmp_path / "snapshot.json"
    where = ("--folder", str(tmp_path), "--mib", "4", "--rounds", "1", "--sequences", "200")
    run("snapshot.py", *where, "--json", str(target))
    results = json.loads(target.read_text())
    assert [found["shape"] for found in results["runs"]] == ["llm", "unizero"]
    for found in results["runs"]:
        assert found["bytes"] <= 4 << 20
        assert all(found[what]["ratio"] > 0 for what in ("save", "save and sync", "load"))
    for bundle in results["bundles"].values():
        assert bundle["records_over_pages"] == 1.0
    assert [found["sequences"] for found in results["opened"]] == [200, 200]


def test_snapshot_faults(tmp_path: Path) -> None:
    target = tmp_path / "faults.json"
    counts = ("--kills", "2", "--damage", "50", "--samples", "1")
    run("snapshot_faults.py", *counts, "--json", str(target))
    results = json.loads(target.read_text())
    assert (results["kills"]["kills"], results["kills"]["lost"]) == (2, 0)
    assert (results["damage"]["folders"], results["damage"]["unnoticed"]) == (50, 0)
    assert results["crashes"]["states"] > 100
    assert results["crashes"]["wrong"] == 0


def test_exhaustive(tmp_path: Path) -> None:
    target = tmp_path / "exhaustive.json"
    run("exhaustive.py", "--depth", "2", "--json", str(target))
    result = json.loads(target.read_text())
    assert [level["states"] for level in result["levels"]] == [3, 22]
    assert result["states"] == 26  # the empty cache, too
    assert result["transitions"] == sum(level["transitions"] for level in result["levels"])


@pytest.mark.parametrize("many", [False, True])
def test_results_table(tmp_path: Path, many: bool) -> None:
    source = tmp_path / "profile.json"
    other = copy.deepcopy(RESULT)
    other["workload"]["preset"] = "long"
    source.write_text(json.dumps([RESULT, other] if many else RESULT))
    text = run("results_table.py", str(source)).stdout
    assert "| cartpole | 40x | 1.03x | 33x | 9x | 1.2x |" in text
    assert "| KV bytes held, peak | 2.0 MiB | 500 B | 40x |" in text
    options = 'with `at="read", keys="node", padding="attended", window="cached"`.'
    assert f"actions equal 320 of 320; visit counts equal; values within 1e-06 {options}" in text
    assert ("| long |" in text) == many
    cases = 640 if many else 320
    assert (
        f"Both sides took the same action in {cases} of {cases} cases, and all visit counts were "
        f"equal {options} So both see the zeros in front of shorter windows; with `masked`" in text
    )


def test_results_that_differ_say_so(tmp_path: Path) -> None:
    source = tmp_path / "profile.json"
    other = copy.deepcopy(RESULT)
    other["fidelity"].update(actions_equal=319, visit_counts_equal=False)
    source.write_text(json.dumps([RESULT, other]))
    text = run("results_table.py", str(source)).stdout
    found = "Both sides took the same action in 639 of 640 cases, and visit counts differed"
    assert f"{found} with `at=" in text
    other["workload"].update(padding="masked", window="exact")
    source.write_text(json.dumps([RESULT, other]))
    text = run("results_table.py", str(source)).stdout
    assert f"{found}.\n" in text, "no one set of options holds for both"
    source.write_text(json.dumps(other))
    text = run("results_table.py", str(source)).stdout
    assert 'with `at="read", keys="node", padding="masked", window="exact"`.\n' in text


def pages(root: Path) -> tuple[Path, Path]:
    """Both pages that show results, with marks and an old table."""
    (root / "docs").mkdir()
    made = root / "README.md", root / "docs" / "benchmarks_lightzero.md"
    for page in made:
        page.write_text("before\n<!-- results: how -->\nold\n<!-- end of results -->\nafter\n")
    return made


def test_the_tables_go_between_the_marks(tmp_path: Path) -> None:
    source = tmp_path / "profile.json"
    readme, details = pages(tmp_path)
    source.write_text(json.dumps(RESULT))
    for _ in range(2):  # writing twice changes nothing more
        run("results_table.py", str(source), "--write", "--root", str(tmp_path))
        for page in (readme, details):
            lines = page.read_text().splitlines()
            assert lines[:2] == ["before", "<!-- results: how -->"]
            assert lines[-2:] == ["<!-- end of results -->", "after"]
            assert "old" not in lines
            assert sum("| cartpole |" in line for line in lines) == 1
            assert ("| KV bytes held, peak | 2.0 MiB | 500 B | 40x |" in lines) == (page == details)


@pytest.mark.parametrize("which", [0, 1])
def test_a_page_without_marks_leaves_both_alone(which: int, tmp_path: Path) -> None:
    source = tmp_path / "profile.json"
    both = pages(tmp_path)
    source.write_text(json.dumps(RESULT))
    both[which].write_text("no marks\n")
    before = [page.read_text() for page in both]
    done = run("results_table.py", str(source), "--write", "--root", str(tmp_path), check=False)
    assert done.returncode == 1
    assert f"{both[which]}: found no lines" in done.stderr
    assert [page.read_text() for page in both] == before


def test_the_pages_show_what_was_measured(tmp_path: Path) -> None:
    """The committed pages are what the committed numbers give."""
    root = BENCHMARKS.parent
    (tmp_path / "docs").mkdir()
    names = "README.md", "docs/benchmarks_lightzero.md"
    for name in names:
        (tmp_path / name).write_text((root / name).read_text())
    run("results_table.py", "--write", "--root", str(tmp_path))
    for name in names:
        assert (tmp_path / name).read_text() == (root / name).read_text(), (
            "run: benchmarks/results_table.py --write"
        )


@pytest.mark.lightzero
def test_window_exactness(tmp_path: Path) -> None:
    out = tmp_path / "window.json"
    run(
        "window_exactness.py",
        "--contexts",
        "8",
        "--slides",
        "0",
        "1",
        "--seeds",
        "1",
        "--rounds",
        "1",
        "--json",
        str(out),
    )
    found = json.loads(out.read_text())
    rows = {(row["mode"], row["slides"]): row for row in found["differences"]}
    parts = ("K0", "V0", "K1", "V1", "next latent", "policy", "value")
    # rounding only, before any slide
    assert all(rows[mode, 0][part] < 1e-5 for mode, _ in rows for part in parts)
    # layer 0 has seen nothing but the token
    assert rows["rotary", 1]["K0"] == rows["rotary", 1]["V0"] == 0
    assert rows["learned, no norm", 1]["K0"] < 1e-5 < rows["learned, read", 1]["K0"]
    assert all((rows[mode, 1]["K1"] > 1e-4) != mode.endswith("exact") for mode, _ in rows)
    assert all(
        rows[mode, 1][part] < 1e-5 for mode, _ in rows if mode.endswith("exact") for part in parts
    )
    assert [row["mode"] for row in found["costs"]] == ["learned, read", "learned, write", "rotary"]


def test_data_plane(tmp_path: Path) -> None:
    out = tmp_path / "data_plane.json"
    run("data_plane.py", "--rounds", "1", "--json", str(out))
    for found in json.loads(out.read_text())["results"]:
        assert all(spent > 0 for spent in found["orders_us"].values())
        assert found["staging_over_copy"] > 0


@pytest.mark.lightzero
def test_lean_fidelity(tmp_path: Path) -> None:
    out = tmp_path / "fidelity.json"
    run("lean_fidelity.py", "--presets", "cartpole", "--actions", "8", "--json", str(out))
    found = json.loads(out.read_text())["presets"]["cartpole"]
    assert found["actions_compared"] == 8 * 5  # four root steps fill the windows
    assert found["agreement"]["lean"]["actions_different"] == 0
    assert found["agreement"]["lean"]["visit_counts_different"] == 0
    assert found["agreement"]["lean"]["values_apart"] <= 1e-5
    assert found["search_us_per_simulation"].keys() == {"lightzero", "lean"}


@pytest.mark.lightzero
def test_train_both(tmp_path: Path) -> None:
    out = tmp_path / "both.json"
    picture = tmp_path / "both.svg"
    run("train_both.py", "--steps", "150", "--json", str(out), "--svg", str(picture))
    found = json.loads(out.read_text())
    assert [side["cache"] for side in found["sides"]] == ["lightzero", "paged"]
    assert all(side["env_steps"] >= 150 for side in found["sides"])
    assert found["same_actions_and_returns"]["to_the_end_of_the_shorter"]
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")


@pytest.mark.lightzero
def test_recording_cost(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    text = run("recording_cost.py", "--roots", "3", "--json", str(out)).stdout
    found = json.loads(out.read_text())["results"]
    for clock in ("wall", "cpu"):
        assert f"recorded / plain {found[clock]['ratio']:.4f}" in text
    assert found["recording"]["samples"] >= 2


@pytest.mark.lightzero
def test_bounded(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    text = run("bounded.py", "--only", "cartpole", "--roots", "1", "--json", str(out)).stdout
    rows = json.loads(out.read_text())["rows"]
    assert [row["order"] for row in rows] == ["search", "lru", "fifo"]
    for row in rows:
        assert row["same"] == row["root_steps"] == 5
        assert row["computed_again"] > 0
        assert f"{row['pages']} of {row['pages_without_limit']}" in text


@pytest.mark.lightzero
def test_eviction(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    sizes = ["--workloads", "cartpole", "reference", "--searches", "2"]
    text = run("eviction.py", *sizes, "--tune", "--json", str(out)).stdout
    found = json.loads(out.read_text())
    assert [each["weight"] for each in found["tuned"]] == sorted(
        {0, 1, found["weight"]} | {each["weight"] for each in found["tuned"]}
    )
    rows = {(row["workload"], row["share"]): row for row in found["results"]}
    assert rows["cartpole", "1/8"]["too_large"] == 1
    for (workload, share), row in rows.items():
        again = row["recomputed"]
        line = f"| {workload} | {share} | {row['tokens']:,} | {again['lru']:,} | "
        assert (line in text) == (row["searches"] == 1)
        assert all(0 <= again["bound"] <= tokens for tokens in again.values())
    for workload in ("cartpole", "reference"):
        assert rows[workload, "1/4"]["recomputed"]["search"] > 0
        for order in ("lru", "search"):
            tokens = [rows[workload, share]["recomputed"][order] for share in ("1/2", "1/3", "1/4")]
            assert tokens == sorted(tokens)


def test_the_page_has_the_tokens_that_were_recomputed() -> None:
    """The committed table is of the committed numbers."""
    found = json.loads((BENCHMARKS / "results" / "eviction.json").read_text())
    page = (BENCHMARKS.parent / "docs" / "benchmarks_lightzero.md").read_text()
    for row in found["results"]:
        counts = [row["recomputed"][name] for name in ("lru", "search", "offline", "bound")]
        numbers = " | ".join(f"{count:,}" for count in (row["tokens"], *counts))
        if row["searches"]:
            assert f"| {row['workload']} | {row['share']} | {numbers} | " in page
    for each in found["tuned"]:
        assert f"| {each['weight']:g} | " in page
        assert f" | {each['mean']:.3f}x |" in page

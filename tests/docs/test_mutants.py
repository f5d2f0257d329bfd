"""What is kept of a run of mutmut, and that the figures shown are those of the file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import mutants  # noqa: E402
from mutants import Mutant, faults, merged, place, put_into, report, statuses, table  # noqa: E402

LISTING = """
    paged_kv.pages.tree.xǁTreeǁend__mutmut_1: killed
    paged_kv.pages.tree.xǁTreeǁend__mutmut_2: survived
    paged_kv.pages.tree.xǁTreeǁend__mutmut_10: timeout
    paged_kv.entries.x_look_up__mutmut_1: no tests
    paged_kv.index.xǁCacheIndexǁget__mutmut_1: not checked
"""
END = "paged_kv.pages.tree.xǁTreeǁend__mutmut_"
LOOK_UP = "paged_kv.entries.x_look_up__mutmut_1"
DIFF = """# paged_kv.entries.x_look_up__mutmut_1: no tests
--- paged_kv/entries.py
+++ paged_kv/entries.py
@@ -1,3 +1,3 @@
 def look_up():
-    if a:
+    if not a:
         return
"""
LEFT = Mutant("entries", "look_up", "if a:", "if not a:")
ALSO = Mutant("pages.tree", "Tree.end", "if a:", "if not a:")
OLD = {"module": "index", "function": "f", "line": "a", "becomes": "b", "because": "as it was"}
BEFORE: dict[str, Any] = {
    "modules": {
        "index": {"mutants": 4, "killed": 3, "left": 1, "not_tried": 0},
        "entries": {"mutants": 9, "killed": 9, "left": 0, "not_tried": 0},
    },
    "left": [OLD],
}


def reported(**reasons: str) -> dict[str, Any]:
    """What is kept of the listing above, with reasons by module."""
    known = {each: reasons[each.function] for each in (LEFT, ALSO) if each.function in reasons}
    return report(statuses(LISTING), lambda name: DIFF, known, BEFORE)


def test_a_listing_is_read_and_the_best_of_runs_counts() -> None:
    first = statuses(LISTING)
    assert first[LOOK_UP] == "no tests"
    assert list(first.values()) == ["killed", "survived", "timeout", "no tests", "not checked"]
    second = {**dict.fromkeys(first, "not checked"), f"{END}2": "killed", f"{END}1": "survived"}
    third = {LOOK_UP: "survived", "paged_kv.index.xǁCacheIndexǁget__mutmut_1": "survived"}
    for runs in ([first, second, third], [third, second, first]):
        best = merged(runs)
        assert best[f"{END}1"] == best[f"{END}2"] == "killed"
        assert best[f"{END}10"] == "timeout"
        assert best["paged_kv.index.xǁCacheIndexǁget__mutmut_1"] == "survived"


def test_a_mutant_has_the_name_that_readers_know() -> None:
    assert place(f"{END}10") == ("pages.tree", "Tree.end")
    assert place(LOOK_UP) == ("entries", "look_up")
    assert place("paged_kv.pages.handles.x__after_fork__mutmut_2") == (
        "pages.handles",
        "_after_fork",
    )


def test_modules_that_were_not_tried_stay_as_they_were() -> None:
    result = reported(look_up="cost")
    assert result["modules"] == {
        "index": BEFORE["modules"]["index"],
        "entries": {"mutants": 1, "killed": 0, "left": 1, "not_tried": 0},
        "pages.tree": {"mutants": 3, "killed": 2, "left": 1, "not_tried": 0},
    }
    assert [row["module"] for row in result["left"]] == ["entries", "index", "pages.tree"]
    assert [row["because"] for row in result["left"]] == ["cost", "as it was", ""]


def test_what_must_not_be_is_named() -> None:
    result = reported(look_up="cost")
    known = {LEFT: "cost", Mutant("index", "f", "a", "b"): "as it was"}
    assert faults(result, known) == [f"no reason: {ALSO}"]
    result = report(statuses(LISTING), lambda name: DIFF, {**known, ALSO: "equal"}, BEFORE)
    assert faults(result, {**known, ALSO: "equal"}) == []
    gone = Mutant("entries", "look_up", "if b:", "if not b:")
    assert faults(result, {gone: "equal"}) == [f"a reason for nothing: {gone}"]
    partly = {f"{END}1": "killed", f"{END}2": "not checked"}
    result = report(partly, lambda name: DIFF, {}, {})
    assert faults(result, {}) == ["1 of pages.tree were not tried"]


def test_the_table_says_what_the_file_says() -> None:
    shown = table(reported())
    assert "| `pages/tree.py` | 3 | 66.7 % | 1 |" in shown
    assert "| all | 8 | 62.5 % | 3 |" in shown
    page = f"before\n{mutants.START}old\n{mutants.END}\nafter\n"
    assert put_into(page, shown) == page.replace("old\n", shown)
    kept = json.loads((BENCHMARKS / "results" / "mutants.json").read_text())
    text = mutants.PAGE.read_text()
    assert put_into(text, table(kept)) == text


def test_every_mutant_that_is_left_has_its_reason_and_no_reason_is_idle() -> None:
    kept = json.loads((BENCHMARKS / "results" / "mutants.json").read_text())
    reasons = mutants.read_reasons(mutants.REASONS)
    assert faults(kept, reasons) == []
    for row in kept["left"]:
        mutant = Mutant(*[row[field] for field in Mutant._fields])
        assert reasons[mutant] == row["because"]
    for module, numbers in kept["modules"].items():
        assert numbers["killed"] + numbers["left"] == numbers["mutants"]
        assert numbers["killed"] >= 0.95 * numbers["mutants"], module


@pytest.mark.parametrize("reason", ["", "equal: both are false"])
def test_the_command_fails_where_a_reason_is_missing(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = f"    {LOOK_UP}: survived\n"
    monkeypatch.setattr(
        mutants, "mutmut", lambda folder, verb, *rest: listing if verb == "results" else DIFF
    )
    reasons = tmp_path / "reasons.json"
    reasons.write_text(json.dumps([{**LEFT._asdict(), "because": reason}] if reason else []))
    target = tmp_path / "mutants.json"
    monkeypatch.setattr(
        sys, "argv", ["mutants.py", "--json", str(target), "--reasons", str(reasons)]
    )
    assert mutants.main() == int(not reason)
    (left,) = json.loads(target.read_text())["left"]
    assert left == {**LEFT._asdict(), "because": reason}

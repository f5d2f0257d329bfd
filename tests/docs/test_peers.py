"""The benchmark against other libraries drives every peer rightly: contents are read back against
dense copies.

Libraries that are not installed here are left to the benchmark itself, which checks them before it
times them.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from peers import measure, run, table  # noqa: E402
from peers.catalog import ROWS, Row, row  # noqa: E402
from peers.checks import WrongContents, check_contents, check_tables  # noqa: E402
from peers.workload import TINY, TINY_LONG, script  # noqa: E402

HERE = ("paged_kv", "python floor", "numpy floor", "torch PagedAttention")
WORKS = [replace(TINY, simulations=6), TINY_LONG]


def peer(name: str) -> Row:
    """A row of the tables."""
    return row(next(entry for entry in ROWS if entry.name == name))


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.name)
@pytest.mark.parametrize(
    "name", [*HERE, pytest.param("LightZero deep copy", marks=pytest.mark.lightzero)]
)
def test_what_a_peer_keeps_is_what_it_was_given(name: str, work: Any) -> None:
    found = peer(name)
    assert not found.missing
    if found.tables and not found.tables.copies:
        assert check_tables(found.tables, work) > 20
    if found.contents:
        assert check_contents(found.contents, work) > 20


@pytest.mark.parametrize("name", ["vLLM BlockPool", "HF paged cache", "HF DynamicCache, deep copy"])
def test_a_library_that_is_not_there_is_a_line_in_the_table(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = next(entry.module for entry in ROWS if entry.name == name)
    monkeypatch.delitem(sys.modules, f"peers.{module}", raising=False)
    for library in ("vllm", "transformers"):
        monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    found = peer(name)
    assert (found.tables, found.contents) == (None, None)
    assert "not installed" in found.missing


def test_a_peer_that_loses_tokens_is_not_timed() -> None:
    found = peer("paged_kv")
    assert found.tables
    assert found.contents

    class Forgetful(found.contents):  # type: ignore[name-defined, misc]
        def step(self, parents: Any, tokens: Any, new: int, queries: Any = None) -> Any:
            return super().step(parents[::-1], tokens, new, queries)[::-1]

    class Crossed(found.tables):  # type: ignore[name-defined, misc]
        def placed(self) -> Any:
            slots, copies = super().placed()
            return slots[::-1], copies

    with pytest.raises(WrongContents, match="paged_kv"):
        check_contents(Forgetful, TINY)
    with pytest.raises(WrongContents, match="node 1 reads"):
        check_tables(Crossed, TINY)
    passed, report = run.checked([replace(found, contents=Forgetful)], WORKS[0])
    assert passed == []
    assert "wrong" in report["paged_kv"]


def test_rows_of_paged_attention_cannot_share() -> None:
    from peers.torch_paged import aliases_are_lost

    assert aliases_are_lost()


def test_all_peers_play_the_same_script() -> None:
    made = script(TINY, 3)
    again = script(TINY, 3)
    assert made == again
    assert made != script(TINY, 4)
    live: set[int] = set()
    for search in made.searches:
        live |= set(search.begun)
        for parents, children in search.steps:
            assert set(parents) <= live
            live |= set(children)
            assert all(
                made.lengths[child] == made.lengths[node] + TINY.new
                for node, child in zip(parents, children)
            )
        released = [node for batch in search.released for node in batch]
        assert len(set(released)) == len(released)
        live -= set(released)
        assert len(live) <= TINY.envs
        assert all(made.lengths[node] <= TINY.longest_root for node in live)
    assert max(made.lengths.values()) <= TINY.window


def test_unique_tokens_count_ancestors_that_are_gone_once() -> None:
    made = script(TINY, 0)
    made.lengths = {1: 5, 2: 7, 3: 9, 4: 9}
    made.parents = {1: 0, 2: 1, 3: 2, 4: 2}
    assert measure.unique_tokens(made, [3, 4]) == 7 + 2 + 2
    assert measure.unique_tokens(made, [4]) == 9


def test_a_forest_has_as_many_nodes_as_asked_for() -> None:
    found = peer("python floor").tables
    assert found
    work = replace(TINY, window=24)
    floor = found(work, 300, 2000)
    known = measure.forest(floor, 200, random.Random(0))
    assert len(set(known)) == 200
    assert max(len(floor.slots(node)) for node in known) <= 15


def test_figures_become_tables_and_go_between_the_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    found = [*map(peer, HERE), Row("other", None, None, "not installed")]
    monkeypatch.setattr(run, "rows", lambda: found)
    out = tmp_path / "peers.json"
    page = tmp_path / "page.md"
    arguments = [
        "--workloads",
        "tiny long",
        "--repeats",
        "1",
        "--live",
        "80",
        "--rounds",
        "2",
        "--host-live",
        "80",
    ]
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments, "--json", str(out)])
    run.main()
    assert torch.get_num_threads() == before == 1
    results = json.loads(out.read_text())
    assert set(results["workloads"]["tiny long"]["tables"]) == set(HERE) - {"torch PagedAttention"}
    page.write_text("before\n<!-- results: how -->\nold\n<!-- end of results -->\nafter\n")
    monkeypatch.setattr(sys, "argv", ["table.py", str(out), "--write", str(page)])
    table.main()
    text = page.read_text()
    assert "old" not in text
    assert "| torch PagedAttention | no | - |" in text
    assert "- other: not installed" in text
    assert text.count("| paged_kv |") == 5
    with pytest.raises(SystemExit):
        monkeypatch.setattr(sys, "argv", ["run.py", "--workloads", "huge"])
        run.main()

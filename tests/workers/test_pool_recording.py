"""Each worker of a pool records its cache, in every of its lives, and never over another's file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from in_process import DIES_BEFORE, FINE, HANGS
from pool_models import a_pool

from paged_kv.errors import AlreadyRecording, BadArgument, BadCount, WorkerLost
from paged_kv.integrations.ray import SearchPool
from paged_kv.recording import accesses, merged, read_recordings
from paged_kv.tools.workers import early

PROMPTS = [[5, 6, 7], [8, 9, 10, 11], [3, 4], [12, 13, 14]]
EVERYTHING: dict[str, Any] = {"interval": 0, "budget": None}


def search(pool: SearchPool) -> Any:
    roots = pool.prefill(PROMPTS, seed=1)
    return pool.sample(roots * 2, max_new_tokens=4)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_worker_writes_a_file_of_its_own(tmp_path: Path) -> None:
    pool, _ = a_pool(2)
    with pool.record(tmp_path / "run", accesses=True, **EVERYTHING) as folder:
        kids = search(pool)
        pool.stats()
    assert names(folder) == ["worker-0.jsonl", "worker-1.jsonl"]
    found = read_recordings(folder)
    assert [each.reason for each in found] == ["done", "done"]
    assert [each.title for each in found] == ["run: worker 0", "run: worker 1"]
    for each, worker in zip(found, pool.stats().workers):
        assert worker.figures is not None
        last = each.samples[-1]
        assert last["queries"] == worker.figures.queries
        assert sum(last["pages_by_refs"].values()) == worker.figures.pages
        marks = {event["name"] for event in each.events if event.get("mark")}
        assert marks == {"open", "sample"}
        assert each.trees[-1]["title"] == "end"
        assert any(access.what == "open" for access in accesses(each))
    whole = merged(found).samples[-1]
    assert whole["bytes_in_use"] == pool.stats().merged.pages * found[0].cache["page_bytes"]
    assert pool.sample(kids, max_new_tokens=1)
    assert [each.samples for each in read_recordings(folder)] == [each.samples for each in found]


@pytest.mark.parametrize("fate", [DIES_BEFORE, HANGS])
def test_who_is_brought_back_goes_on_in_another_file(tmp_path: Path, fate: str) -> None:
    fates: list[str] = []
    pool, engine = a_pool(1, fate=lambda verb: fates.pop() if fates else FINE, timeout=5)
    with pool.record(tmp_path, **EVERYTHING):
        search(pool)
        killed = engine.living()[0].worker  # which does not even end its file
        fates.append(fate)
        search(pool)
    assert names(tmp_path) == ["worker-0.2.jsonl", "worker-0.jsonl"]
    first, second = read_recordings(tmp_path)
    assert killed is not None
    assert (first.reason, second.reason) == (None, "done")
    (said,) = early([first, second])
    assert said.startswith("worker 0: the recording ends early")
    assert "It came back" in said
    # what was repeated is recorded once more: both searches are in the second file
    marks = sum(each.get("count", 0) for each in second.events if each.get("mark"))
    assert marks == 4


def test_a_worker_that_dies_as_it_begins_is_recorded_once_it_is_back(tmp_path: Path) -> None:
    fates: list[str] = []
    pool, _ = a_pool(2, fate=lambda verb: fates.pop() if fates else FINE)
    fates.append(DIES_BEFORE)
    with pool.record(tmp_path):
        search(pool)
    assert names(tmp_path) == ["worker-0.2.jsonl", "worker-1.jsonl"]
    assert [each.reason for each in read_recordings(tmp_path)] == ["done", "done"]


def test_who_does_not_come_back_stops_all_recordings(tmp_path: Path) -> None:
    dead: list[str] = []
    pool, engine = a_pool(2, fate=lambda verb: dead[0] if dead else FINE, restarts=1)
    engine.actors[1].dead = True
    dead.append(FINE)
    engine.fate = lambda verb: DIES_BEFORE if verb == "hello" else FINE
    with pytest.raises(WorkerLost), pool.record(tmp_path):
        pytest.fail("nobody may get here")
    (one,) = read_recordings(tmp_path)
    assert one.reason == "WorkerLost"
    engine.fate = lambda verb: FINE
    search(pool)
    assert names(tmp_path) == ["worker-0.jsonl"]


def test_how_the_block_ends_is_how_the_files_end(tmp_path: Path) -> None:
    pool, _ = a_pool(2)
    with pytest.raises(KeyboardInterrupt), pool.record(tmp_path):
        search(pool)
        raise KeyboardInterrupt
    assert [each.reason for each in read_recordings(tmp_path)] == ["KeyboardInterrupt"] * 2


def test_who_is_retired_and_a_pool_that_is_closed_end_their_files(tmp_path: Path) -> None:
    pool, _ = a_pool(2)
    with pool.record(tmp_path, **EVERYTHING):
        search(pool)
        pool.retire(0)
        pool.close()
    assert [each.reason for each in read_recordings(tmp_path)] == ["done", "done"]


def test_a_worker_that_hangs_at_the_end_leaves_a_file_without_one(tmp_path: Path) -> None:
    fates: list[str] = []
    pool, _ = a_pool(1, fate=lambda verb: fates.pop() if fates else FINE)
    with pool.record(tmp_path):
        search(pool)
        fates.append(HANGS)
    (one,) = read_recordings(tmp_path)
    assert one.reason is None
    search(pool)


def test_mistakes_are_named_before_anything_is_written(tmp_path: Path) -> None:
    pool, _ = a_pool(2)
    with (
        pool.record(tmp_path / "run"),
        pytest.raises(AlreadyRecording, match=r"worker-0\.jsonl"),
        pool.record(tmp_path / "b"),
    ):
        pytest.fail("nobody may get here")
    for folder in ("", 3, tmp_path / "run", tmp_path / "run" / "worker-0.jsonl"):
        with pytest.raises(BadArgument, match="folder"), pool.record(folder):  # type: ignore[arg-type]
            pytest.fail("nobody may get here")
    with pytest.raises(BadCount, match="interval"), pool.record(tmp_path / "b", interval=-1):
        pytest.fail("nobody may get here")
    with pytest.raises(BadArgument, match="accesses"), pool.record(tmp_path / "b", accesses=3):  # type: ignore[arg-type]
        pytest.fail("nobody may get here")
    assert names(tmp_path) == ["run"]


def test_what_a_worker_cannot_write_is_raised_and_others_end(tmp_path: Path) -> None:
    """The file of the second worker is there only once the driver has looked."""
    pool, engine = a_pool(2)
    run = engine.record

    def late(actor: Any, order: Any, reason: str) -> Any:
        if order is not None and order.worker == 1:
            order.path.write_text("")
        return run(actor, order, reason)

    engine.record = late  # type: ignore[method-assign]
    with pytest.raises(FileExistsError), pool.record(tmp_path):
        pytest.fail("nobody may get here")
    engine.record = run  # type: ignore[method-assign]
    (tmp_path / "worker-1.jsonl").unlink()
    assert [each.reason for each in read_recordings(tmp_path)] == ["FileExistsError"]
    with pool.record(tmp_path / "again"):
        search(pool)


def test_a_life_that_cannot_be_recorded_is_lived_all_the_same(tmp_path: Path) -> None:
    pool, engine = a_pool(1)
    with pool.record(tmp_path):
        search(pool)
        engine.living()[0].dead = True
        (tmp_path / "worker-0.2.jsonl").write_text("")
        with pytest.warns(RuntimeWarning, match="not recorded any more"):
            search(pool)

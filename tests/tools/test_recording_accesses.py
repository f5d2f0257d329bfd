"""Which sequences were needed when: what a recorder keeps of that, and what is read again."""

from __future__ import annotations

from pathlib import Path

import pytest
from recording_tools import EVERYTHING, State, filled, made, opened, search

from paged_kv import CacheIndex, KVCacheManager
from paged_kv.errors import BadArgument
from paged_kv.recording import Access, accesses, read_recording, record
from paged_kv.tools import cli

NEVER = {"interval": 1000.0}


def read(path: Path) -> list[Access]:
    """Without the times, which grow."""
    found = list(accesses(read_recording(path)))
    times = [each.t for each in found]
    assert times == sorted(times)
    return [each._replace(t=0.0) for each in found]


@pytest.mark.parametrize("often", [EVERYTHING, NEVER], ids=["every call", "at the end"])
def test_steps_and_hits_say_what_they_read(often: dict[str, float], tmp_path: Path) -> None:
    cache = made()
    index = CacheIndex(cache)
    (old,) = filled(cache)
    with record(cache, tmp_path / "run.jsonl", accesses=True, **often):
        left, right = opened(cache, [old, old], 2, 2).commit()
        index.put_batch(["left", "right"], [left, right])
        index.get("right")
        index.get("nobody")
        index.get("left")
        index.pin("left")
        cache.open([right], 1).close()
        index.get("left")
        index.remove("right")
    assert read(tmp_path / "run.jsonl") == [
        Access(0, "begin", [1], [None]),
        Access(0, "open", [1, 1], []),
        Access(0, "begin", [2, 3], [1, 1]),
        Access(0, "hit", [3, 2], []),
        Access(0, "open", [3], []),
        Access(0, "hit", [2], []),
        Access(0, "end", [3], []),
    ]


def test_who_was_above_when_a_sequence_began(tmp_path: Path) -> None:
    cache = made(num_pages=16)
    with record(cache, tmp_path / "run.jsonl", accesses=True, **NEVER):
        (root,) = filled(cache)
        (inner,) = cache.fork([root])
        first = opened(cache, [inner, inner], 2, 2)
        cache.release([inner])
        left, _ = first.commit()
        cache.release([root])
        cache.fork([left])
    begun = [each for each in read(tmp_path / "run.jsonl") if each.what == "begin"]
    assert begun == [
        Access(0, "begin", [1], [None]),
        Access(0, "begin", [2], [1]),
        Access(0, "begin", [3, 4], [1, 1]),
        Access(0, "begin", [5], [3]),
    ]


def test_an_eviction_is_an_end(tmp_path: Path) -> None:
    cache = made(num_pages=4, max_pages=4)
    manager = KVCacheManager(cache, env_count=1)
    with record(manager, tmp_path / "run.jsonl", accesses=True, **NEVER):
        for name in "abc":
            manager.set_recur_cache(name, filled(cache)[0])
        manager.get_recur_cache("c")
    assert read(tmp_path / "run.jsonl")[-4:] == [
        Access(0, "begin", [2], [None]),
        Access(0, "begin", [3], [None]),
        Access(0, "end", [1], []),
        Access(0, "hit", [3], []),
    ]


def test_another_cache_begins_anew_with_other_numbers(tmp_path: Path) -> None:
    state = State()
    with record(state, tmp_path / "run.jsonl", accesses=True, **NEVER):
        state.start()
        filled(state.cache)
        state.start()
        filled(state.cache)
    assert read(tmp_path / "run.jsonl") == [
        Access(0, "begin", [1], [None]),
        Access(0, "end", [1], []),
        Access(0, "begin", [2], [None]),
    ]


def test_without_being_asked_nothing_is_kept(tmp_path: Path) -> None:
    cache = made(num_pages=64)
    with record(cache, tmp_path / "run.jsonl", **EVERYTHING):
        search(cache)
    assert read_recording(tmp_path / "run.jsonl").accesses == []
    with (
        pytest.raises(BadArgument, match="accesses is 'all'"),
        record(cache, tmp_path / "no.jsonl", accesses="all"),  # type: ignore[arg-type]
    ):
        pass
    assert not (tmp_path / "no.jsonl").exists()


def test_the_command_keeps_them(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    sizes = ["--envs", "2", "--simulations", "3", "--roots", "1"]
    assert cli.main(["record", str(path), "--reference", "--accesses", *sizes]) == 0
    found = read(path)
    opens = [each for each in found if each.what == "open"]
    born = {number for each in found if each.what == "begin" for number in each.ids}
    assert all(len(each.ids) == 2 for each in opens)
    assert born.issuperset(number for each in opens for number in each.ids)

"""Whose cache is recorded: of a manager or a model, made late, made anew, or not there at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from recording_tools import COUNTERS, EVERYTHING, Model, State, made, search, unheard

from paged_kv import KVCacheManager, PagedKVCache
from paged_kv.errors import AlreadyRecording, BadCount, NothingToRecord
from paged_kv.recording import read_recording, record


def test_caches_that_begin_during_the_recording(tmp_path: Path) -> None:
    state = State()
    with record(Model(state), tmp_path / "run.jsonl", **EVERYTHING) as recorder:
        assert not state.started
        recorder.snapshot("nothing yet")
        state.start()
        search(state.cache)
        first = state.cache
        with pytest.raises(MemoryError):
            state.start(fails=True)
        search(state.cache)
        state.start(page_size=4)
        assert unheard(first)
        search(state.cache, steps=1)
    assert unheard(state.cache)
    assert "start" not in vars(state)
    found = read_recording(tmp_path / "run.jsonl")
    assert found.header["cache"] is None
    assert found.cache["page_size"] == 2
    assert [line["cache"]["page_size"] for line in found.caches] == [2, 4]
    assert found.samples[-1]["forks"] == sum(cache.stats.forks for cache in state.made) == 14
    assert sum(found.lives[-1]["counts"]) == sum(cache.stats.freed_pages for cache in state.made)
    for name in (*COUNTERS, "cache_s", "t"):
        values = [sample[name] for sample in found.samples]
        assert values == sorted(values), name


def test_a_recording_without_any_cache(tmp_path: Path) -> None:
    with record(State(), tmp_path / "run.jsonl") as recorder:
        recorder.mark("waiting")
    found = read_recording(tmp_path / "run.jsonl")
    assert (found.cache, found.samples, [event["name"] for event in found.events]) == (
        {},
        [],
        ["waiting"],
    )


def test_a_model_counts_its_own_lookups(tmp_path: Path) -> None:
    state = State()
    state.start()
    manager = KVCacheManager(state.cache, env_count=1)
    assert state.cache.reclaimer is manager
    model = Model(state)
    with record(model, tmp_path / "run.jsonl"):
        model.world_model.total_query_count = 110
        model.world_model.hit_count = 99
    last = read_recording(tmp_path / "run.jsonl").samples[-1]
    assert (last["queries"], last["hits"], last["evictions"]) == (10, 9, 0)


@pytest.mark.parametrize("target", [None, 5, [], torch.nn.Linear(1, 1), PagedKVCache])
def test_targets_without_a_cache_are_named(target: Any, tmp_path: Path) -> None:
    with (
        pytest.raises(NothingToRecord, match="has no paged cache to record"),
        record(target, tmp_path / "run.jsonl"),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_cache_is_recorded_once_at_a_time(tmp_path: Path) -> None:
    cache = made()
    state = State()
    first = tmp_path / "first.jsonl"
    second = tmp_path / "second.jsonl"
    for target, again in ((cache, KVCacheManager(cache, env_count=1)), (state, Model(state))):
        with (
            record(target, first),
            pytest.raises(AlreadyRecording, match=r"first\.jsonl"),
            record(again, second),
        ):
            pass
        assert not second.exists()
        assert (
            read_recording(first).reason == "AlreadyRecording"
            or read_recording(first).reason == "done"
        )
        with record(again, first):
            pass
    assert unheard(cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": -1}, "interval is -1"),
        ({"interval": True}, "interval is True"),
        ({"interval": "1"}, "interval is '1'"),
        ({"interval": float("nan")}, "interval is nan"),
        ({"budget": 0}, "budget is 0"),
        ({"budget": 1.5}, "budget is 1.5, allowed is None or a share"),
    ],
)
def test_wrong_numbers_are_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadCount, match=message), record(made(), tmp_path / "run.jsonl", **options):
        pass
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    cache = made()
    with pytest.raises(FileNotFoundError), record(cache, tmp_path / "no" / "run.jsonl"):
        pass
    assert unheard(cache)
    with record(cache, tmp_path / "run.jsonl"):
        pass

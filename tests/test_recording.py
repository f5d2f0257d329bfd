"""Recordings: every sample is recounted from the public tables, and nothing that goes wrong stops the run."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, run_state_machine_as_test
from test_cache import CacheMachine

from paged_kv import (
    AlreadyRecording,
    BadCount,
    ConcurrentCall,
    KVCacheManager,
    NothingToRecord,
    OutOfPages,
    PagedKVCache,
    StaleHandle,
)
from paged_kv.recording import Recording, read_recording, record
from paged_kv.recording.pace import Pace

EVERYTHING: dict[str, Any] = {"interval": 0.0, "budget": None}
COUNTERS = ("forks", "appends", "copied_pages", "freed_pages")


class Memory:
    """A file in memory, which is full after `room` bytes."""

    def __init__(self, room: int = 1 << 40) -> None:
        self.data, self.room = b"", room

    def write(self, data: bytes) -> int:
        kept = data[: self.room - len(self.data)]
        if not kept:
            raise OSError(28, "No space left on device")
        self.data += kept
        return len(kept)

    def close(self) -> None:
        pass

    def lines(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in map(json.loads, self.data.splitlines()) if line.get("kind") == kind]


def made(**options: Any) -> PagedKVCache:
    return PagedKVCache(**{"layers": 1, "heads": 1, "head_size": 2, "page_size": 2, "num_pages": 8, **options})


def tokens(rows: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    kv = torch.ones(1, rows, 1, count, 2)
    return kv, kv


def search(cache: PagedKVCache, steps: int = 3, rows: int = 2) -> list[int]:
    """A small search: roots of three tokens, `steps` generations of children; returns all but the roots, released."""
    parents = cache.new(rows, start=1)
    roots = parents
    cache.append(parents, *tokens(rows, 3))
    nodes = []
    for _ in range(steps):
        batch = cache.open(parents, 2)
        batch.update(0, *(part[0] for part in tokens(rows, 2)))
        parents = batch.commit()
        nodes += parents
    cache.release(nodes)
    cache.release(roots)
    return nodes


def unhooked(cache: PagedKVCache) -> bool:
    return not any(callable(value) for name, value in vars(cache).items() if name in vars(PagedKVCache))


def recount(cache: PagedKVCache) -> dict[str, Any]:
    """A sample's fields, from the tables that anybody may ask for."""
    live = cache._tables.live()
    tables, lengths = cache.page_tables(live), cache.lengths(live)
    starts = cache.block_tables(live)[2].tolist()
    size = cache.page_size
    read = {
        (table[place // size], place % size)
        for table, start, length in zip(tables, starts, lengths) for place in range(start, start + length)
    }
    refs = Counter(page for table in tables for page in table)
    bins = {"1": (1, 1), "2": (2, 2), "3-4": (3, 4), "5-8": (5, 8), "9-16": (9, 16), "17+": (17, 10**9)}
    return {
        "bytes_in_use": len(refs) * cache.page_bytes,
        "bytes_reserved": cache.bytes_reserved,
        "bytes_shared": sum(count > 1 for count in refs.values()) * cache.page_bytes,
        "bytes_unique": len(read) * cache.token_bytes,
        "bytes_dense": sum(lengths) * cache.token_bytes,
        "sequences": len(live),
        "pages_by_refs": {
            name: sum(low <= count <= high for count in refs.values()) for name, (low, high) in bins.items()
        },
        "dead_slots": len(refs) * size - len(read),
    }


class RecordedMachine(CacheMachine):
    """The cache of `CacheMachine`, with a sample after every verb, or without any until the end."""

    @initialize(data=st.data())
    def build(self, data: st.DataObject) -> None:
        super().build(data)
        self.file = Memory()
        self.every = data.draw(st.booleans())
        often = EVERYTHING if self.every else {"interval": 1000.0}
        self.recording = record(self.cache, "run.jsonl", opener=lambda path: self.file, **often)  # type: ignore[arg-type,return-value]
        self.recorder = self.recording.__enter__()
        self.plant(data)

    def plant(self, data: st.DataObject) -> None:
        """Begin with contexts that share pages: by itself a short run seldom gets that far."""
        for count in data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)):
            seqs = self.cache.new(1, start=data.draw(st.integers(0, self.page_size - 1)))
            self.names.update(zip(seqs, self.oracle.new(1), strict=True))
            keys, values = self.tokens(1, count)
            with contextlib.suppress(OutOfPages):
                self.cache.append(seqs, keys, values)
                self.oracle.append(self.theirs(seqs), keys, values)
            length = self.cache.lengths(seqs)[0]
            at = data.draw(st.lists(st.integers(0, length), max_size=3))
            children = self.cache.fork(seqs * len(at), at=at)
            self.names.update(zip(children, self.oracle.fork(self.theirs(seqs) * len(at), at=at), strict=True))

    @invariant()
    def samples_are_right(self) -> None:
        if not self.every:
            return
        self.cache.new(0)  # a verb that failed left no sample
        sample = self.file.lines("sample")[-1]
        wanted = recount(self.cache)
        assert {name: sample[name] for name in wanted} == wanted
        assert {name: sample[name] for name in COUNTERS} == {name: getattr(self.cache.stats, name) for name in COUNTERS}
        assert sample["usage"] == round(self.cache.pages_in_use / (self.limit or self.cache.pages_reserved), 6)
        assert self.cache.bytes_in_use <= sample["bytes_peak"] <= self.cache.stats.peak_pages * self.cache.page_bytes
        self.lives_are_right()

    def lives_are_right(self) -> None:
        """The cache began empty, so that every page that was freed had been seen to be taken."""
        verbs = self.recorder._verbs
        verbs.settle()  # type: ignore[union-attr]
        assert sum(self.recorder._lives) == self.cache.stats.freed_pages
        assert {page for page, birth in enumerate(verbs.lives._births) if birth} == {  # type: ignore[union-attr]
            page for page, count in enumerate(self.cache._pages.refs) if count
        }

    @invariant()
    def snapshots_are_right(self) -> None:
        if not self.every:
            return
        self.recorder.snapshot("now")
        live, size = self.cache._tables.live(), self.cache.page_size
        tree, pages = self.file.lines("tree")[-1], self.file.lines("pages")[-1]
        tables = [list(table) for table in self.cache.page_tables(live)]
        assert [node["pages"] for node in tree["nodes"]] == tables
        assert [node["tokens"] for node in tree["nodes"]] == self.cache.lengths(live)
        ids = [node["id"] for node in tree["nodes"]]
        assert all(node["parent"] is None or node["parent"] in ids[:place] for place, node in enumerate(tree["nodes"]))
        holders = Counter(page for table in tables for page in table)
        assert pages["refs"] == [holders[page] for page in range(1, self.cache.pages_reserved + 1)]
        assert sum(pages["filled"]) * self.cache.token_bytes == recount(self.cache)["bytes_unique"]
        assert max(pages["filled"]) <= size
        assert pages["owner"] == [
            next((name for name, table in zip(ids, tables) if page in table), None)
            for page in range(1, self.cache.pages_reserved + 1)
        ]

    def teardown(self) -> None:
        if hasattr(self, "recorder"):
            self.lives_are_right()
            self.recording.__exit__(None, None, None)
            assert unhooked(self.cache)
            totals = Counter[str]()
            for event in self.file.lines("event"):
                totals[event["name"]] += event["pages"] if event["name"] != "grow" else 0
            assert sum(totals.values()) == self.cache.pages_in_use
        super().teardown()


def test_every_sample_agrees_with_a_recount() -> None:
    run_state_machine_as_test(RecordedMachine, settings=settings(max_examples=100, stateful_step_count=12))


# -- what is recorded ----------------------------------------------------------------------------------------


def test_one_fork_and_one_append(tmp_path: Path) -> None:
    cache = made(page_size=4)
    with record(cache, tmp_path / "run.jsonl", title="by hand", labels={"run": "7"}, **EVERYTHING) as recorder:
        (root,) = cache.new()
        cache.append([root], *tokens(1, 6))
        left, right = cache.fork([root, root])
        cache.append([left], *tokens(1, 3))
        cache.slide([left], 5)
        recorder.mark("here")
        recorder.snapshot("three contexts")
        cache.release([root, right])
    found = read_recording(tmp_path / "run.jsonl")
    assert (found.title, found.header["labels"], found.reason, found.torn) == ("by hand", {"run": "7"}, "done", 0)
    assert found.cache["page_bytes"] == cache.page_bytes
    assert found.cache["max_pages"] is None
    assert [event["name"] for event in found.events] == [
        "new", "append", "fork", "append", "slide", "here", "release"
    ]
    before = found.samples[-3]  # after the slide
    assert before["sequences"] == 3
    assert before["pages_by_refs"] == {"1": 2, "2": 2, "3-4": 0, "5-8": 0, "9-16": 0, "17+": 0}
    # Pages 1 to 4. Nobody reads two slots at the end of page 2, one in front of page 3, three at the end of page 4.
    assert (before["bytes_in_use"], before["dead_slots"]) == (4 * cache.page_bytes, 2 + 1 + 3)
    assert before["bytes_dense"] == (6 + 6 + 4) * cache.token_bytes
    tree, peak = found.trees  # the release of two of three was the end of a search, as far as anybody can tell
    assert (tree["title"], peak["title"]) == ("three contexts", "peak of 3 sequences")
    assert [(node["id"], node["parent"], node["tokens"], node["pages"]) for node in tree["nodes"]] == [
        (1, None, 6, [1, 2]), (2, 1, 4, [3, 4]), (3, 1, 6, [1, 2])
    ]
    assert (found.pages[0]["refs"], found.pages[0]["filled"], found.pages[0]["owner"]) == (
        [2, 2, 1, 1, 0, 0, 0, 0], [4, 2, 3, 1, 0, 0, 0, 0], [1, 1, 2, 2, None, None, None, None]
    )
    assert sum(found.lives[-1]["counts"]) == 2
    assert len(found.lives[-1]["edges"]) == len(found.lives[-1]["counts"]) + 1


def test_fast_calls_become_one_event(tmp_path: Path) -> None:
    cache = made(num_pages=1)
    with record(cache, tmp_path / "run.jsonl", interval=1000.0) as recorder:
        for _ in range(200):
            recorder.mark("search")
            search(cache)
    found = read_recording(tmp_path / "run.jsonl")
    events = {event["name"]: event for event in found.events}
    assert len(found.samples) == 2
    assert len(events) == len(found.events)
    assert {name: event["count"] for name, event in events.items()} == {
        "search": 200, "new": 200, "append": 200, "open": 600, "commit": 600, "release": 400,
        "grow": cache.stats.growths,
    }
    assert events["commit"]["sequences"] == 1200
    assert events["grow"]["pages"] == cache.pages_reserved - 1
    assert 0 < events["open"]["most"] <= events["open"]["s"] <= events["open"]["span"]
    spent = sum(event["s"] for event in found.events)
    assert found.samples[-1]["cache_s"] == pytest.approx(spent, rel=1e-3)
    assert found.samples[-1]["sequences"] == 0
    assert found.samples[-1]["sequences_peak"] == 8
    assert sum(found.lives[-1]["counts"]) == cache.stats.freed_pages
    assert (tmp_path / "run.jsonl").stat().st_size < 40_000


def test_a_search_leaves_its_tree_at_its_peak(tmp_path: Path) -> None:
    cache = made()
    with record(cache, tmp_path / "run.jsonl", interval=1000.0):
        search(cache, steps=2)
        search(cache, steps=7)
        search(cache, steps=7)
    trees = read_recording(tmp_path / "run.jsonl").trees
    assert [len(tree["nodes"]) for tree in trees] == [6, 16]
    first = trees[1]["nodes"][0]["id"]
    assert [node["parent"] for node in trees[1]["nodes"][:4]] == [None, None, first, first + 1]


def test_evictions_and_lookups_are_counted(tmp_path: Path) -> None:
    cache = made(num_pages=4, grow=False)
    manager = KVCacheManager(cache, env_count=1)
    with record(manager, tmp_path / "run.jsonl", **EVERYTHING):
        for name in "abcdef":
            (seq,) = cache.new()
            cache.append([seq], *tokens(1, 4))
            manager.set_recur_cache(name, seq)
        assert manager.get_recur_cache("a") is None
        assert manager.get_recur_cache("f") is not None
    found = read_recording(tmp_path / "run.jsonl")
    last = found.samples[-1]
    assert (last["queries"], last["hits"], last["evictions"]) == (2, 1, 4)
    assert sum(event["sequences"] for event in found.events if event["name"] == "evict") == 4
    assert sum(event["sequences"] for event in found.events if event["name"] == "release") == 4
    # The releases ran within appends: their time counts once.
    outermost = sum(event["s"] for event in found.events if event["name"] != "release")
    assert last["cache_s"] == pytest.approx(outermost, rel=1e-2)


def test_without_an_index_nothing_is_said_of_lookups(tmp_path: Path) -> None:
    cache = made()
    with record(cache, tmp_path / "run.jsonl"):
        search(cache)
    assert "queries" not in read_recording(tmp_path / "run.jsonl").samples[-1]


def test_pages_in_use_before_the_recording_have_no_known_life(tmp_path: Path) -> None:
    cache = made()
    (old,) = cache.new()
    cache.append([old], *tokens(1, 4))
    with record(cache, tmp_path / "run.jsonl"):
        (new,) = cache.new()
        cache.append([new], *tokens(1, 6))
        cache.release([old, new])
    found = read_recording(tmp_path / "run.jsonl")
    assert sum(found.lives[-1]["counts"]) == 3
    assert (found.samples[-1]["forks"], found.samples[-1]["appends"]) == (0, 1)  # since the recording began


def test_lives_end_in_the_bin_of_their_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("paged_kv.recording.verbs.perf_counter", lambda: now[0])
    cache = made()
    with record(cache, tmp_path / "run.jsonl"):
        (root,) = cache.new()
        cache.append([root], *tokens(1, 4))
        now[0] += 600
        (child,) = cache.fork([root])
        cache.append([child], *tokens(1, 2))
        now[0] += 70
        cache.release([root, child])
    lives = read_recording(tmp_path / "run.jsonl").lives[-1]
    assert {low: count for low, count in zip(lives["edges"], lives["counts"]) if count} == {50.0: 1, 500.0: 2}


def test_a_page_that_an_append_frees(tmp_path: Path) -> None:
    cache = made(page_size=4)
    with record(cache, tmp_path / "run.jsonl") as recorder:
        (long,) = cache.new()
        cache.append([long], *tokens(1, 3))
        (short,) = cache.fork([long], at=1)
        cache.append([long, short], *tokens(2, 1))  # each leaves the page that both read: it is freed
        recorder.snapshot("now")
        assert cache.stats.freed_pages == 1 == sum(recorder._lives)


def test_a_pool_that_grew_for_a_verb_that_failed(tmp_path: Path) -> None:
    cache = made(num_pages=2)
    with record(cache, tmp_path / "run.jsonl") as recorder:
        (root,) = cache.new()
        cache._storage.scatter = cache._storage.write_run = None  # type: ignore[assignment,method-assign]
        with pytest.raises(TypeError):
            cache.append([root], *tokens(1, 9))
        del cache._storage.scatter, cache._storage.write_run
        assert cache.pages_reserved == 8
        children = cache.fork([root] * 5)
        batch = cache.open(children, 2)
        batch.update(0, *(part[0] for part in tokens(5, 2)))
        cache.release(batch.commit())
        recorder.snapshot("now")
        assert sum(recorder._lives) == cache.stats.freed_pages == 5


def test_an_empty_recording(tmp_path: Path) -> None:
    cache = made()
    with record(cache, tmp_path / "run.jsonl"):
        pass
    found = read_recording(tmp_path / "run.jsonl")
    assert (found.title, found.events, found.trees, found.reason) == ("run", [], [], "done")
    assert {sample["bytes_in_use"] for sample in found.samples} == {0}


def test_big_caches_are_cut_short(tmp_path: Path) -> None:
    cache = made(num_pages=20_000)
    cache.new(5000)
    with record(cache, tmp_path / "run.jsonl") as recorder:
        recorder.snapshot("all")
    found = read_recording(tmp_path / "run.jsonl")
    assert (len(found.trees[0]["nodes"]), found.trees[0]["left_out"]) == (4096, 904)
    assert (len(found.pages[0]["refs"]), found.pages[0]["left_out"]) == (16384, 3616)


# -- whose cache ---------------------------------------------------------------------------------------------


class State:
    """Contexts that make their cache at the first use, and may begin again with another."""

    def __init__(self) -> None:
        self.made: list[PagedKVCache] = []

    @property
    def started(self) -> bool:
        return bool(self.made)

    @property
    def cache(self) -> PagedKVCache:
        return self.made[-1]

    def start(self, **options: Any) -> None:
        if options.get("fails"):
            raise MemoryError("no room")
        self.made.append(made(**options))


class Model:
    """Something that holds a world model with such contexts."""

    def __init__(self, state: State) -> None:
        self.world_model = type("WorldModel", (), {})()
        self.world_model.paged = state
        self.world_model.total_query_count, self.world_model.hit_count = 100, 90


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
        assert unhooked(first)
        search(state.cache, steps=1)
    assert unhooked(state.cache)
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
    assert (found.cache, found.samples, [event["name"] for event in found.events]) == ({}, [], ["waiting"])


def test_a_model_counts_its_own_lookups(tmp_path: Path) -> None:
    state = State()
    state.start()
    KVCacheManager(state.cache, env_count=1)
    model = Model(state)
    with record(model, tmp_path / "run.jsonl"):
        model.world_model.total_query_count, model.world_model.hit_count = 110, 99
    last = read_recording(tmp_path / "run.jsonl").samples[-1]
    assert (last["queries"], last["hits"], last["evictions"]) == (10, 9, 0)


@pytest.mark.parametrize("target", [None, 5, [], torch.nn.Linear(1, 1), PagedKVCache])
def test_targets_without_a_cache_are_named(target: Any, tmp_path: Path) -> None:
    with pytest.raises(NothingToRecord, match="has no paged cache to record"), record(target, tmp_path / "run.jsonl"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_cache_is_recorded_once_at_a_time(tmp_path: Path) -> None:
    cache, state = made(), State()
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    for target, again in ((cache, KVCacheManager(cache, env_count=1)), (state, Model(state))):
        with record(target, first), pytest.raises(AlreadyRecording, match=r"first\.jsonl"), record(again, second):
            pass
        assert not second.exists()
        assert read_recording(first).reason == "AlreadyRecording" or read_recording(first).reason == "done"
        with record(again, first):
            pass
    assert unhooked(cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"interval": -1}, "interval is -1"), ({"interval": True}, "interval is True"),
     ({"interval": "1"}, "interval is '1'"), ({"interval": float("nan")}, "interval is nan"),
     ({"budget": 0}, "budget is 0"), ({"budget": 1.5}, "budget is 1.5, allowed is None or a share")],
)
def test_wrong_numbers_are_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadCount, match=message), record(made(), tmp_path / "run.jsonl", **options):
        pass
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    cache = made()
    with pytest.raises(FileNotFoundError), record(cache, tmp_path / "no" / "run.jsonl"):
        pass
    assert unhooked(cache)
    with record(cache, tmp_path / "run.jsonl"):
        pass


# -- what goes wrong -----------------------------------------------------------------------------------------


def test_errors_of_the_cache_stay_what_they_are(tmp_path: Path) -> None:
    cache = made(num_pages=2, grow=False)
    with record(cache, tmp_path / "run.jsonl", **EVERYTHING):
        (root,) = cache.new()
        with pytest.raises(OutOfPages):
            cache.append([root], *tokens(1, 9))
        cache.release(seqs=iter([root]))
        for gone in ([root], [[root]], [None]):
            with pytest.raises(ValueError, match=r"released|not a sequence"):
                cache.release(gone)  # type: ignore[arg-type]
        with pytest.raises(StaleHandle):
            cache.fork([root])
    found = read_recording(tmp_path / "run.jsonl")
    assert [event["name"] for event in found.events] == ["new", "release"]


def test_a_second_thread_is_still_refused(tmp_path: Path) -> None:
    cache = made()
    (root,) = cache.new()
    refused: list[type[BaseException]] = []

    def fork() -> None:
        try:
            cache.fork([root])
        except ConcurrentCall as error:
            refused.append(type(error))

    with record(cache, tmp_path / "run.jsonl", **EVERYTHING):
        with cache._lock:
            other = threading.Thread(target=fork)
            other.start()
            other.join()
        assert refused == [ConcurrentCall]
        cache.fork([root])
    assert [event["name"] for event in read_recording(tmp_path / "run.jsonl").events] == ["fork"]


def test_hooks_come_off_however_the_block_ends(tmp_path: Path) -> None:
    cache = made()
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), record(cache, tmp_path / "run.jsonl"):
            search(cache)
            raise error
        assert unhooked(cache)
        found = read_recording(tmp_path / "run.jsonl")
        assert (found.reason, found.samples[-1]["forks"]) == (error.__name__, 6)


def test_hooks_that_others_wrapped_stay_and_do_nothing(tmp_path: Path) -> None:
    cache, calls = made(), []
    with record(cache, tmp_path / "run.jsonl"):
        inner = cache.new
        cache.new = lambda *a, **k: calls.append(a) or inner(*a, **k)  # type: ignore[method-assign,func-returns-value]
    assert len(cache.new(2)) == 2
    assert calls == [(2,)]
    del cache.new
    assert unhooked(cache)
    assert read_recording(tmp_path / "run.jsonl").events == []


def test_hooks_of_others_are_put_back(tmp_path: Path) -> None:
    cache = made()
    theirs = cache.new
    cache.new = theirs  # type: ignore[method-assign]
    with record(cache, tmp_path / "run.jsonl"):
        cache.new(1)
    assert vars(cache)["new"] is theirs


@pytest.mark.parametrize("room", [0, 10, 400, 600, 2000, 5000])
def test_a_full_disk_stops_the_recording_and_not_the_run(room: int, tmp_path: Path) -> None:
    cache, file = made(), Memory(room)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with record(cache, "full.jsonl", opener=lambda path: file, **EVERYTHING) as recorder:  # type: ignore[arg-type,return-value]
            for _ in range(5):
                search(cache)
            recorder.snapshot("unwritten")
            assert unhooked(cache)
    assert [str(warning.message) for warning in caught] == [
        "recording to 'full.jsonl' stopped: [Errno 28] No space left on device"
    ]
    assert len(file.data) == room
    assert cache.stats.forks == 30
    assert cache.live_sequences == 0
    (tmp_path / "kept.jsonl").write_bytes(file.data)
    if b"\n" in file.data:
        found = read_recording(tmp_path / "kept.jsonl")
        assert found.torn <= 1
        assert found.reason is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_device_that_is_full() -> None:
    cache = made()
    with pytest.warns(RuntimeWarning, match=r"recording to '/dev/full' stopped"), record(cache, "/dev/full"):
        search(cache)
    assert cache.stats.forks == 6
    assert unhooked(cache)


LONG_RUN = """
    import signal, sys, torch
    from paged_kv import PagedKVCache
    from paged_kv.recording import record

    signal.signal(signal.SIGINT, signal.default_int_handler)
    cache = PagedKVCache(layers=1, heads=1, head_size=2, page_size=2)
    kv = torch.ones(1, 1, 1, 3, 2)
    with record(cache, sys.argv[1], interval=0.0, budget=None):
        while True:
            root, = cache.new()
            cache.append([root], kv, kv)
            cache.release(cache.fork([root] * 3) + [root])
"""


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGKILL, None)])
def test_a_run_that_is_stopped_leaves_a_file(number: signal.Signals, reason: str | None, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    run = subprocess.Popen([sys.executable, "-c", textwrap.dedent(LONG_RUN), str(path)], stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while (not path.exists() or path.stat().st_size < 20_000) and time.monotonic() < until:
            time.sleep(0.02)
        run.send_signal(number)
        assert run.wait(60) != 0
    finally:
        run.kill()
        run.wait()
    found = read_recording(path)
    assert found.reason == reason
    assert found.torn <= (number == signal.SIGKILL)
    assert len(found.samples) > 10
    assert {event["name"] for event in found.events} == {"new", "append", "fork", "release"}


# -- the file ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole() -> bytes:
    """A short recording with lines of every kind."""
    state, file = State(), Memory()
    with record(state, "run.jsonl", title="größe", opener=lambda path: file, interval=1000.0) as recorder:  # type: ignore[arg-type,return-value]
        recorder.mark("begin")
        state.start()
        search(state.cache, steps=1, rows=1)
    return file.data


def prefix(short: Recording, long: Recording) -> Iterator[bool]:
    for name, lines in vars(short).items():
        if isinstance(lines, list):
            yield lines == getattr(long, name)[: len(lines)]


def test_files_torn_at_every_byte(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "torn.jsonl"
    path.write_bytes(whole)
    complete = read_recording(path)
    assert complete.torn == 0
    assert all(vars(complete)[name] for name in ("samples", "events", "trees", "caches", "ends"))
    header = whole.index(b"\n")
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        if cut < header:
            with pytest.raises(ValueError, match="is not a recording that can be read"):
                read_recording(path)
            continue
        found = read_recording(path)
        assert all(prefix(found, complete))
        assert found.torn == (whole[cut - 1 : cut] != b"\n" and whole[cut : cut + 1] != b"\n")


def test_damage_in_the_middle_costs_its_own_line(whole: bytes, tmp_path: Path) -> None:
    lines = whole.splitlines()
    damaged = [lines[0], b"\x00\xff\xfe", *lines[1:3], b'{"kind":"sample"}', b'{"kind":"sample","t":NaN}', b"[]",
               b'{"kind":"of tomorrow","t":1}', *lines[3:]]
    (tmp_path / "whole.jsonl").write_bytes(whole)
    (tmp_path / "damaged.jsonl").write_bytes(b"\n".join(damaged))
    found = read_recording(tmp_path / "damaged.jsonl")
    assert found.torn == 4
    assert found.samples == read_recording(tmp_path / "whole.jsonl").samples


HEADER = {"format": "paged_kv recording", "version": 1, "title": "t", "labels": {}, "started": 0.0, "cache": None}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "the file is empty"),
        (b"\n", "the file is empty"),
        (b"hello\n", "its first line is not the header"),
        (b"[1, 2]\n", "its first line is not the header"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "its first line is not the header"),
        (b'{"format": "another", "version": 1}\n', "its first line is not the header"),
        (json.dumps({**HEADER, "version": 2}).encode(), "it has version 2 of the format, allowed is 1"),
        (json.dumps({**HEADER, "title": 7}).encode(), "the header's 'title' is 7, allowed is text"),
        (json.dumps({**HEADER, "cache": []}).encode(), r"the header's 'cache' is \[\], allowed is an object or null"),
        (None, "No such file"),
    ],
)
def test_foreign_files_are_named(content: bytes | None, why: str, tmp_path: Path) -> None:
    path = tmp_path / "foreign.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=why) as caught:
        read_recording(path)
    assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match="directory"):
        read_recording(tmp_path)


@given(
    st.floats(0, 1), st.floats(1e-4, 1), st.floats(0, 0.5),
    st.lists(st.tuples(st.floats(0, 0.1), st.floats(0, 10)), max_size=30),
)
def test_looks_keep_to_their_budget(
    interval: float, share: float, thin: float, looks: list[tuple[float, float]]
) -> None:
    pace, now, spent = Pace(interval, share, thin), 0.0, 0.0
    for cost, late in looks:
        now = max(now, pace.due) + late
        assert spent <= share * now * (1 + 1e-9) + 1e-12
        pace.looked(now, cost)
        spent += cost
        assert pace.due >= now + max(interval, thin * now)


def test_no_warning_while_all_is_well(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = made()
        with record(cache, tmp_path / "run.jsonl"):
            search(cache)

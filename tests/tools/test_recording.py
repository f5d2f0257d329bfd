"""What is recorded: every sample is recounted from the tables, every life of a page is seen."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from cache_machine import CacheMachine
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, run_state_machine_as_test
from recording_tools import (
    COUNTERS,
    EVERYTHING,
    Memory,
    alive,
    made,
    recount,
    references,
    search,
    tokens,
    unheard,
)
from small_caches import Fault, fault

from paged_kv import KVCacheManager
from paged_kv.errors import OutOfPages
from paged_kv.events import Event
from paged_kv.pages.allocator import MANY
from paged_kv.recording import read_recording, record
from paged_kv.recording.pace import Pace
from paged_kv.recording.verbs import VERBS


class RecordedMachine(CacheMachine):
    """The cache of `CacheMachine`, with a sample after every verb, or without any until the end."""

    @initialize(data=st.data())
    def build(self, data: st.DataObject) -> None:
        super().build(data)
        self.file = Memory()
        self.every = data.draw(st.booleans())
        often = EVERYTHING if self.every else {"interval": 1000.0}
        options: dict[str, Any] = {"opener": lambda path: self.file, "accesses": True, **often}
        self.recording = record(self.cache, "run.jsonl", **options)
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
            self.names.update(
                zip(children, self.oracle.fork(self.theirs(seqs) * len(at), at=at), strict=True)
            )

    @invariant()
    def samples_are_right(self) -> None:
        if not self.every:
            return
        self.cache.new(0)  # a verb that failed left no sample
        sample = self.file.lines("sample")[-1]
        wanted = recount(self.cache)
        assert {name: sample[name] for name in wanted} == wanted
        assert {name: sample[name] for name in COUNTERS} == {
            name: getattr(self.cache.stats, name) for name in COUNTERS
        }
        assert sample["usage"] == round(
            self.cache.pages_in_use / (self.limit or self.cache.pages_reserved), 6
        )
        assert (
            self.cache.bytes_in_use
            <= sample["bytes_peak"]
            <= self.cache.stats.peak_pages * self.cache.page_bytes
        )
        self.lives_are_right()

    def lives_are_right(self) -> None:
        """The cache began empty, so that every page that was freed had been seen to be taken."""
        verbs = self.recorder._verbs
        assert verbs is not None
        verbs.settle()
        assert sum(self.recorder._lives) == self.cache.stats.freed_pages
        assert verbs.mirror.lives.pages == set(references(self.cache))

    @invariant()
    def snapshots_are_right(self) -> None:
        if not self.every:
            return
        self.recorder.snapshot("now")
        live = self.cache.live()
        size = self.cache.page_size
        tree = self.file.lines("tree")[-1]
        pages = self.file.lines("pages")[-1]
        tables = [list(table) for table in self.cache.page_tables(live)]
        assert [node["pages"] for node in tree["nodes"]] == tables
        assert [node["tokens"] for node in tree["nodes"]] == self.cache.lengths(live)
        ids = [node["id"] for node in tree["nodes"]]
        assert alive(self.file.lines("accesses")) == ids
        names = dict(zip(live, ids))
        parents = [node["parent"] for node in tree["nodes"]]
        assert parents == [names.get(self.cache.parent(seq) or 0) for seq in live]
        assert all(above is None or above in ids[:place] for place, above in enumerate(parents))
        holders = references(self.cache)
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
            assert unheard(self.cache)
            assert max(sample["bytes_peak"] for sample in self.file.lines("sample")) == (
                self.cache.stats.peak_pages * self.cache.page_bytes
            )
            noted = self.file.lines("accesses")
            assert len(alive(noted)) == len(self.cache.live())
            opens = [
                event["count"] for event in self.file.lines("event") if event["name"] == "open"
            ]
            assert sum(line["what"].count("open") for line in noted) == sum(opens)
            totals = Counter[str]()
            for event in self.file.lines("event"):
                totals[event["name"]] += event["pages"] if event["name"] != "grow" else 0
            assert sum(totals.values()) == self.cache.pages_in_use
            assert "recover" not in totals, "all of it was told"
        super().teardown()


def test_every_sample_agrees_with_a_recount() -> None:
    run_state_machine_as_test(
        RecordedMachine, settings=settings(max_examples=100, stateful_step_count=12)
    )


def test_one_fork_and_one_append(tmp_path: Path) -> None:
    cache = made(page_size=4)
    with record(
        cache, tmp_path / "run.jsonl", title="by hand", labels={"run": "7"}, **EVERYTHING
    ) as recorder:
        (root,) = cache.new()
        cache.append([root], *tokens(1, 6))
        left, right = cache.fork([root, root])
        cache.append([left], *tokens(1, 3))
        cache.slide([left], 5)
        recorder.mark("here")
        recorder.snapshot("three contexts")
        cache.release([root, right])
    found = read_recording(tmp_path / "run.jsonl")
    assert (found.title, found.header["labels"], found.reason, found.torn) == (
        "by hand",
        {"run": "7"},
        "done",
        0,
    )
    assert found.cache["page_bytes"] == cache.page_bytes
    assert found.cache["max_pages"] is None
    assert [event["name"] for event in found.events] == [
        "new",
        "append",
        "fork",
        "append",
        "slide",
        "here",
        "release",
    ]
    before = found.samples[-3]  # after the slide
    assert before["sequences"] == 3
    assert before["pages_by_refs"] == {"1": 1, "2": 1, "3-4": 1, "5-8": 0, "9-16": 0, "17+": 0}
    # Pages 1 to 3. Nobody reads three slots at the end of page 3.
    assert (before["bytes_in_use"], before["dead_slots"]) == (3 * cache.page_bytes, 3)
    assert before["bytes_dense"] == (6 + 6 + 4) * cache.token_bytes
    # The release of two of three was the end of a search, as far as anybody can tell.
    tree, peak = found.trees
    assert (tree["title"], peak["title"]) == ("three contexts", "peak of 3 sequences")
    assert [
        (node["id"], node["parent"], node["tokens"], node["pages"]) for node in tree["nodes"]
    ] == [(1, None, 6, [1, 2]), (2, 1, 4, [2, 3]), (3, 1, 6, [1, 2])]
    assert (found.pages[0]["refs"], found.pages[0]["filled"], found.pages[0]["owner"]) == (
        [2, 3, 1, 0, 0, 0, 0, 0],
        [4, 4, 1, 0, 0, 0, 0, 0],
        [1, 1, 2, None, None, None, None, None],
    )
    assert sum(found.lives[-1]["counts"]) == 1
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
        "search": 200,
        "new": 200,
        "append": 200,
        "open": 600,
        "commit": 600,
        "release": 400,
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
    spent = []

    def heard(event: Event) -> None:
        if event.verb in VERBS:  # and not that `heard` was let in, at times the slowest of all
            spent.append(event.end - event.begin)

    with record(manager, tmp_path / "run.jsonl", **EVERYTHING):
        cache.listen(heard)
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
    # The appends were tried twice, with a call for pages in between: their time counts once.
    assert sum(event["count"] for event in found.events if event["name"] == "reclaim") == 4
    assert sum(event["count"] for event in found.events if event["name"] == "append") == 6
    assert last["cache_s"] == pytest.approx(sum(spent), abs=1e-6)


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
    last = found.samples[-1]
    assert (last["forks"], last["appends"]) == (0, 1)  # since the recording began


def test_lives_end_in_the_bin_of_their_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("paged_kv.turns.perf_counter", lambda: now[0])
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
    assert {low: count for low, count in zip(lives["edges"], lives["counts"]) if count} == {
        50.0: 1,
        500.0: 2,
    }


def test_a_page_that_an_append_frees(tmp_path: Path) -> None:
    cache = made(page_size=4)
    with record(cache, tmp_path / "run.jsonl") as recorder:
        (long,) = cache.new()
        cache.append([long], *tokens(1, 3))
        short = cache.fork([long] * 2, at=[1, 2])
        cache.release([long])
        # Each leaves the page that both read, for a token was there: it is freed.
        cache.append(short, *tokens(2, 1))
        recorder.snapshot("now")
        assert cache.stats.freed_pages == 1 == sum(recorder._lives)


def test_a_pool_that_grew_for_a_verb_that_failed(tmp_path: Path) -> None:
    cache = made(num_pages=2)
    with record(cache, tmp_path / "run.jsonl") as recorder:
        (root,) = cache.new()
        with fault(cache, "write_slots", late=False), pytest.raises(Fault):
            cache.append([root], *tokens(1, 9))
        assert cache.pages_reserved == 8
        children = cache.fork([root] * 5)
        batch = cache.open(children, 2)
        batch.update(0, *(part[0] for part in tokens(5, 2)))
        cache.release(batch.commit())
        recorder.snapshot("now")
        assert sum(recorder._lives) == cache.stats.freed_pages == 5


def test_a_step_that_grows_the_pool_takes_pages_freed_just_before(tmp_path: Path) -> None:
    cache = made(num_pages=2)
    with record(cache, tmp_path / "run.jsonl", interval=1000.0) as recorder:
        (old,) = cache.new()
        cache.append([old], *tokens(1, 4))
        cache.release([old])
        batch = cache.open(cache.new(5), 2)
        batch.update(0, *(part[0] for part in tokens(5, 2)))
        cache.release(batch.commit())
        recorder.snapshot("now")
        assert sum(recorder._lives) == cache.stats.freed_pages == 7


def test_small_releases_that_sort_the_free_pages(tmp_path: Path) -> None:
    """The allocator sorts its free pages after many small releases: no others are freed by that."""
    cache = made(num_pages=3 * MANY)
    with record(cache, tmp_path / "run.jsonl", interval=1000.0) as recorder:
        seqs = cache.new(2 * MANY)
        cache.append(seqs, *tokens(len(seqs), 1))
        for first in range(MANY // 2, len(seqs), 2):
            cache.release(seqs[first : first + 2])
        verbs = recorder._verbs
        assert verbs is not None
        verbs.settle()
        assert sum(recorder._lives) == cache.stats.freed_pages > MANY
        assert verbs.mirror.lives.pages == set(references(cache))


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


@given(
    st.floats(0, 1),
    st.floats(1e-4, 1),
    st.floats(0, 0.5),
    st.lists(st.tuples(st.floats(0, 0.1), st.floats(0, 10)), max_size=30),
)
def test_looks_keep_to_their_budget(
    interval: float, share: float, thin: float, looks: list[tuple[float, float]]
) -> None:
    pace = Pace(interval, share, thin)
    now = 0.0
    spent = 0.0
    for cost, late in looks:
        now = max(now, pace.due) + late
        assert spent <= share * now * (1 + 1e-9) + 1e-12
        pace.looked(now, cost)
        spent += cost
        assert pace.due >= now + max(interval, thin * now)

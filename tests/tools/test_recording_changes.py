"""However a cache changes, a recording sees it: by an index, by a release put off, after Ctrl-C."""

from __future__ import annotations

import json
import random
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from inspect import CO_GENERATOR
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from recording_tools import EVERYTHING, Memory, held, made, recount, tokens, unhooked

from paged_kv import CacheIndex, KVCacheManager, PagedKVCache
from paged_kv.errors import PagedKVError
from paged_kv.pages.allocator import PageAllocator
from paged_kv.recording import Recorder, Recording, read_recording, record
from paged_kv.recording.mirror import Mirror


def filled(cache: PagedKVCache, count: int = 1, length: int = 4) -> list[int]:
    """New sequences of some tokens."""
    seqs = cache.new(count)
    cache.append(seqs, *tokens(count, length))
    return seqs


def totals(events: Iterable[dict[str, Any]], field: str) -> Counter[str]:
    """The sum of a field, by the name of the event."""
    found = Counter[str]()
    for event in events:
        found[event["name"]] += event[field]
    return found


def in_memory(cache: PagedKVCache, file: Memory) -> AbstractContextManager[Recorder]:
    options: dict[str, Any] = {"opener": lambda path: file, **EVERYTHING}
    return record(cache, "run.jsonl", **options)


def agrees(cache: PagedKVCache, recorder: Recorder, file: Memory) -> None:
    """The last sample, the mirror of the cache and the pages that are known to live are right."""
    cache.new(0)  # takes a sample
    sample = file.lines("sample")[-1]
    wanted = recount(cache)
    assert {name: sample[name] for name in wanted} == wanted
    verbs = recorder._verbs
    assert verbs is not None
    assert verbs.mirror.live == dict(cache.tables.items())
    assert verbs.mirror.lives.pages == held(cache)


def complete(cache: PagedKVCache, found: Recording) -> None:
    """The events have every page that is in use, and the lives every page that was freed."""
    pages = totals(found.events, "pages")
    del pages["grow"]
    assert sum(pages.values()) == cache.pages_in_use
    assert sum(found.lives[-1]["counts"]) == cache.stats.freed_pages


# -- indexes


def evict(cache: PagedKVCache) -> None:
    index = CacheIndex(cache, max_entries=2)
    for key in "abcde":
        index.put(key, *filled(cache))


def replace(cache: PagedKVCache) -> None:
    index = CacheIndex(cache)
    index.put_batch(["a", "b"], filled(cache, 2))
    for _ in range(3):
        index.put("a", *filled(cache))


def remove(cache: PagedKVCache) -> None:
    index = CacheIndex(cache)
    index.put_batch(list("abcde"), filled(cache, 5))
    for key in "abc":
        index.remove(key)


def clear(cache: PagedKVCache) -> None:
    manager = KVCacheManager(cache, env_count=2)
    filled(cache, 2)
    manager.set_recur_caches(["a", "b"], filled(cache, 2))
    manager.set_init_cache(1, "c", *filled(cache))
    manager.clear_all()


@pytest.mark.parametrize("let_go", [evict, replace, remove, clear])
def test_entries_that_an_index_lets_go(
    let_go: Callable[[PagedKVCache], None], tmp_path: Path
) -> None:
    cache = made()
    with record(cache, tmp_path / "run.jsonl", **EVERYTHING):
        let_go(cache)
    found = read_recording(tmp_path / "run.jsonl")
    assert (
        totals(found.events, "sequences")["release"],
        totals(found.events, "pages")["release"],
    ) == (3, -6)
    assert totals(found.events, "count")["release"] == 0  # nobody called it
    last = found.samples[-1]
    assert (last["sequences"], last["bytes_in_use"]) == (2, 4 * cache.page_bytes)
    assert last["freed_pages"] == 6
    complete(cache, found)


def test_entries_that_go_for_lack_of_pages(tmp_path: Path) -> None:
    cache = made(num_pages=4, grow=False)
    manager = KVCacheManager(cache, env_count=1)
    with record(manager, tmp_path / "run.jsonl", **EVERYTHING):
        for key in "abcd":
            manager.set_recur_cache(key, *filled(cache))
    found = read_recording(tmp_path / "run.jsonl")
    assert totals(found.events, "pages") == {"new": 0, "append": 8, "release": -4, "evict": 0}
    assert totals(found.events, "sequences") == {"new": 4, "append": 4, "release": 2, "evict": 2}
    complete(cache, found)


def test_a_sample_follows_an_entry_that_goes(tmp_path: Path) -> None:
    cache = made()
    file = Memory()
    with in_memory(cache, file):
        index = CacheIndex(cache)
        index.put("a", *filled(cache))
        index.remove("a")
        assert file.lines("sample")[-1]["bytes_in_use"] == 0
        before = len(file.lines("sample"))
        assert index.get("a") is None
        assert len(file.lines("sample")) == before  # a lookup changes no page


def test_the_tree_that_an_index_clears_is_kept(tmp_path: Path) -> None:
    cache = made()
    with record(cache, tmp_path / "run.jsonl", interval=1000.0):
        index = CacheIndex(cache)
        (root,) = filled(cache)
        children = cache.fork([root] * 3)
        cache.append(children, *tokens(3, 2))
        index.put_batch(["a", "b", "c"], children)
        index.clear()
        assert cache.live() == [root]
    found = read_recording(tmp_path / "run.jsonl")
    assert [tree["title"] for tree in found.trees] == ["peak of 4 sequences"]
    nodes = found.trees[0]["nodes"]
    assert [(node["parent"], node["tokens"], node["pages"]) for node in nodes] == [
        (None, 4, [1, 2]),
        (1, 6, [1, 2, 3]),
        (1, 6, [1, 2, 4]),
        (1, 6, [1, 2, 5]),
    ]
    assert found.pages[0]["refs"] == [4, 4, 1, 1, 1, 0, 0, 0]
    assert found.pages[-1]["refs"] == [1, 1, 0, 0, 0, 0, 0, 0]


# -- subtrees and releases that were put off


def test_promote_and_release_subtree(tmp_path: Path) -> None:
    cache = made()
    index = CacheIndex(cache)
    with record(cache, tmp_path / "run.jsonl", **EVERYTHING):
        (root,) = filled(cache)
        left, right = cache.fork([root] * 2)
        below, beside = cache.fork([left, right])
        cache.append([left, right, below, beside], *tokens(4, 2))
        index.put("below", below)
        assert cache.promote(right) == 2
        assert "below" not in index
        assert cache.release_subtree(root) == 3
    found = read_recording(tmp_path / "run.jsonl")
    released = [event for event in found.events if event["name"] == "release"]
    assert [(event["count"], event["sequences"], event["pages"]) for event in released] == [
        (1, 2, -2),
        (1, 3, -4),
    ]
    assert all(event["s"] > 0 for event in released)
    assert [tree["title"] for tree in found.trees] == ["peak of 3 sequences"]  # before, 2 of 5 went
    complete(cache, found)


class Owner:
    """Releases its sequence when nobody needs it any more."""

    def __init__(self, cache: PagedKVCache, seq: int) -> None:
        self.cache = cache
        self.seq = seq

    def __del__(self) -> None:
        self.cache.release([self.seq])


def test_a_release_by_a_finalizer_during_a_verb(tmp_path: Path) -> None:
    cache = made()
    with record(cache, tmp_path / "run.jsonl", **EVERYTHING):
        kept, gone = filled(cache, 2)
        owners = [Owner(cache, gone)]
        cache.listen(lambda change, taken, freed: owners.clear())
        cache.append([kept], *tokens(1, 2))  # in the middle of which the owner goes
        assert cache.live() == [kept]
    found = read_recording(tmp_path / "run.jsonl")
    assert totals(found.events, "count") == {"new": 1, "append": 2, "release": 1}
    assert totals(found.events, "sequences") == {"new": 2, "append": 3, "release": 1}
    assert totals(found.events, "pages") == {"new": 0, "append": 5, "release": -2}
    complete(cache, found)


def test_a_release_by_another_thread_during_a_verb(tmp_path: Path) -> None:
    cache = made()

    def elsewhere(change: object, taken: object, freed: object) -> None:
        if len(cache.live()) > 1:
            other = threading.Thread(target=cache.release, args=([gone],))
            other.start()
            other.join()

    with record(cache, tmp_path / "run.jsonl", **EVERYTHING):
        kept, gone = filled(cache, 2)
        cache.listen(elsewhere)
        cache.append([kept], *tokens(1, 2))
        assert cache.live() == [kept]
    found = read_recording(tmp_path / "run.jsonl")
    assert totals(found.events, "sequences") == {"new": 2, "append": 3, "release": 1}
    assert totals(found.events, "pages") == {"new": 0, "append": 5, "release": -2}
    complete(cache, found)


# -- interrupts


def half_done(counted: Callable[..., Any]) -> Callable[..., Any]:
    """Of the pages that it is given it counts one; then comes Ctrl-C."""

    def interrupted(pages: PageAllocator, changed: Iterable[int]) -> None:
        counted(pages, list(changed)[:1])
        raise KeyboardInterrupt

    return interrupted


def commit(cache: PagedKVCache, seqs: list[int]) -> None:
    batch = cache.open(seqs, 2)
    batch.update(0, *(part[0] for part in tokens(len(seqs), 2)))
    batch.commit(slide=2)


CUT: dict[str, tuple[str, Callable[[PagedKVCache, list[int]], object]]] = {
    "fork": ("hold", lambda cache, seqs: cache.fork(seqs)),
    "append": ("hold", lambda cache, seqs: cache.append(seqs, *tokens(3, 3))),
    "commit": ("hold", commit),
    "slide": ("drop", lambda cache, seqs: cache.slide(seqs, 2)),
    "release": ("drop", lambda cache, seqs: cache.release(seqs[1:])),
    "all are released": ("drop", lambda cache, seqs: cache.release(seqs)),
    "put": (
        "drop",
        lambda cache, seqs: CacheIndex(cache, max_entries=1).put_batch(["a", "b", "c"], seqs),
    ),
}


@pytest.mark.parametrize("cut", CUT)
def test_a_verb_that_is_interrupted_half_way(
    cut: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    counting, call = CUT[cut]
    cache = made()
    file = Memory()
    with in_memory(cache, file) as recorder:
        seqs = filled(cache, 3)
        with monkeypatch.context() as patched:
            patched.setattr(PageAllocator, counting, half_done(getattr(PageAllocator, counting)))
            with pytest.raises(KeyboardInterrupt):
                call(cache, seqs)
        agrees(cache, recorder, file)
        filled(cache, 2)
        cache.release(cache.live()[-1:])
        agrees(cache, recorder, file)
    (tmp_path / "run.jsonl").write_bytes(file.data)
    found = read_recording(tmp_path / "run.jsonl")
    assert totals(found.events, "count")["recover"] == 1
    complete(cache, found)
    cache.check()


def test_an_interrupt_right_before_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache = made()
    with pytest.raises(KeyboardInterrupt), record(cache, tmp_path / "run.jsonl", interval=1000.0):
        seqs = filled(cache, 3)
        monkeypatch.setattr(PageAllocator, "hold", half_done(PageAllocator.hold))
        cache.append(seqs, *tokens(3, 3))
    found = read_recording(tmp_path / "run.jsonl")
    assert found.reason == "KeyboardInterrupt"
    assert found.samples[-1]["bytes_in_use"] == cache.bytes_in_use == 12 * cache.page_bytes
    assert unhooked(cache)
    assert not cache.tables.listeners
    complete(cache, found)


def test_an_interrupt_between_a_change_and_the_word_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    cache = made()
    file = Memory()
    with in_memory(cache, file) as recorder:
        (seq,) = filled(cache)
        with monkeypatch.context() as patched:
            patched.setattr(Mirror, "note", interrupted)
            with pytest.raises(KeyboardInterrupt):
                cache.truncate([seq], 1)  # no page comes or goes
        agrees(cache, recorder, file)
        cache.slide([seq], 2)
        agrees(cache, recorder, file)
    assert totals(file.lines("event"), "count")["recover"] == 1


class Interrupt:
    """Ctrl-C as the `after`-th function of this package begins, counted from here."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __enter__(self) -> None:
        sys.settrace(self._trace)

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, value: object) -> None:
        if event != "call" or frame.f_code.co_flags & CO_GENERATOR:
            return  # a generator is called to be closed, too
        if str(frame.f_globals.get("__name__")).startswith("paged_kv"):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt


def step(cache: PagedKVCache, index: CacheIndex, chance: random.Random) -> None:
    """One call of any verb, on any sequences."""
    live = cache.live()
    some = chance.sample(live, min(len(live), chance.randint(1, 3)))
    verbs: list[Callable[[], object]] = [
        lambda: filled(cache, chance.randint(1, 2), chance.randint(1, 5)),
        lambda: cache.fork(some),
        lambda: cache.append(some, *tokens(len(some), chance.randint(1, 3))),
        lambda: commit(cache, some),
        lambda: cache.truncate(some, 1),
        lambda: cache.release(some),
        lambda: cache.promote(some[0]),
        lambda: index.put(chance.choice("abcd"), some[0]),
        lambda: index.get(chance.choice("abcd")),
        lambda: index.remove(chance.choice("abcd")),
        lambda: index.clear(),
    ]
    with suppress(PagedKVError, IndexError):
        chance.choice(verbs)()


@pytest.mark.parametrize("seed", range(60))
def test_interrupts_anywhere(seed: int) -> None:
    """In the cache, in the index or in the recorder: what is recorded next is right again."""
    chance = random.Random(seed)
    cache = made(num_pages=16, grow=False)
    index = CacheIndex(cache, max_entries=3)
    cache.set_reclaimer(index)
    file = Memory()
    with in_memory(cache, file) as recorder:
        for _ in range(60):
            with suppress(KeyboardInterrupt), Interrupt(chance.randint(1, 60)):
                step(cache, index, chance)
            agrees(cache, recorder, file)
    assert unhooked(cache)
    assert not cache.tables.listeners
    assert all(map(json.loads, file.data.splitlines()))


def test_a_disk_that_is_full_while_an_index_works() -> None:
    cache = made()
    file = Memory(3000)
    with warnings.catch_warnings(record=True) as caught, in_memory(cache, file):
        warnings.simplefilter("always")
        index = CacheIndex(cache, max_entries=1)
        for key, seq in enumerate(filled(cache, 40)):
            index.put(key, seq)  # the entry that goes is seen within this verb
        assert unhooked(cache)
    assert [warning.category for warning in caught] == [RuntimeWarning]
    assert len(file.data) == 3000
    assert cache.live_sequences == 1
    assert not cache.tables.listeners


# -- what it is called


def test_a_sequence_keeps_its_number(tmp_path: Path) -> None:
    cache = made()
    filled(cache, 5)
    cache.release(cache.live()[:2])
    with record(cache, tmp_path / "run.jsonl", interval=1000.0) as recorder:
        recorder.snapshot("first")
        cache.release(cache.live()[1:2])
        cache.fork(cache.live()[1:])
        recorder.snapshot("second")
    trees = read_recording(tmp_path / "run.jsonl").trees
    assert [[(node["id"], node["parent"]) for node in tree["nodes"]] for tree in trees] == [
        [(1, None), (2, None), (3, None)],
        [(1, None), (3, None), (4, 3)],
    ]
    assert read_recording(tmp_path / "run.jsonl").pages[-1]["owner"][4:10] == [
        1,
        1,
        None,
        None,
        3,
        3,
    ]


def test_a_snapshot_waits_for_another_thread(tmp_path: Path) -> None:
    cache = made()
    filled(cache)
    inside = threading.Event()
    leave = threading.Event()
    done = threading.Event()

    def look(tables: object) -> None:
        inside.set()
        leave.wait(60)

    with record(cache, tmp_path / "run.jsonl", interval=1000.0) as recorder:
        worker = threading.Thread(target=cache.look, args=(look,))
        worker.start()
        inside.wait(60)
        asker = threading.Thread(target=lambda: (recorder.snapshot("now"), done.set()))
        asker.start()
        assert not done.wait(0.05)
        leave.set()
        assert done.wait(60)
        worker.join()
        asker.join()
    assert [tree["title"] for tree in read_recording(tmp_path / "run.jsonl").trees] == ["now"]


def test_nobody_listens_without_a_recording(tmp_path: Path) -> None:
    cache = made()
    assert not cache.tables.listeners
    with record(cache, tmp_path / "run.jsonl"):
        assert len(cache.tables.listeners) == 1
    assert not cache.tables.listeners
    assert unhooked(cache)
    with pytest.raises(FileNotFoundError), record(cache, tmp_path / "no" / "run.jsonl"):
        pass
    assert not cache.tables.listeners

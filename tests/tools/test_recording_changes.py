"""However a cache changes, a recording hears of it: by an index, a release put off, a step."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from recording_tools import (
    EVERYTHING,
    Memory,
    agrees,
    complete,
    filled,
    in_memory,
    made,
    opened,
    tokens,
    totals,
    unheard,
)

from paged_kv import CacheIndex, KVCacheManager, PagedKVCache
from paged_kv.events import Event
from paged_kv.recording import read_recording, record

# -- indexes


def evict(cache: PagedKVCache) -> CacheIndex:
    index = CacheIndex(cache, max_entries=2)
    for key in "abcde":
        index.put(key, *filled(cache))
    return index


def replace(cache: PagedKVCache) -> CacheIndex:
    index = CacheIndex(cache)
    index.put_batch(["a", "b"], filled(cache, 2))
    for _ in range(3):
        index.put("a", *filled(cache))
    return index


def remove(cache: PagedKVCache) -> CacheIndex:
    index = CacheIndex(cache)
    index.put_batch(list("abcde"), filled(cache, 5))
    for key in "abc":
        index.remove(key)
    return index


def clear(cache: PagedKVCache) -> KVCacheManager:
    manager = KVCacheManager(cache, env_count=2)
    filled(cache, 2)
    manager.set_recur_caches(["a", "b"], filled(cache, 2))
    manager.set_init_cache(1, "c", *filled(cache))
    manager.clear_all()
    return manager


@pytest.mark.parametrize("let_go", [evict, replace, remove, clear])
def test_entries_that_an_index_lets_go(
    let_go: Callable[[PagedKVCache], object], tmp_path: Path
) -> None:
    cache = made()
    with record(cache, tmp_path / "run.jsonl", **EVERYTHING):
        index = let_go(cache)
    assert index is not None  # with it would go what it owns
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


def test_an_index_that_is_gone_lets_all_go(tmp_path: Path) -> None:
    cache = made()
    with record(cache, tmp_path / "run.jsonl", **EVERYTHING):
        index = evict(cache)
        del index
        assert cache.live() == []
    found = read_recording(tmp_path / "run.jsonl")
    assert totals(found.events, "sequences")["release"] == 5
    assert totals(found.events, "count")["release"] == 0
    complete(cache, found)


def test_entries_that_go_for_lack_of_pages(tmp_path: Path) -> None:
    cache = made(num_pages=4, grow=False)
    manager = KVCacheManager(cache, env_count=1)
    with record(manager, tmp_path / "run.jsonl", **EVERYTHING):
        for key in "abcd":
            manager.set_recur_cache(key, *filled(cache))
    found = read_recording(tmp_path / "run.jsonl")
    assert totals(found.events, "pages") == {
        "new": 0,
        "append": 8,
        "reclaim": 0,
        "release": -4,
        "evict": 0,
    }
    assert totals(found.events, "sequences") == {
        "new": 4,
        "append": 4,
        "reclaim": 0,
        "release": 2,
        "evict": 2,
    }
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
        cache.listen(lambda event: owners.clear())
        cache.append([kept], *tokens(1, 2))  # in the middle of which the owner goes
        assert cache.live() == [kept]
    found = read_recording(tmp_path / "run.jsonl")
    assert totals(found.events, "count") == {"new": 1, "append": 2, "release": 1}
    assert totals(found.events, "sequences") == {"new": 2, "append": 3, "release": 1}
    assert totals(found.events, "pages") == {"new": 0, "append": 5, "release": -2}
    complete(cache, found)


def test_a_release_by_another_thread_during_a_verb(tmp_path: Path) -> None:
    cache = made()

    def elsewhere(event: Event) -> None:
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


def test_a_disk_that_is_full_while_an_index_works() -> None:
    cache = made()
    file = Memory(3000)
    with warnings.catch_warnings(record=True) as caught, in_memory(cache, file):
        warnings.simplefilter("always")
        index = CacheIndex(cache, max_entries=1)
        for key, seq in enumerate(filled(cache, 40)):
            index.put(key, seq)  # the entry that goes is seen within this verb
        assert unheard(cache)
    assert [warning.category for warning in caught] == [RuntimeWarning]
    assert len(file.data) == 3000
    assert cache.live_sequences == 1


# -- steps


def test_pages_that_a_step_holds(tmp_path: Path) -> None:
    """They are in use from `open` on; what is not filled goes back as the step ends."""
    cache = made()
    page = cache.page_bytes
    file = Memory()
    with in_memory(cache, file) as recorder:
        (root,) = filled(cache)  # two full pages
        step = opened(cache, [root, root], 4, 1)
        opening = file.lines("sample")[-1]
        recorder.snapshot("one step is open")
        children = step.commit()
        cache.open(children, 4).close()
        cache.open(children, 4)  # and drops it
        cache.settle()
        agrees(cache, recorder, file)
    assert (opening["bytes_in_use"], opening["bytes_peak"]) == (6 * page, 6 * page)
    assert (opening["sequences"], opening["bytes_unique"]) == (1, 4 * cache.token_bytes)
    assert opening["pages_by_refs"] == {"1": 4, "2": 0, "3-4": 2, "5-8": 0, "9-16": 0, "17+": 0}
    assert opening["dead_slots"] == 8, "nobody reads the room"
    (pages,) = file.lines("pages")[:1]
    assert (pages["refs"][:7], pages["filled"][:7]) == ([3, 3, 1, 1, 1, 1, 0], [2, 2, *[0] * 5])
    assert pages["owner"][:7] == [1, 1, *[None] * 5]
    events = file.lines("event")
    changes = [(event["name"], event["sequences"], event["pages"]) for event in events]
    assert changes == [
        ("new", 1, 0),
        ("append", 1, 2),
        ("open", 2, 4),
        ("commit", 2, -2),
        ("open", 2, 4),
        ("close", 0, -4),
        ("open", 2, 4),
        ("close", 0, -4),
        ("new", 0, 0),
    ]
    (tmp_path / "run.jsonl").write_bytes(file.data)
    complete(cache, read_recording(tmp_path / "run.jsonl"))


def test_a_peak_between_two_samples(tmp_path: Path) -> None:
    cache = made()
    with record(cache, tmp_path / "run.jsonl", interval=1000.0):
        (root,) = filled(cache)
        cache.open([root], 4).close()
        cache.release(cache.fork([root] * 3))
    last = read_recording(tmp_path / "run.jsonl").samples[-1]
    assert (last["bytes_peak"], last["bytes_in_use"]) == (
        4 * cache.page_bytes,
        2 * cache.page_bytes,
    )
    assert (last["sequences_peak"], last["sequences"]) == (4, 1)


def test_a_step_outlives_its_parents(tmp_path: Path) -> None:
    cache = made()
    file = Memory()
    with in_memory(cache, file) as recorder:
        (root,) = filled(cache)
        step = cache.open([root], 2)
        cache.release([root])
        agrees(cache, recorder, file)
        sample = file.lines("sample")[-1]
        assert (sample["sequences"], sample["bytes_in_use"]) == (0, 3 * cache.page_bytes)
        step.close()
        agrees(cache, recorder, file)
        assert file.lines("sample")[-1]["bytes_in_use"] == 0
    (tmp_path / "run.jsonl").write_bytes(file.data)
    complete(cache, read_recording(tmp_path / "run.jsonl"))


# -- pages that move


def test_pages_that_a_trim_moves_live_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    for place in ("paged_kv.turns", "paged_kv.recording.recorder"):
        monkeypatch.setattr(f"{place}.perf_counter", lambda: now[0])
    cache = made()
    file = Memory()
    with in_memory(cache, file) as recorder:
        gone, kept = filled(cache, 2)
        step = cache.open([kept], 2)
        cache.release([gone])
        now[0] += 600
        cache.trim()
        agrees(cache, recorder, file)
        sample = file.lines("sample")[-1]
        assert sample["bytes_reserved"] == sample["bytes_in_use"] == 3 * cache.page_bytes
        recorder.snapshot("trimmed")
        (table,) = map(list, cache.page_tables([kept]))
        assert max(table) <= 3
        now[0] += 70
        step.close()
        cache.release([kept])
    (tree,) = (line for line in file.lines("tree") if line["title"] == "trimmed")
    (pages,) = (line for line in file.lines("pages") if line["title"] == "trimmed")
    assert [node["pages"] for node in tree["nodes"]] == [table]
    assert sorted(pages["refs"]) == [1, 2, 2]
    (tmp_path / "run.jsonl").write_bytes(file.data)
    found = read_recording(tmp_path / "run.jsonl")
    lives = found.lives[-1]
    ages = {low: count for low, count in zip(lives["edges"], lives["counts"]) if count}
    assert ages == {0.0: 2, 500.0: 3}
    counts = totals(found.events, "count")
    assert (counts["trim"], counts["recover"], counts["grow"]) == (1, 0, 0)
    complete(cache, found)


def test_a_pool_that_grows_again_after_a_trim(tmp_path: Path) -> None:
    cache = made()
    with record(cache, tmp_path / "run.jsonl", **EVERYTHING):
        seqs = filled(cache, 1)
        cache.trim()
        cache.append(seqs, *tokens(1, 10))
    found = read_recording(tmp_path / "run.jsonl")
    assert [event["pages"] for event in found.events if event["name"] == "grow"] == [6]
    assert [sample["bytes_reserved"] // cache.page_bytes for sample in found.samples[-3:]] == [
        2,
        8,
        8,
    ]
    complete(cache, found)


# -- the tree


def test_the_parent_is_the_nearest_that_lives(tmp_path: Path) -> None:
    """A sequence that ended with two branches below it holds them together, unseen."""
    cache = made()
    with record(cache, tmp_path / "run.jsonl", interval=1000.0) as recorder:
        (root,) = filled(cache)
        (inner,) = cache.fork([root])
        left, right = cache.fork([inner] * 2)
        (below,) = cache.fork([left])
        top = cache.fork([left], root=True)
        cache.release([inner, left])
        recorder.snapshot("two are gone")
        assert [cache.parent(seq) for seq in cache.live()] == [None, root, root, None]
        assert cache.live() == [root, right, below, *top]
    tree = read_recording(tmp_path / "run.jsonl").trees[-1]
    assert [node["parent"] for node in tree["nodes"]] == [None, 1, 1, None]


def test_a_tree_at_its_peak_has_its_joints(tmp_path: Path) -> None:
    cache = made()
    with record(cache, tmp_path / "run.jsonl", interval=1000.0):
        (root,) = filled(cache)
        (inner,) = cache.fork([root])
        leaves = cache.fork([inner] * 3)
        cache.release([inner])
        cache.release([root, *leaves])
    (tree,) = read_recording(tmp_path / "run.jsonl").trees
    assert tree["title"] == "peak of 4 sequences"
    assert [node["parent"] for node in tree["nodes"]] == [None, 1, 1, 1]


def test_what_hangs_on_a_joint_is_not_counted_as_released(tmp_path: Path) -> None:
    cache = made()
    with record(cache, tmp_path / "run.jsonl", **EVERYTHING):
        (root,) = filled(cache)
        (inner,) = cache.fork([root])
        (leaf,) = cache.fork([inner])
        cache.release([inner])  # and so the leaf hangs on the root
        assert cache.parent(leaf) == root
    found = read_recording(tmp_path / "run.jsonl")
    assert totals(found.events, "sequences")["release"] == 1
    assert "recover" not in totals(found.events, "count")


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
    assert unheard(cache)
    with record(cache, tmp_path / "run.jsonl"):
        assert len(cache.turns.listeners) == 1
    assert unheard(cache)
    with pytest.raises(FileNotFoundError), record(cache, tmp_path / "no" / "run.jsonl"):
        pass
    assert unheard(cache)

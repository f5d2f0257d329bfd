"""The cache in single cases: failures in the middle, full pools, and the figures it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_caches import Fault, books, fault

from paged_kv import CacheIndex, PagedKVCache
from paged_kv.errors import BadArgument, BadCount, OutOfPages
from paged_kv.pages.storage import PagePlanes


def small(**options: Any) -> PagedKVCache:
    return PagedKVCache(
        **{"layers": 2, "heads": 1, "head_size": 2, "page_size": 2, "num_pages": 2, **options}
    )


def filled(cache: PagedKVCache, length: int) -> int:
    """A sequence of `length` tokens."""
    (seq,) = cache.new(1)
    kv = torch.arange(length * 4.0, device=cache.device).reshape(2, 1, 1, length, 2)
    cache.append([seq], kv, kv)
    return seq


@pytest.mark.parametrize(
    ("verb", "name"),
    [
        ("append", "copy_pages"),
        ("append", "write_slots"),
        ("open", "gather"),
        ("open", "copy_pages"),
        ("commit", "write_slots"),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_a_failure_in_the_middle_changes_nothing(
    device: str, verb: str, name: str, late: bool
) -> None:
    """Tail pages are copied and written to; whichever half fails, every context reads as before."""
    cache = small(device=device, num_pages=16)
    root = filled(cache, 3)
    seqs = [root, *cache.fork([root, root], at=[2, 3])]
    kv = torch.ones(2, 3, 1, 2, 2, device=device)
    batch = cache.open(seqs, 2)
    for layer in range(2):
        batch.update(layer, kv[layer], kv[layer])
    calls: dict[str, Callable[[], Any]] = {
        "append": lambda: cache.append(seqs, kv, kv),
        "open": lambda: cache.open(seqs, 2),
        "commit": batch.commit,
    }
    before = books(cache.books)
    contents = cache.gather(seqs)
    with fault(cache, name, late), pytest.raises(Fault):
        calls[verb]()
    assert books(cache.books) == before
    assert not batch.closed
    assert all(map(torch.equal, contents, cache.gather(seqs)))
    calls[verb]()  # and the same call succeeds afterwards
    cache.check()


def test_growth_that_fails_halfway_leaves_both_planes(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = small(device=device, value_head_size=3)
    keys = torch.ones(2, 1, 1, 9, 2, device=device)
    values = torch.ones(2, 1, 1, 9, 3, device=device)
    (seq,) = cache.new(1)
    before = books(cache.books)
    storage = cache._pool.storage
    assert isinstance(storage, PagePlanes)
    rows = [plane.rows for plane in storage.planes]

    def full(pages: int) -> None:
        raise MemoryError

    monkeypatch.setattr(storage.planes[1], "resized", full)
    with pytest.raises(MemoryError):
        cache.append([seq], keys, values)
    monkeypatch.undo()
    assert books(cache.books) == before
    assert all(plane.rows is same for plane, same in zip(storage.planes, rows))
    cache.append([seq], keys, values)
    assert (cache.pages_reserved, cache.stats.growths) == (8, 1)


class Evictor:
    """Releases the sequences that it was given, oldest first."""

    def __init__(self, cache: PagedKVCache, seqs: list[int], lies: bool = False) -> None:
        self.cache = cache
        self.seqs = seqs
        self.lies = lies
        self.asked: list[int] = []

    def reclaim(self, need: int, busy: Any) -> bool:
        self.asked.append(need)
        if self.lies:
            return True
        doomed = [seq for seq in self.seqs if seq not in busy]
        if self.cache.pages_freed_by(doomed) < need:
            return False
        self.cache.release(doomed)
        self.seqs = [seq for seq in self.seqs if seq in busy]
        return True

    def pinned_pages(self) -> int:
        return 7


def test_a_full_pool_asks_the_reclaimer_for_what_growth_cannot_give(device: str) -> None:
    cache = small(device=device, num_pages=4, max_pages=5)
    old = filled(cache, 4)
    busy = filled(cache, 4)
    evictor = Evictor(cache, [busy, old])
    cache.set_reclaimer(evictor)
    kv = torch.zeros(2, 1, 1, 6, 2, device=device)
    cache.append([busy], kv, kv)
    assert evictor.asked == [2]
    assert (cache.live_sequences, cache.pages_reserved) == (1, 5)
    before = books(cache.books)
    with pytest.raises(OutOfPages, match=r"1 pages requested, 0 free, 7 pinned"):
        cache.append([busy], kv[:, :, :, :1], kv[:, :, :, :1])
    assert books(cache.books) == before
    cache.set_reclaimer(Evictor(cache, [], lies=True))
    with pytest.raises(OutOfPages):
        cache.append([busy], kv[:, :, :, :1], kv[:, :, :, :1])
    assert books(cache.books) == before


def test_what_was_evicted_for_a_call_that_then_fails_stays_evicted(device: str) -> None:
    """Whole entries, and nothing else: the rest is as it was before the call."""
    cache = small(device=device, num_pages=4, grow=False)
    index = CacheIndex(cache, "fifo")
    index.put_batch(["a", "b", "c"], [filled(cache, 1), filled(cache, 1), filled(cache, 1)])
    cache.set_reclaimer(index)
    (seq,) = cache.new(1)
    kv = torch.zeros(2, 1, 1, 4, 2, device=device)
    records = dict(cache.books.items())
    with fault(cache, "write_slots", True), pytest.raises(Fault):
        cache.append([seq], kv, kv)
    assert (list(index), index.stats.evictions) == (["b", "c"], 1)
    left = dict(cache.books.items())
    assert left == {seq: record for seq, record in records.items() if seq in left}
    assert len(left) == len(records) - 1
    cache.check()
    index.check()
    cache.append([seq], kv, kv)
    assert list(index) == ["b", "c"]


@pytest.mark.parametrize("reclaimer", [3, object(), "index"])
def test_a_reclaimer_has_two_methods(reclaimer: object) -> None:
    cache = small()
    words = r"reclaimer is .*, allowed is None or an object with reclaim\(\) and pinned_pages\(\)"
    with pytest.raises(BadArgument, match=words):
        cache.set_reclaimer(reclaimer)  # type: ignore[arg-type]
    assert cache.reclaimer is None


def test_empty_batches_and_empty_sequences(device: str) -> None:
    cache = small(device=device)
    none = torch.zeros(2, 0, 1, 0, 2, device=device)
    cache.append([], none, none)
    assert cache.new(0) == cache.fork([]) == cache.open([], 2).commit() == cache.lengths([]) == []
    assert cache.gather([]).keys.shape == (2, 0, 1, 0, 2)
    assert cache.block_tables([])[0].shape == (0, 0)
    seqs = cache.new(2)
    assert cache.gather(seqs).mask.shape == (2, 0)
    assert cache.block_tables(seqs)[0].shape == (2, 0)
    cache.release([])
    assert cache.live_sequences == 2


def test_block_tables_say_where_the_tokens_lie(device: str) -> None:
    """Pages, lengths and offsets are enough to read every token out of the planes."""
    cache = small(device=device, num_pages=8)
    root = filled(cache, 5)
    (child,) = cache.fork([root])
    cache.slide([child], 3)
    pages, lengths, starts = cache.block_tables([root, child])
    assert pages.dtype == lengths.dtype == starts.dtype == torch.int32
    assert pages.tolist() == [[1, 2, 3], [2, 3, 0]]
    assert (lengths.tolist(), starts.tolist()) == ([5, 2], [0, 1])
    # [page, K0 V0 K1 V1, offset, head_size]
    plane = cache._pool.storage.planes[0].rows.view(-1, 4, 2, 2)  # type: ignore[attr-defined]
    tokens = plane[pages[1, :2].long(), 2].flatten(0, 1)[1:3]
    assert torch.equal(tokens, cache.gather([child]).keys[1, 0, 0])


def test_figures(device: str) -> None:
    cache = small(device=device, dtype=torch.bfloat16, num_pages=4, value_head_size=3)
    (root,) = cache.new(1)
    cache.append(
        [root],
        torch.zeros(2, 1, 1, 3, 2, dtype=cache.dtype, device=device),
        torch.zeros(2, 1, 1, 3, 3, dtype=cache.dtype, device=device),
    )
    cache.fork([root, root])
    assert cache.token_bytes == 2 * (2 + 3) * 2
    assert (cache.page_bytes, cache.bytes_in_use, cache.bytes_reserved) == (40, 80, 160)
    assert (cache.logical_tokens, cache.stored_tokens, cache.live_sequences) == (9, 3, 3)
    positions = (4 + 1) * cache.page_size * 8
    assert cache.working_bytes == positions
    cache.gather([root])
    assert cache.working_bytes == positions, "the caller's own"
    cache.gather([root], reuse=True)
    rows = 2 * (2 + 2) * 8  # row numbers of two pages: two layers each of K and of V
    assert cache.working_bytes == positions + 4 * cache.token_bytes + rows, "whole pages"
    with cache.open([root], 1):
        assert (cache.open_steps, cache.pages_in_use) == (1, 2)
    assert cache.working_bytes == positions + 2 * (4 * cache.token_bytes + rows)
    assert cache.open_steps == 0
    assert cache.device.type == device


def test_views_of_ever_new_widths_are_not_kept_for_ever() -> None:
    cache = small()
    (seq,) = cache.new(1)
    for room in range(300, 0, -1):
        cache.open([seq], room)
    (buffer,) = cache._pool.buffers._kept
    assert len(buffer._layouts) <= 256
    assert cache.open_steps == 0


def test_oversized_counts_cost_nothing_and_change_nothing(device: str) -> None:
    cache = small(device=device)
    seq = filled(cache, 3)
    batch = cache.open([seq], 1)
    before = books(cache.books)
    assert cache.pages_needed([seq], 2 * 10**12 - 3) == 10**12 - 1, "the step has the tail page"
    with pytest.raises(BadCount, match="room is 100000000000000"):
        cache.open([seq], 10**14)
    with pytest.raises((RuntimeError, MemoryError)):
        cache.open([seq] * 100_000, 2**31 - 1)
    assert books(cache.books) == before
    assert batch.commit() != [seq]


def test_a_tail_page_that_all_its_owners_leave_is_counted_as_freed(device: str) -> None:
    cache = small(device=device, page_size=4, num_pages=8)
    long = filled(cache, 3)
    (short,) = cache.fork([long], at=2)
    kv = torch.ones(2, 2, 1, 1, 2, device=device)
    cache.append([long, short], kv, kv)
    assert (cache.stats.allocated_pages, cache.stats.freed_pages, cache.pages_in_use) == (2, 0, 2)
    short, shorter = cache.fork([long, long], at=[2, 1])
    cache.release([long])
    cache.append([short, shorter], kv, kv)
    assert (cache.stats.allocated_pages, cache.stats.freed_pages, cache.pages_in_use) == (4, 1, 3)


def test_a_batch_is_padded_where_asked(device: str) -> None:
    cache = small(device=device)
    short = filled(cache, 1)
    long = filled(cache, 3)
    left = cache.gather([short, long], pad="left").mask
    right = cache.gather([short, long]).mask
    assert left.tolist() == [[False, False, True], [True, True, True]]
    assert right.tolist() == [[True, False, False], [True, True, True]]

"""`trim` gives back memory that nothing uses, and nobody notices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_caches import books
from staged import advance, filled, made

from paged_kv import PagedKVCache
from paged_kv.errors import OutOfPages
from paged_kv.events import Event


def memory(cache: PagedKVCache) -> int:
    """Bytes of the tensors of the pages, the null page not counted."""
    planes = cache._pool.storage.planes  # type: ignore[attr-defined]
    return sum(int(plane.rows.untyped_storage().nbytes()) for plane in planes) - cache.page_bytes


def contents(cache: PagedKVCache, seqs: list[int]) -> list[Any]:
    """All that can be read of sequences, and how they share pages."""
    tables = cache.page_tables(seqs)
    names: dict[int, int] = {}
    shared = [[names.setdefault(page, len(names)) for page in table] for table in tables]
    found = cache.gather(seqs)
    return [shared, *(part.tolist() for part in found), cache.block_tables(seqs)[2].tolist()]


def with_a_high_page(cache: PagedKVCache) -> list[int]:
    """Sequences that hold the lowest and the highest page, with many free ones in between."""
    first, middle, last = filled(cache, 3, 80, 5)
    cache.release([middle])
    return [first, last]


@pytest.mark.parametrize("value_head_size", [2, 3])
def test_memory_goes_back_although_the_highest_page_lives(
    device: str, value_head_size: int
) -> None:
    cache = made(device, num_pages=4, value_head_size=value_head_size)
    seqs = with_a_high_page(cache)
    assert max(page for table in cache.page_tables(seqs) for page in table) > 40
    assert cache.pages_reserved == 64
    before = contents(cache, seqs)
    stats = cache.stats
    cache.trim()
    assert cache.pages_reserved == cache.pages_in_use == 5
    assert cache.bytes_reserved == cache.bytes_in_use == memory(cache) == 5 * cache.page_bytes
    assert contents(cache, seqs) == before
    assert cache.stats == stats
    cache.check()
    filled(cache, 9)
    assert contents(cache, seqs) == before
    cache.check()


def test_an_empty_cache_keeps_a_page(device: str) -> None:
    cache = made(device)
    cache.trim()
    assert (cache.pages_reserved, cache.pages_free) == (1, 1)
    assert memory(cache) == cache.page_bytes
    (seq,) = filled(cache, 5)
    assert cache.lengths([seq]) == [5]
    cache.check()


def test_what_is_full_stays_where_it_is(device: str) -> None:
    cache = made(device, num_pages=2)
    filled(cache, 4)
    before = books(cache.books)
    planes = cache._pool.storage.planes  # type: ignore[attr-defined]
    cache.trim()
    assert books(cache.books) == before
    assert cache._pool.storage.planes is planes  # type: ignore[attr-defined]


def test_positions_pages_and_the_tree_survive(device: str) -> None:
    cache = made(device, num_pages=4)
    low, high = with_a_high_page(cache)
    kv = torch.ones(2, 1, 1, 2, 2, device=device)
    cache.append([high], kv, kv, torch.tensor([[70, 90]]))
    cache.slide([high], 1)
    children = cache.fork([high, low, high], at=[5, 3, 2])
    cache.release([high])
    seqs = [low, *children]
    tree = [(cache.parent(seq), cache.children(seq)) for seq in cache.live()]
    before = contents(cache, seqs)
    needed = [cache.pages_needed([seq], 1) for seq in seqs]
    cache.trim()
    assert cache.live() == seqs
    assert contents(cache, seqs) == before
    assert [(cache.parent(seq), cache.children(seq)) for seq in cache.live()] == tree
    assert [cache.pages_needed([seq], 1) for seq in seqs] <= needed
    cache.append(seqs, *[torch.full((2, 4, 1, 1, 2), 5.0, device=device)] * 2)
    cache.truncate(seqs, 1)
    assert contents(cache, seqs)[1:] == before[1:], "positions go on where they were"
    cache.check()


def test_open_steps_survive(device: str) -> None:
    """With their pages, their buffer, and the room that they hold."""
    cache = made(device, num_pages=4)
    seqs = with_a_high_page(cache)
    plain = made(device)
    copies = with_a_high_page(plain)
    steps = [cache.open(seqs, 2), plain.open(copies, 2)]
    idle = cache.open(seqs, 2)
    for batch, its in zip(steps, (cache, plain)):
        advance(batch, its, 1)
    idle.close()
    held = cache.working_bytes
    cache.trim()
    assert cache.pages_reserved == cache.pages_in_use
    assert cache.working_bytes < held, "the buffer of the other step is gone"
    assert cache.open_steps == 1
    cache.check()
    assert steps[0].then.tolist() == steps[1].then.tolist()
    for batch, its in zip(steps, (cache, plain)):
        advance(batch, its, 1, -2.0)
    children, wanted = (batch.commit() for batch in steps)
    assert contents(cache, children) == contents(plain, wanted)
    assert contents(cache, seqs) == contents(plain, copies)
    cache.check()


def test_a_step_that_is_dropped_after_a_trim_gives_back_its_pages(device: str) -> None:
    cache = made(device, num_pages=4)
    seqs = with_a_high_page(cache)
    batch = cache.open(seqs, 6)
    in_use = cache.pages_in_use
    cache.trim()
    del batch
    assert cache.pages_in_use < in_use
    cache.check()
    cache.trim()
    assert cache.pages_reserved == cache.pages_in_use == 5


@pytest.mark.parametrize("limits", [{"grow": False}, {"max_pages": 8}, {"max_bytes": 8 * 64}])
def test_a_pool_grows_again_to_what_it_may_have(device: str, limits: dict[str, Any]) -> None:
    cache = made(device, num_pages=8, **limits)
    assert cache.page_bytes == 64
    (seq,) = filled(cache, 16)
    cache.truncate([seq], 14)
    cache.trim()
    assert (cache.pages_reserved, cache.max_pages) == (1, 8)
    kv = torch.ones(2, 1, 1, 14, 2, device=device)
    cache.append([seq], kv, kv)
    assert (cache.pages_reserved, cache.pages_free) == (8, 0)
    with pytest.raises(OutOfPages):
        cache.append([seq], kv, kv)
    cache.check()


def test_buffers_that_nothing_uses_go(device: str) -> None:
    cache = made(device)
    seqs = filled(cache, 4, 6)
    steps = [cache.open(seqs, 2) for _ in range(3)]
    view = cache.gather(seqs, reuse=True).keys
    kept = view.clone()
    del steps
    before = cache.working_bytes
    cache.trim()
    positions = (cache.pages_reserved + 1) * cache.page_size * 8
    assert cache.working_bytes == positions < before
    cache.gather(seqs[:1], reuse=True)
    assert torch.equal(view, kept), "who still holds a view keeps it"


def test_a_trim_that_finds_no_memory_changes_nothing(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = made(device, num_pages=4)
    seqs = with_a_high_page(cache)
    seen = contents(cache, seqs)
    before = books(cache.books)

    def full(pages: int) -> None:
        raise MemoryError

    monkeypatch.setattr(cache._pool.storage, "trimmed", full)
    with pytest.raises(MemoryError):
        cache.trim()
    monkeypatch.undo()
    assert books(cache.books) == before
    assert contents(cache, seqs) == seen
    cache.check()
    cache.trim()
    assert cache.pages_reserved == 5


def test_listeners_are_told_to_look_again(device: str) -> None:
    cache = made(device, num_pages=4)
    with_a_high_page(cache)
    heard: list[Event] = []
    cache.listen(heard.append)
    cache.trim()
    assert [(event.verb, event.failed, event.told) for event in heard] == [("trim", False, [None])]

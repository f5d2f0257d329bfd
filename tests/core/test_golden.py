"""Worked examples with exact pages and slots, as docs/design.md tells them."""

from __future__ import annotations

import pytest
import torch

from paged_kv import PagedKVCache
from paged_kv.pages.allocator import PageAllocator
from paged_kv.pages.block_tables import BlockTables


def test_one_fork_and_append_at_page_size_four() -> None:
    """A root of six tokens, two children of two tokens: the first writes on in the tail page, the
    other one copies it.
    """
    tables = BlockTables(PageAllocator(8, max_pages=8), page_size=4)
    (root,) = tables.new(1)
    plan = tables.plan([root], 6)
    assert (plan.fresh, plan.copies, plan.slots) == (2, [], [4, 5, 6, 7, 8, 9])
    tables.carry_out(plan)
    children = tables.fork([root, root])
    assert tables.books.windows(children)[0] == [(1, 2), (1, 2)]
    assert tables.books.pages.refs[1:4] == [3, 3, 0]
    plan = tables.plan(children, 2)
    assert (plan.fresh, plan.copies) == (1, [(2, 3)])
    assert plan.slots == [10, 11, 14, 15]
    tables.carry_out(plan)
    assert tables.books.windows([root, *children])[0] == [(1, 2), (1, 2), (1, 3)]
    assert tables.books.pages.refs[1:5] == [3, 2, 1, 0]
    # the copied half page holds two tokens a second time
    assert tables.books.stored_tokens() == 6 + 2 + 4
    plan = tables.plan([root], 1)
    assert plan.copies == [(2, 4)], "the page of the root is the first child's"


def test_the_last_owner_of_a_tail_page_writes_in_place() -> None:
    tables = BlockTables(PageAllocator(8, max_pages=8), page_size=4)
    (root,) = tables.new(1)
    tables.carry_out(tables.plan([root], 6))
    (child,) = tables.fork([root])
    tables.release([root])
    plan = tables.plan([child], 3)
    assert (plan.copies, plan.fresh, plan.slots) == ([], 1, [10, 11, 12])


def test_slide_gives_back_whole_pages_only() -> None:
    tables = BlockTables(PageAllocator(8, max_pages=8), page_size=4)
    (seq,) = tables.new(1, start=3)
    tables.carry_out(tables.plan([seq], 7))
    assert tables.books.windows([seq]) == ([(1, 2, 3)], [3], [7])
    tables.slide([seq], 4)
    assert tables.books.windows([seq]) == ([(2, 3)], [3], [3])
    tables.truncate([seq], 2)
    assert tables.books.windows([seq]) == ([(2,)], [3], [1])
    tables.slide([seq], 1)
    assert tables.books.windows([seq]) == ([()], [0], [0])
    assert tables.books.pages.free_count == 8


def grown(cache: PagedKVCache, parents: list[int], slide: int = 0) -> list[int]:
    """One model step: two tokens a child."""
    batch = cache.open(parents, 2)
    kv = torch.zeros(len(parents), cache.heads, 2, cache.head_size, device=cache.device)
    for layer in range(cache.layers):
        batch.update(layer, kv, kv)
    return batch.commit(slide=slide)


@pytest.mark.parametrize("length", [1, 3, 5])
def test_a_search_of_two_token_steps_wastes_nothing(device: str, length: int) -> None:
    """A root of one observation, two tokens a node: first token in the second slot, so every node
    fills one page.
    """
    cache = PagedKVCache(layers=2, heads=2, head_size=4, page_size=2, device=device)
    (root,) = cache.new(1, start=1)
    kv = torch.zeros(2, 1, 2, length, 4, device=device)
    cache.append([root], kv, kv)
    nodes = [root]
    for step in range(12):
        nodes += grown(cache, [nodes[step // 2], nodes[step]])
        unique = length + 2 * (len(nodes) - 1)
        assert cache.stored_tokens == unique
        assert cache.pages_in_use == (unique + 1) // 2
    assert cache.stats.copied_pages == 0
    cache.check()


def test_a_window_in_steady_state_keeps_its_pages(device: str) -> None:
    """A full window that drops two tokens a step and gains two: one page given back, one taken,
    none copied.
    """
    cache = PagedKVCache(layers=2, heads=2, head_size=4, page_size=2, device=device)
    (seq,) = cache.new(1, start=1)
    kv = torch.zeros(2, 1, 2, 7, 4, device=device)
    cache.append([seq], kv, kv)
    for _ in range(5):
        (child,) = grown(cache, [seq], slide=2)
        assert cache.pages_in_use == 5
        cache.release([seq])
        assert cache.pages_in_use == 4
        assert cache.lengths([child]) == [7]
        seq = child
    assert cache.stats.copied_pages == 0
    assert cache.gather([seq]).positions.tolist() == [[10, 11, 12, 13, 14, 15, 16]]

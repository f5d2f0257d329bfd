"""Whole numbers of any library are counts, and whatever lists them lists handles; everything else
is refused by name.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_caches import books, filled, tiny_cache

from paged_kv import CacheIndex, KVCacheManager, PagedKVCache
from paged_kv.errors import BadArgument, BadCount, ForeignHandle, StaleHandle

WHOLE: dict[str, Callable[[int], Any]] = {
    "int": int,
    "np.int64": np.int64,
    "np.int32": np.int32,
    "np.uint8": np.uint8,
    "np.array": np.array,
    "tensor": torch.tensor,
    "int32 tensor": lambda number: torch.tensor(number, dtype=torch.int32),
}
LISTS: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "tuple": tuple,
    "np.array": np.array,
    "int32 array": lambda numbers: np.array(numbers, dtype=np.int32),
    "tensor": torch.tensor,
    "list of np.int64": lambda numbers: [np.int64(number) for number in numbers],
    "list of tensors": lambda numbers: [torch.tensor(number) for number in numbers],
    "deque": deque,
}
NOT_WHOLE: dict[str, Any] = {
    "bool": True,
    "no": False,
    "float": 1.0,
    "zero": 0.0,
    "text": "1",
    "none": None,
    "np.bool": np.True_,
    "np.float64": np.float64(1.0),
    "bool tensor": torch.tensor(True),
    "float tensor": torch.tensor(1.0),
    "complex": 1j,
    "dict": {1: 1},
}


def scene() -> tuple[PagedKVCache, list[int]]:
    """Two sequences of three tokens each."""
    cache = tiny_cache(16)
    return cache, filled(cache, 3, 3)


def committed(cache: PagedKVCache, seqs: list[int], slide: Any) -> list[int]:
    with cache.open(seqs, 0) as step:
        return step.commit(slide=slide)


COUNTS: dict[str, Callable[[PagedKVCache, list[int], Any], Any]] = {
    "new": lambda cache, seqs, n: cache.new(n),
    "start": lambda cache, seqs, n: cache.new(1, start=n),
    "fork": lambda cache, seqs, n: cache.fork(seqs, at=n),
    "slide": lambda cache, seqs, n: cache.slide(seqs, n),
    "truncate": lambda cache, seqs, n: cache.truncate(seqs, n),
    "pages_needed": lambda cache, seqs, n: cache.pages_needed(seqs, n),
    "open": lambda cache, seqs, n: cache.open(seqs, n),
    "commit": lambda cache, seqs, n: committed(cache, seqs, n),
    "reclaim": lambda cache, seqs, n: CacheIndex(cache).reclaim(n),
}


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("name", COUNTS)
def test_a_whole_number_of_any_library_is_a_count(name: str, kind: str) -> None:
    """With the same effect as an int."""
    outcomes = []
    for number in (1, WHOLE[kind](1)):
        cache, seqs = scene()
        COUNTS[name](cache, seqs, number)
        cache.check()
        tables = [part.tolist() for part in cache.block_tables(cache.live())]
        outcomes.append((cache.stats, tables))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("kind", NOT_WHOLE)
@pytest.mark.parametrize("name", [name for name in COUNTS if name != "fork"])
def test_what_is_no_whole_number_is_no_count(name: str, kind: str) -> None:
    cache, seqs = scene()
    before = books(cache.books)
    value = NOT_WHOLE[kind]
    with pytest.raises(BadCount) as caught:
        COUNTS[name](cache, seqs, value)
    assert isinstance(caught.value, BadArgument)
    plain = value.tolist() if hasattr(value, "tolist") else value
    assert any(f"is {shown!r}, allowed is" in str(caught.value) for shown in (value, plain))
    assert books(cache.books) == before


@pytest.mark.parametrize("kind", [kind for kind in NOT_WHOLE if kind != "none"])
def test_where_none_has_a_meaning_the_rest_is_refused(kind: str) -> None:
    cache, seqs = scene()
    before = books(cache.books)
    with pytest.raises(BadCount):
        COUNTS["fork"](cache, seqs, NOT_WHOLE[kind])
    assert books(cache.books) == before


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("verb", ["slide", "truncate"])
def test_a_count_a_row_comes_in_any_list(verb: str, kind: str) -> None:
    cache, seqs = scene()
    getattr(cache, verb)(seqs, LISTS[kind]([1, 3]))
    assert cache.lengths(seqs) == [2, 0]
    children = cache.fork(seqs, at=LISTS[kind]([2, 0]))
    assert cache.lengths(children) == [2, 0]
    assert cache.pages_needed(seqs, LISTS[kind]([2, 0])) == cache.pages_needed(seqs, [2, 0])
    batch = cache.open(seqs, 0)
    assert cache.lengths(batch.commit(slide=LISTS[kind]([1, 0]))) == [1, 0]


@pytest.mark.parametrize(
    "counts",
    [np.array([1.0, 1.0]), torch.tensor([True, True]), [1, None], ["1", 1], np.array([[1, 1]])],
)
def test_lists_of_what_is_no_count(counts: Any) -> None:
    cache, seqs = scene()
    before = books(cache.books)
    with pytest.raises(BadCount):
        cache.truncate(seqs, counts)
    assert books(cache.books) == before


HANDLES: dict[str, Callable[[list[int]], Any]] = {
    **{name: kind for name, kind in LISTS.items() if "int32" not in name},
    "generator": lambda seqs: (seq for seq in seqs),
    "dict keys": lambda seqs: dict.fromkeys(seqs).keys(),
    "uint64 array": lambda seqs: np.array(seqs, dtype=np.uint64),
    "objects": lambda seqs: np.array(seqs, dtype=object),
}


@pytest.mark.parametrize("kind", HANDLES)
def test_handles_come_in_any_list(kind: str) -> None:
    cache, seqs = scene()
    listed = HANDLES[kind]
    assert cache.lengths(listed(seqs)) == [3, 3]
    children = cache.fork(listed(seqs))
    assert all(type(child) is int for child in children)
    grow_any(cache, listed(children))
    assert cache.gather(listed(children)).lengths.tolist() == [4, 4]
    assert cache.block_tables(listed(children))[1].tolist() == [4, 4]
    grandchildren = cache.open(listed(children), 0).commit()
    assert cache.page_tables(listed(grandchildren)) == cache.page_tables(children)
    cache.slide(listed(children), 1)
    cache.truncate(listed(children), 1)
    assert cache.pages_freed_by(listed(children)) == cache.pages_freed_by(children)
    with cache.scope() as scope:
        made = cache.fork(listed(children))
        assert scope.keep(listed(made)) == made
    cache.release(listed(made))
    assert cache.release_subtree(seqs[0]) == 3
    cache.release(listed(children), missing_ok=True)
    with pytest.raises(StaleHandle):
        cache.lengths(listed(children))
    assert cache.live() == [seqs[1], grandchildren[1]]
    for record in cache.books.items():
        assert all(type(number) is int for number in (record[0], *record[1][1:]))


def grow_any(cache: PagedKVCache, seqs: Any) -> None:
    kv = torch.zeros(1, 2, 1, 1, 2)
    cache.append(seqs, kv, kv)


@pytest.mark.parametrize("kind", ["np.int64", "tensor", "np.array"])
def test_one_handle_comes_as_any_whole_number(kind: str) -> None:
    cache, (first, second) = scene()
    one = WHOLE[kind]
    index = CacheIndex(cache)
    (child,) = cache.fork([one(first)])
    index.put("a", one(child))
    assert index.get("a") == child
    assert type(index.get("a")) is int
    assert index.victims(keep=[one(child)]) == []
    manager = KVCacheManager(cache, 1)
    manager.set_wm_cache("w", one(second))
    assert manager.get_wm_cache("w") == second
    assert cache.parent(one(child)) == first
    assert cache.children(one(first)) == cache.descendants(one(first)) == [child]
    assert cache.promote(one(child)) == 0
    assert cache.release_subtree(one(first)) == 2
    assert len(index) == 0


NO_LISTS: dict[str, Any] = {
    "int": 5,
    "text": "ab",
    "bytes": b"ab",
    "none": None,
    "dict": {1: 2},
    "scalar array": np.array(5),
    "scalar tensor": torch.tensor(5),
}


@pytest.mark.parametrize("kind", NO_LISTS)
def test_what_is_no_list_of_handles(kind: str) -> None:
    cache, _ = scene()
    value = NO_LISTS[kind]
    calls: dict[str, Callable[[], Any]] = {
        "seqs": lambda: cache.lengths(value),
        "parents": lambda: cache.fork(value),
    }
    before = books(cache.books)
    for name, call in calls.items():
        with pytest.raises(BadArgument, match=f"{name} is .*, allowed is a list of sequences"):
            call()
    for verb in (cache.release, cache.gather, cache.block_tables, cache.page_tables):
        with pytest.raises(BadArgument, match=r"seqs is .*, allowed is a list of sequences"):
            verb(value)
    assert books(cache.books) == before


@pytest.mark.parametrize(
    "seq", [True, 1.5, np.float64(2.0), "a", None, [1], torch.tensor(1.0), 2**60, -1, 0]
)
def test_what_is_no_handle(seq: Any) -> None:
    cache, seqs = scene()
    before = books(cache.books)
    for call in (cache.lengths, cache.release, cache.fork, cache.gather):
        with pytest.raises(ForeignHandle, match="is not a sequence of this cache"):
            call([seqs[0], seq])
    ends: list[Callable[[Any], Any]] = [cache.promote, cache.release_subtree]
    for one in (*ends, cache.parent, cache.children, cache.descendants):
        with pytest.raises(ForeignHandle):
            one(seq)
    assert books(cache.books) == before


@pytest.mark.parametrize(
    "option", ["layers", "heads", "head_size", "page_size", "num_pages", "max_pages"]
)
def test_sizes_of_a_cache_of_any_library(option: str) -> None:
    for kind in WHOLE.values():
        sizes: dict[str, Any] = {
            "layers": 1,
            "heads": 1,
            "head_size": 2,
            "page_size": 2,
            "num_pages": 4,
        }
        sizes[option] = kind(4)
        cache = PagedKVCache(**sizes)
        if option != "max_pages":
            found = cache.pages_reserved if option == "num_pages" else getattr(cache, option)
            assert (found, type(found)) == (4, int)
        (seq,) = cache.new(kind(1))
        kv = torch.zeros(cache.layers, 1, cache.heads, 3, cache.head_size)
        cache.append([seq], kv, kv)
        cache.check()


def test_layers_of_a_batch_are_whole_numbers() -> None:
    cache, seqs = scene()
    batch = cache.open(seqs, 1)
    kv = torch.zeros(2, 1, 1, 2)
    batch.update(np.int64(0), kv, kv)  # type: ignore[arg-type]
    assert batch.keys(torch.tensor(0)).shape == (2, 1, 4, 2)  # type: ignore[arg-type]
    for layer in (0.0, False, None, "0", -1, 1):
        with pytest.raises(BadCount, match=r"layer is .*, allowed is an int from 0 to 0"):
            batch.keys(layer)  # type: ignore[arg-type]

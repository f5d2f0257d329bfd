"""PagedKVCache against the dense oracle: every verb, every step, in pools so small that rare events are common."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from paged_kv import OutOfPages, PagedKVCache, PagedKVError, StaleHandle
from paged_kv.reference.dense import DenseOracle

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FAULTS = ["copy_pages", "scatter", "grow", "gather"]


class Fault(Exception):
    """Raised by the storage where a test asks for it."""


@contextmanager
def fault(cache: PagedKVCache, name: str | None, after: bool) -> Iterator[None]:
    """Let one method of the storage raise, before or after it did its work."""
    if name is None:
        yield
        return
    real = getattr(cache._storage, name)

    def broken(*args: Any, **kwargs: Any) -> None:
        if after:
            real(*args, **kwargs)
        raise Fault(name)

    setattr(cache._storage, name, broken)
    try:
        yield
    finally:
        delattr(cache._storage, name)


def snapshot(cache: PagedKVCache) -> dict[str, Any]:
    """All bookkeeping of a cache, to compare before and after a call that raises."""
    pages = cache._pages
    tables = {name: copy.deepcopy(value) for name, value in vars(cache._tables).items() if name != "pages"}
    return {
        **tables,
        "capacity": pages.capacity,
        "free": list(pages.free),
        "refs": list(pages.refs),
        "stats": copy.copy(cache.stats),
    }


def same(ours: Any, theirs: Any) -> None:
    """Two gathered batches agree to the last bit."""
    for name in ours._fields:
        got, wanted = getattr(ours, name), getattr(theirs, name)
        assert got.shape == wanted.shape, name
        assert got.dtype == wanted.dtype, name
        assert torch.equal(got, wanted), f"{name}: {got} instead of {wanted}"


class CacheMachine(RuleBasedStateMachine):
    """A cache and the oracle side by side. `names` maps a sequence of the cache to the oracle's."""

    device = "cpu"

    @initialize(data=st.data())
    def build(self, data: st.DataObject) -> None:
        shape = {
            "layers": data.draw(st.integers(1, 2)),
            "heads": data.draw(st.integers(1, 2)),
            "head_size": 2,
            "value_head_size": data.draw(st.sampled_from([None, 3])),
            "dtype": data.draw(st.sampled_from(DTYPES)),
            "device": self.device,
        }
        self.page_size, pages = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
        limits: dict[str, Any] = data.draw(
            st.sampled_from(
                [{}, {"grow": False}, {"max_pages": pages + 3}, {"max_pages": 2 * pages}, {"max_bytes": pages + 2}]
            )
        )
        if "max_bytes" in limits:
            one = PagedKVCache(**shape, page_size=self.page_size, num_pages=1).page_bytes
            limits = {"max_bytes": limits["max_bytes"] * one + one - 1}
        self.cache = PagedKVCache(**shape, page_size=self.page_size, num_pages=pages, **limits)
        self.limit = self.cache._pages.max_pages
        self.oracle = DenseOracle(**shape)
        self.names: dict[int, int] = {}
        self.gone: list[int] = []
        self.random = torch.Generator().manual_seed(0)
        self.left = False

    # -- help --------------------------------------------------------------------------------------------

    def draw(self, data: st.DataObject, *, distinct: bool) -> list[int]:
        """Some sequences of the cache."""
        live = list(self.names)
        return data.draw(st.lists(st.sampled_from(live), min_size=1, max_size=4, unique=distinct)) if live else []

    def theirs(self, seqs: Sequence[int]) -> list[int]:
        return [self.names[seq] for seq in seqs]

    def per_row(self, data: st.DataObject, limits: list[int]) -> int | list[int]:
        """A count for all rows, or one a row."""
        if limits and data.draw(st.booleans()):
            return data.draw(st.integers(0, min(limits)))
        return [data.draw(st.integers(0, limit)) for limit in limits]

    def tokens(self, rows: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [layers, rows, heads, count, size] that never repeat."""
        cache = self.cache
        widths = cache.head_size, cache.value_head_size
        keys, values = (
            torch.randn(cache.layers, rows, cache.heads, count, width, generator=self.random).to(
                self.device, cache.dtype
            )
            for width in widths
        )
        return keys, values

    def attempt(self, call: Callable[[], Any], need: int = 0) -> tuple[bool, Any]:
        """Call; where it fails, see that it had to, and that it changed nothing."""
        before = snapshot(self.cache)
        in_reach = self.cache.pages_free + (10**6 if self.limit is None else self.limit - self.cache.pages_reserved)
        try:
            result = call()
        except OutOfPages as error:
            assert need > in_reach, "refused, although it fits"
            assert error.requested == need
            assert error.free == self.cache.pages_free
            assert error.pinned == 0
        except Fault:
            if (
                snapshot(self.cache)["capacity"] != before["capacity"]
            ):  # grown before it failed: more memory, same contents
                return False, None
        else:
            assert need <= in_reach
            return True, result
        assert snapshot(self.cache) == before
        return False, None

    # -- verbs -------------------------------------------------------------------------------------------

    @rule(data=st.data(), count=st.integers(0, 3))
    @precondition(lambda self: len(self.names) < 10)
    def new(self, data: st.DataObject, count: int) -> None:
        seqs = self.cache.new(count, start=data.draw(st.integers(0, self.page_size - 1)))
        self.names.update(zip(seqs, self.oracle.new(count), strict=True))

    @rule(data=st.data())
    @precondition(lambda self: len(self.names) < 10)
    def fork(self, data: st.DataObject) -> None:
        parents = self.draw(data, distinct=False)
        at = self.per_row(data, self.cache.lengths(parents)) if data.draw(st.booleans()) else None
        used = self.cache.pages_in_use
        children = self.cache.fork(parents, at=at)
        assert self.cache.pages_in_use == used
        self.names.update(zip(children, self.oracle.fork(self.theirs(parents), at=at), strict=True))

    @rule(
        data=st.data(),
        count=st.integers(0, 5),
        name=st.sampled_from([None, None, None, *FAULTS]),
        after=st.booleans(),
    )
    def append(self, data: st.DataObject, count: int, name: str | None, after: bool) -> None:
        seqs = self.draw(data, distinct=True)
        keys, values = self.tokens(len(seqs), count)
        positions = None
        if data.draw(st.booleans()):
            positions = torch.randint(0, 99, (len(seqs), count), generator=self.random).to(self.device)
        need, used = self.cache.pages_needed(seqs, count), self.cache.stats.allocated_pages
        with fault(self.cache, name, after):
            done, _ = self.attempt(lambda: self.cache.append(seqs, keys, values, positions), need)
        if done:
            assert self.cache.stats.allocated_pages - used == need
            self.oracle.append(self.theirs(seqs), keys, values, positions)

    @rule(data=st.data(), verb=st.sampled_from(["slide", "truncate"]))
    def shorten(self, data: st.DataObject, verb: str) -> None:
        seqs = self.draw(data, distinct=True)
        count = self.per_row(data, self.cache.lengths(seqs))
        getattr(self.cache, verb)(seqs, count)
        getattr(self.oracle, verb)(self.theirs(seqs), count)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        seqs = self.draw(data, distinct=True)
        freed, free = self.cache.pages_freed_by(seqs), self.cache.pages_free
        self.cache.release(seqs)
        assert self.cache.pages_free - free == freed
        self.oracle.release(self.theirs(seqs))
        self.forget()

    @rule(data=st.data(), verb=st.sampled_from(["release_subtree", "promote"]))
    @precondition(lambda self: self.names)
    def prune(self, data: st.DataObject, verb: str) -> None:
        seq = data.draw(st.sampled_from(list(self.names)))
        assert getattr(self.cache, verb)(seq) == getattr(self.oracle, verb)(self.names[seq])
        self.forget()

    def forget(self) -> None:
        """Drop the sequences that the oracle no longer has."""
        self.gone += [seq for seq, name in self.names.items() if name not in self.oracle.windows]
        self.names = {seq: name for seq, name in self.names.items() if name in self.oracle.windows}

    # -- a model step ------------------------------------------------------------------------------------

    @rule(data=st.data(), name=st.sampled_from([None, None, None, *FAULTS]), after=st.booleans())
    @precondition(lambda self: len(self.names) < 10)
    def step(self, data: st.DataObject, name: str | None, after: bool) -> None:
        parents, left = self.draw(data, distinct=False), data.draw(st.booleans())
        new = data.draw(st.integers(0, 4))
        with fault(self.cache, name, after):
            done, batch = self.attempt(
                lambda: self.cache.open(parents, new + data.draw(st.integers(0, 2)), pad="left" if left else "right")
            )
            if done:
                self.model_step(data, batch, new)

    def model_step(self, data: st.DataObject, batch: Any, new: int) -> None:
        """Look at the contexts, append `new` tokens in two parts, change some rows, and commit."""
        parents, wanted = (
            batch.parents,
            self.oracle.gather(self.theirs(batch.parents), pad="left" if batch.left else "right"),
        )
        for layer in range(self.cache.layers):
            assert torch.equal(batch.keys(layer), wanted.keys[layer])
            assert torch.equal(batch.values(layer), wanted.values[layer])
        assert torch.equal(batch.mask(), wanted.mask)
        keys, values = self.tokens(len(parents), new)
        for part in (slice(0, new // 2), slice(new // 2, new)):
            for layer in range(self.cache.layers):
                batch.update(layer, keys[layer, :, :, part], values[layer, :, :, part])
        rewrite = self.rewritten_rows(data, batch)
        slide = self.per_row(data, batch.lengths)
        positions = (
            torch.randint(0, 99, (len(parents), new), generator=self.random) if data.draw(st.booleans()) else None
        )
        dense = [torch.stack([batch.get(i)[kind] for i in range(self.cache.layers)]) for kind in (0, 1)]
        done, children = self.attempt(
            lambda: batch.commit(
                slide=slide, rewrite=rewrite, positions=None if positions is None else positions.numpy()
            ),
            self.predict(batch, new, slide, rewrite),
        )
        if not done:
            batch.close()
            return
        slides = [slide] * len(parents) if isinstance(slide, int) else slide
        for row, (parent, child) in enumerate(zip(self.theirs(parents), children, strict=True)):
            if rewrite is not None and rewrite[row] is not None:
                parts = (tensor[:, row, :, rewrite[row] :] for tensor in dense)
                self.names[child] = self.oracle.adopt(parent, *parts)
                continue
            placed = None if positions is None else positions[row : row + 1].to(self.device)
            one = slice(row, row + 1)
            (self.names[child],) = self.oracle.commit(
                [parent], keys[:, one], values[:, one], slide=slides[row], positions=placed
            )

    def rewritten_rows(self, data: st.DataObject, batch: Any) -> list[int | None] | None:
        """Change the whole of some rows in the raw buffers; say from which column they are to be stored."""
        if not batch.left or not data.draw(st.booleans()):
            return None
        columns = st.one_of(st.none(), st.integers(0, batch.size))
        rewrite = [data.draw(columns) for _ in batch.parents]
        for row, column in enumerate(rewrite):
            if column is not None:
                for plane in batch.planes:
                    plane[:, row, :, : batch.size] += 1
        return rewrite

    def predict(self, batch: Any, new: int, slide: int | list[int], rewrite: list[int | None] | None) -> int:
        """Pages that a commit takes, counted from starts and lengths alone."""
        slides = [slide] * len(batch.parents) if isinstance(slide, int) else slide
        starts = self.cache.block_tables(batch.parents)[2].tolist()
        total = 0
        for row, (start, length, drop) in enumerate(zip(starts, batch.lengths, slides, strict=True)):
            if rewrite is not None and rewrite[row] is not None:
                total += -((batch.size - rewrite[row]) // -self.page_size)
                continue
            end = (
                start + length if length > drop else (start + drop) % self.page_size
            )  # nothing kept: no page to copy
            shared = end // self.page_size if length > drop else 0
            total += -((end + new) // -self.page_size) - shared if new else 0
        return total

    # -- mistakes ----------------------------------------------------------------------------------------

    @rule(data=st.data())
    @precondition(lambda self: self.names and self.gone)
    def mistake(self, data: st.DataObject) -> None:
        good, stale = list(self.names)[:1], data.draw(st.sampled_from(self.gone))
        keys, values = self.tokens(2, 1)
        calls: list[Callable[[], Any]] = [
            lambda: self.cache.fork([*good, stale]),
            lambda: self.cache.append([*good, stale], keys, values),
            lambda: self.cache.append([*good, *good], keys, values),
            lambda: self.cache.slide([*good, stale], 0),
            lambda: self.cache.truncate([*good, *good], 0),
            lambda: self.cache.slide(good, self.cache.lengths(good)[0] + 1),
            lambda: self.cache.truncate(good, -1),
            lambda: self.cache.fork(good, at=self.cache.lengths(good)[0] + 1),
            lambda: self.cache.release([*good, stale]),
            lambda: self.cache.release([*good, *good]),
            lambda: self.cache.release_subtree(stale),
            lambda: self.cache.promote(stale),
            lambda: self.cache.gather([*good, stale]),
            lambda: self.cache.open([*good, stale], 1),
            lambda: self.cache.pages_needed([*good, stale], 1),
        ]
        before = snapshot(self.cache)
        with pytest.raises(PagedKVError):
            data.draw(st.sampled_from(calls))()
        assert snapshot(self.cache) == before

    # -- what always holds -------------------------------------------------------------------------------

    @invariant()
    def contents_agree(self) -> None:
        if not hasattr(self, "names"):
            return
        self.cache.check()
        self.left = not self.left
        pad = "left" if self.left else "right"
        seqs = list(self.names)
        found = self.cache.gather(seqs, pad=pad)
        same(found, self.oracle.gather(self.theirs(seqs), pad=pad))
        for plane in self.cache._storage.planes:
            assert not plane.pages[0].any(), "the null page was written to"

    @invariant()
    def figures_agree(self) -> None:
        if not hasattr(self, "names"):
            return
        cache = self.cache
        assert cache.live_sequences == len(self.names)
        assert cache.logical_tokens == sum(window.length for window in self.oracle.windows.values())
        assert cache.stored_tokens <= min(cache.logical_tokens, cache.pages_in_use * self.page_size)
        assert cache.pages_in_use + cache.pages_free == cache.pages_reserved
        assert self.limit is None or cache.pages_reserved <= self.limit
        assert cache.stats.allocated_pages - cache.stats.freed_pages == cache.pages_in_use

    def teardown(self) -> None:
        if not hasattr(self, "names"):
            return
        self.cache.release(list(self.names))
        self.cache.check()
        assert self.cache.pages_in_use == self.cache.live_sequences == 0
        for seq in self.gone:
            with pytest.raises(StaleHandle):
                self.cache.lengths([seq])


def test_cache_agrees_with_the_oracle(device: str) -> None:
    machine = type("Machine", (CacheMachine,), {"device": device})
    run_state_machine_as_test(machine, settings=settings(max_examples=300, stateful_step_count=25, deadline=None))


def small(**options: Any) -> PagedKVCache:
    return PagedKVCache(**{"layers": 2, "heads": 1, "head_size": 2, "page_size": 2, "num_pages": 2, **options})


def filled(cache: PagedKVCache, length: int) -> int:
    """A sequence of `length` tokens."""
    (seq,) = cache.new(1)
    kv = torch.arange(length * 4.0, device=cache.device).reshape(2, 1, 1, length, 2)
    cache.append([seq], kv, kv)
    return seq


@pytest.mark.parametrize("verb", ["append", "commit"])
@pytest.mark.parametrize("name", ["copy_pages", "scatter"])
@pytest.mark.parametrize("after", [False, True])
def test_a_failure_in_the_middle_changes_nothing(device: str, verb: str, name: str, after: bool) -> None:
    """Both calls copy a shared tail page and write; whichever half fails, every context reads as before."""
    cache = small(device=device, num_pages=8)
    root = filled(cache, 3)
    seqs = [root, *cache.fork([root, root], at=[2, 3])]
    kv = torch.ones(2, 3, 1, 2, 2, device=device)
    batch = cache.open(seqs, 2)
    for layer in range(2):
        batch.update(layer, kv[layer], kv[layer])
    calls: dict[str, Callable[[], Any]] = {"append": lambda: cache.append(seqs, kv, kv), "commit": batch.commit}
    before, contents = snapshot(cache), [part.clone() for part in cache.gather(seqs)]
    with fault(cache, name, after), pytest.raises(Fault):
        calls[verb]()
    assert snapshot(cache) == before
    assert all(map(torch.equal, contents, cache.gather(seqs)))
    calls[verb]()  # and the same call succeeds afterwards
    cache.check()


def test_growth_that_fails_halfway_leaves_both_planes(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = small(device=device, value_head_size=3)
    keys, values = torch.ones(2, 1, 1, 9, 2, device=device), torch.ones(2, 1, 1, 9, 3, device=device)
    (seq,) = cache.new(1)
    before, rows = snapshot(cache), [plane.rows for plane in cache._storage.planes]

    def full(pages: int) -> None:
        raise MemoryError

    monkeypatch.setattr(cache._storage.planes[1], "grow", full)
    with pytest.raises(MemoryError):
        cache.append([seq], keys, values)
    monkeypatch.undo()
    assert snapshot(cache) == before
    assert [plane.rows for plane in cache._storage.planes] == rows
    cache.append([seq], keys, values)
    assert (cache.pages_reserved, cache.stats.growths) == (8, 1)


class Evictor:
    """Releases the sequences that it was given, oldest first."""

    def __init__(self, cache: PagedKVCache, seqs: list[int], lies: bool = False) -> None:
        self.cache, self.seqs, self.lies, self.asked = cache, seqs, lies, [0]

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
    old, busy = filled(cache, 4), filled(cache, 4)
    evictor = Evictor(cache, [busy, old])
    cache.set_reclaimer(evictor)
    kv = torch.zeros(2, 1, 1, 6, 2, device=device)
    cache.append([busy], kv, kv)
    assert evictor.asked == [0, 2]
    assert (cache.live_sequences, cache.pages_reserved) == (1, 5)
    before = snapshot(cache)
    with pytest.raises(OutOfPages, match=r"1 pages requested, 0 free, 7 pinned"):
        cache.append([busy], kv[:, :, :, :1], kv[:, :, :, :1])
    assert snapshot(cache) == before
    cache.set_reclaimer(Evictor(cache, [], lies=True))
    with pytest.raises(OutOfPages):
        cache.append([busy], kv[:, :, :, :1], kv[:, :, :, :1])
    assert snapshot(cache) == before


def test_the_pool_keeps_no_graph(device: str) -> None:
    """Tokens that a model computes under autograd are stored as numbers, not as the step that made them."""
    cache = small(device=device)
    (seq,) = cache.new(1)
    kv = torch.ones(2, 1, 1, 1, 2, device=device, requires_grad=True)
    cache.append([seq], kv * 2, kv * 2)
    batch = cache.open([seq], 1)
    for layer in range(2):
        batch.update(layer, kv[layer] * 2, kv[layer])
    (child,) = batch.commit()
    assert not cache.gather([child]).keys.requires_grad
    assert not cache._storage.planes[0].rows.requires_grad


def test_a_cache_made_in_inference_mode_works_outside_of_it(device: str) -> None:
    with torch.inference_mode():
        cache = small(device=device)
        seq = filled(cache, 9)
        cache.open([seq], 1)
        cache.gather([seq])
    (child,) = cache.fork([seq])
    cache.append([child], torch.ones(2, 1, 1, 9, 2, device=device), torch.ones(2, 1, 1, 9, 2, device=device))
    assert cache.gather([child]).keys.sum() == cache.gather([seq]).keys.sum() + 36


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
    plane = cache._storage.planes[0].rows.view(-1, 4, 2, 2)  # [page, K0 V0 K1 V1, offset, head_size]
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
    assert cache.working_bytes == 0
    cache.gather([root])
    cache.open([root], 1)
    assert cache.working_bytes == (4 + 4) * cache.token_bytes, "whole pages"
    assert cache.device.type == device


def test_views_of_ever_new_widths_are_not_kept_for_ever() -> None:
    cache = small()
    (seq,) = cache.new(1)
    for room in range(300, 0, -1):
        cache.open([seq], room)
    assert len(cache._stage._layouts) < 256


def test_oversized_counts_cost_nothing_and_change_nothing(device: str) -> None:
    cache = small(device=device)
    seq = filled(cache, 3)
    batch, before = cache.open([seq], 1), snapshot(cache)
    assert cache.pages_needed([seq], 2 * 10**12 - 3) == 10**12 - 2
    with pytest.raises((RuntimeError, MemoryError)):
        cache.open([seq], 10**14)
    assert snapshot(cache) == before
    assert batch.commit() != [seq]


def test_a_tail_page_that_all_its_owners_leave_is_counted_as_freed(device: str) -> None:
    cache = small(device=device, page_size=4, num_pages=8)
    long = filled(cache, 3)
    (short,) = cache.fork([long], at=2)
    kv = torch.ones(2, 2, 1, 1, 2, device=device)
    cache.append([long, short], kv, kv)
    assert (cache.stats.allocated_pages, cache.stats.freed_pages, cache.pages_in_use) == (3, 1, 2)


def test_a_batch_is_padded_where_asked(device: str) -> None:
    cache = small(device=device)
    short, long = filled(cache, 1), filled(cache, 3)
    left, right = cache.gather([short, long], pad="left").mask, cache.gather([short, long]).mask
    assert left.tolist() == [[False, False, True], [True, True, True]]
    assert right.tolist() == [[True, False, False], [True, True, True]]

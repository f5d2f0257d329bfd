"""PagedKVCache against the dense oracle: every verb, every step, in pools so small that rare events
are common.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from small_caches import Fault, books, fault

from paged_kv import OutOfPages, PagedKVCache, PagedKVError, StaleHandle
from paged_kv.tools.reference.dense import DenseOracle

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FAULTS = ["copy_pages", "scatter", "write_pages", "grow", "gather"]


def same(ours: Any, theirs: Any) -> None:
    """Two gathered batches agree to the last bit."""
    for name in ours._fields:
        got = getattr(ours, name)
        wanted = getattr(theirs, name)
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
        self.page_size = data.draw(st.integers(1, 4))
        pages = data.draw(st.integers(1, 6))
        limits: dict[str, Any] = data.draw(
            st.sampled_from(
                [
                    {},
                    {"grow": False},
                    {"max_pages": pages + 3},
                    {"max_pages": 2 * pages},
                    {"max_bytes": pages + 2},
                ]
            )
        )
        if "max_bytes" in limits:
            one = PagedKVCache(**shape, page_size=self.page_size, num_pages=1).page_bytes
            limits = {"max_bytes": limits["max_bytes"] * one + one - 1}
        self.cache = PagedKVCache(**shape, page_size=self.page_size, num_pages=pages, **limits)
        self.limit = self.cache.max_pages
        self.oracle = DenseOracle(**shape)
        self.names: dict[int, int] = {}
        self.gone: list[int] = []
        self.random = torch.Generator().manual_seed(0)
        self.left = False

    # -- help

    def draw(self, data: st.DataObject, *, distinct: bool) -> list[int]:
        """Some sequences of the cache."""
        live = list(self.names)
        return (
            data.draw(st.lists(st.sampled_from(live), min_size=1, max_size=4, unique=distinct))
            if live
            else []
        )

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
        before = books(self.cache.tables)
        in_reach = self.cache.pages_free + (
            10**6 if self.limit is None else self.limit - self.cache.pages_reserved
        )
        try:
            result = call()
        except OutOfPages as error:
            assert need > in_reach, "refused, although it fits"
            assert error.requested == need
            assert error.free == self.cache.pages_free
            assert error.pinned == 0
        except Fault:
            after = books(self.cache.tables)
            grown = after["capacity"] - before["capacity"]
            if grown:  # before it failed: more free pages below the others, and the same contents
                assert after["refs"] == before["refs"] + [0] * grown
                assert after["free"][grown:] == before["free"]
                assert after["growths"] == before["growths"] + 1
                before.update(
                    {name: after[name] for name in ("refs", "free", "capacity", "growths")}
                )
        else:
            assert need <= in_reach
            return True, result
        assert books(self.cache.tables) == before
        return False, None

    # -- verbs

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
            positions = torch.randint(0, 99, (len(seqs), count), generator=self.random).to(
                self.device
            )
        need = self.cache.pages_needed(seqs, count)
        used = self.cache.stats.allocated_pages
        with fault(self.cache, name, after):
            done, _ = self.attempt(lambda: self.cache.append(seqs, keys, values, positions), need)
        if done:
            assert self.cache.stats.allocated_pages - used == need
            self.oracle.append(self.theirs(seqs), keys, values, positions)
            self.spoil(keys, values, positions)

    def spoil(self, *tensors: torch.Tensor | None) -> None:
        """Change what was handed over: the cache must have its own."""
        for tensor in tensors:
            if tensor is not None:
                tensor.fill_(77)

    @rule(data=st.data(), verb=st.sampled_from(["slide", "truncate"]))
    def shorten(self, data: st.DataObject, verb: str) -> None:
        seqs = self.draw(data, distinct=True)
        count = self.per_row(data, self.cache.lengths(seqs))
        getattr(self.cache, verb)(seqs, count)
        getattr(self.oracle, verb)(self.theirs(seqs), count)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        seqs = self.draw(data, distinct=True)
        freed = self.cache.pages_freed_by(seqs)
        free = self.cache.pages_free
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

    @rule(data=st.data())
    @precondition(lambda self: self.gone)
    def release_what_may_be_missing(self, data: st.DataObject) -> None:
        seqs = [*self.draw(data, distinct=False), data.draw(st.sampled_from(self.gone))]
        live = [seq for seq in dict.fromkeys(seqs) if seq in self.names]
        self.cache.release(seqs, missing_ok=True)
        self.oracle.release(self.theirs(live))
        self.forget()

    @rule(data=st.data(), fails=st.booleans())
    @precondition(lambda self: len(self.names) < 10)
    def scope(self, data: st.DataObject, fails: bool) -> None:
        """What is made in a scope ends with it, however it ends: but what is kept, and what was
        there before.
        """
        parents = self.draw(data, distinct=False)
        kept: list[int] = []
        try:
            with self.cache.scope() as scope:
                children = self.cache.fork(parents) + self.cache.new(1)
                self.cache.release(children[1:2])
                kept = scope.keep(children[2::2])
                if fails:
                    raise Fault
        except Fault:
            assert fails
        names = self.oracle.fork(self.theirs(parents)) + self.oracle.new(1)
        self.oracle.release([name for place, name in enumerate(names) if place < 2 or place % 2])
        self.names.update(zip(kept, names[2::2], strict=True))

    def forget(self) -> None:
        """Drop the sequences that the oracle no longer has."""
        self.gone += [seq for seq, name in self.names.items() if name not in self.oracle.windows]
        self.names = {seq: name for seq, name in self.names.items() if name in self.oracle.windows}

    # -- a model step

    @rule(data=st.data(), name=st.sampled_from([None, None, None, *FAULTS]), after=st.booleans())
    @precondition(lambda self: len(self.names) < 10)
    def step(self, data: st.DataObject, name: str | None, after: bool) -> None:
        parents = self.draw(data, distinct=False)
        left = data.draw(st.booleans())
        new = data.draw(st.integers(0, 4))
        with fault(self.cache, name, after):
            done, batch = self.attempt(
                lambda: self.cache.open(
                    parents, new + data.draw(st.integers(0, 2)), pad="left" if left else "right"
                )
            )
            if done:
                self.model_step(data, batch, new)

    def model_step(self, data: st.DataObject, batch: Any, new: int) -> None:
        """Look at the contexts, append `new` tokens in two parts, change some rows, and commit."""
        parents = batch.parents
        pad = "left" if batch.left else "right"
        wanted = self.oracle.gather(self.theirs(parents), pad=pad)
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
            torch.randint(0, 99, (len(parents), new), generator=self.random)
            if data.draw(st.booleans())
            else None
        )
        dense = [
            torch.stack([batch.get(i)[kind] for i in range(self.cache.layers)]) for kind in (0, 1)
        ]
        placed = None if positions is None else positions.numpy().copy()
        done, children = self.attempt(
            lambda: batch.commit(slide=slide, rewrite=rewrite, positions=placed),
            self.predict(batch, new, slide, rewrite),
        )
        if placed is not None:
            placed.fill(77)
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
        """Change the whole of some rows in the raw buffers; say from which column they are to be
        stored.
        """
        if not batch.left or not data.draw(st.booleans()):
            return None
        columns = st.one_of(st.none(), st.integers(0, batch.size))
        rewrite = [data.draw(columns) for _ in batch.parents]
        for row, column in enumerate(rewrite):
            if column is not None:
                for plane in batch.planes:
                    plane[:, row, :, : batch.size] += 1
        return rewrite

    def predict(
        self, batch: Any, new: int, slide: int | list[int], rewrite: list[int | None] | None
    ) -> int:
        """Pages that a commit takes, counted from starts and lengths alone."""
        slides = [slide] * len(batch.parents) if isinstance(slide, int) else slide
        starts = self.cache.block_tables(batch.parents)[2].tolist()
        total = 0
        for row, (start, length, drop) in enumerate(
            zip(starts, batch.lengths, slides, strict=True)
        ):
            if rewrite is not None and rewrite[row] is not None:
                total += -((batch.size - rewrite[row]) // -self.page_size)
                continue
            # nothing kept: no page to copy
            end = start + length if length > drop else (start + drop) % self.page_size
            shared = end // self.page_size if length > drop else 0
            total += -((end + new) // -self.page_size) - shared if new else 0
        return total

    # -- mistakes

    @rule(data=st.data())
    @precondition(lambda self: self.names and self.gone)
    def mistake(self, data: st.DataObject) -> None:
        good = list(self.names)[:1]
        stale = data.draw(st.sampled_from(self.gone))
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
        before = books(self.cache.tables)
        with pytest.raises(PagedKVError):
            data.draw(st.sampled_from(calls))()
        assert books(self.cache.tables) == before

    # -- what always holds

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
        assert cache.live() == list(self.names), "the oldest first"
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
    run_state_machine_as_test(
        machine, settings=settings(max_examples=300, stateful_step_count=25, deadline=None)
    )

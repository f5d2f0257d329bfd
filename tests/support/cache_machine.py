"""PagedKVCache against the dense oracle: every verb, every step, in pools so small that rare events
are common.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from small_caches import Fault, books, fault

from paged_kv import PagedKVCache, PagedKVError, Step
from paged_kv.attention.in_pages import InPages, why_not
from paged_kv.errors import ClosedStep, OutOfPages, StaleHandle
from paged_kv.gather import Gathered
from paged_kv.tools.reference.dense import DenseOracle, Window

FAULTS = ["copy_pages", "write_slots", "write_pages", "grow", "gather", "trimmed"]
STEPS = 4  # that are open at once
faults = st.sampled_from([None, None, None, *FAULTS])


class Opened:
    """An open step, what it was opened on, and the new tokens that it should hold."""

    def __init__(
        self,
        step: Step,
        windows: list[tuple[int, Window]],
        keys: torch.Tensor,
        values: torch.Tensor,
        later: bool,
    ) -> None:
        self.step = step
        self.later = later  # its windows were not copied yet
        self.in_pages: InPages | None = None
        self.shift: torch.Tensor | None = None  # that it adds
        self.windows = windows
        self.keys = keys
        self.values = values

    def grow(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """There are new tokens [layers, rows, heads, count, size] in it."""
        self.keys = torch.cat((self.keys, keys), dim=3)
        self.values = torch.cat((self.values, values), dim=3)


class CacheMachine(RuleBasedStateMachine):
    """A cache and the oracle side by side. `names` maps a sequence of the cache to the oracle's."""

    device = "cpu"
    storage = "exact"
    wide = (torch.float32, torch.float64)
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16)
    value_sizes: Sequence[int | None] = (None, 3)
    other_steps = 0  # that are open and not in `steps`
    refusals: tuple[type[Exception], ...] = (Fault,)  # errors that a call may raise at any time

    @initialize(data=st.data())
    def build(self, data: st.DataObject) -> None:
        shape = {
            "layers": data.draw(st.integers(1, 2)),
            "heads": data.draw(st.integers(1, 2)),
            "head_size": 2,
            "value_head_size": data.draw(st.sampled_from(self.value_sizes)),
            "dtype": data.draw(st.sampled_from(self.dtypes)),
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
            one = PagedKVCache(
                **shape, page_size=self.page_size, storage=self.storage, num_pages=1
            ).page_bytes
            limits = {"max_bytes": limits["max_bytes"] * one + one - 1}
        self.cache = self.make(
            data,
            **shape,
            page_size=self.page_size,
            storage=self.storage,
            num_pages=pages,
            **limits,
        )
        self.limit = self.cache.max_pages
        self.oracle = DenseOracle(**shape)
        self.names: dict[int, int] = {}
        self.steps: list[Opened] = []
        self.gone: list[int] = []
        self.random = torch.Generator().manual_seed(0)
        self.left = False

    def make(self, data: st.DataObject, **options: Any) -> PagedKVCache:
        """The cache in question."""
        return PagedKVCache(**options)

    # -- help

    def agrees(self, got: torch.Tensor, wanted: torch.Tensor) -> bool:
        """Whether what was stored and read is what was handed over: to the last bit."""
        return torch.equal(got, wanted)

    def same(self, ours: Any, theirs: Any) -> None:
        """Two gathered batches agree."""
        for name in ours._fields:
            got = getattr(ours, name)
            wanted = getattr(theirs, name)
            assert got.shape == wanted.shape, name
            assert got.dtype == wanted.dtype, name
            equal = self.agrees if name in ("keys", "values") else torch.equal
            assert equal(got, wanted), f"{name}: {got} instead of {wanted}"

    def draw(self, data: st.DataObject, *, distinct: bool) -> list[int]:
        """Some sequences of the cache."""
        live = list(self.names)
        return (
            data.draw(st.lists(st.sampled_from(live), min_size=1, max_size=4, unique=distinct))
            if live
            else []
        )

    def some_step(self, data: st.DataObject) -> Opened:
        """Drawn by number: hypothesis keeps hold of what it draws."""
        return self.steps[data.draw(st.integers(0, len(self.steps) - 1))]

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
        before = books(self.cache.books)
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
            assert error.pending == self.held_by_steps_alone()
        except self.refusals as error:
            self.see_refused(error)
            after = books(self.cache.books)
            grown = after["capacity"] - before["capacity"]
            if grown:  # before it failed: more free pages below the others, and the same contents
                assert after["refs"] == before["refs"] + [0] * grown
                assert after["free"][grown:] == before["free"]
                assert after["growths"] == before["growths"] + 1
                changed = ("refs", "free", "capacity", "growths")
                before.update({name: after[name] for name in changed})
        else:
            assert need <= in_reach
            return True, result
        assert books(self.cache.books) == before
        return False, None

    def see_refused(self, error: Exception) -> None:
        """An error that changes nothing had a reason."""
        assert isinstance(error, Fault)

    def held_by_steps_alone(self) -> int:
        """Pages that no sequence holds."""
        tables = self.cache.page_tables(self.cache.live())
        return self.cache.pages_in_use - len({page for table in tables for page in table})

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
        root = data.draw(st.booleans())
        used = self.cache.pages_in_use
        children = self.cache.fork(parents, at=at, root=root)
        assert self.cache.pages_in_use == used
        names = self.oracle.fork(self.theirs(parents), at=at, root=root)
        self.names.update(zip(children, names, strict=True))

    @rule(data=st.data(), count=st.integers(0, 5), name=faults, after=st.booleans())
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

    @rule(name=faults, after=st.booleans())
    def trim(self, name: str | None, after: bool) -> None:
        with fault(self.cache, name, after):
            done, _ = self.attempt(self.cache.trim)
        if done:
            assert self.cache.pages_reserved == max(1, self.cache.pages_in_use)

    # -- model steps

    @rule(data=st.data(), room=st.integers(0, 6), name=faults, after=st.booleans())
    @precondition(lambda self: self.names and len(self.steps) < STEPS)
    def open(self, data: st.DataObject, room: int, name: str | None, after: bool) -> None:
        parents = self.draw(data, distinct=False)
        pad = data.draw(st.sampled_from(["left", "right"]))
        need = self.cache.pages_needed(parents, room, fork=True)
        least, most = self.predict(parents, room)
        assert least <= need <= most
        free = self.cache.pages_free, self.cache.pages_reserved
        gather = data.draw(st.sampled_from(["now", "later"]))
        with fault(self.cache, name, after):
            done, step = self.attempt(
                lambda: self.cache.open(parents, room, pad=pad, gather=gather), need
            )
        if done:
            grown = self.cache.pages_reserved - free[1]
            assert self.cache.pages_free == free[0] + grown - need, "they are taken at once"
            none, nothing = self.tokens(len(parents), 0)
            windows = self.oracle.open(self.theirs(parents))
            opened = Opened(step, windows, none, nothing, gather == "later" and self.can_stay())
            self.compare(opened)
            self.steps.append(opened)

    def predict(self, parents: list[int], room: int) -> tuple[int, int]:
        """Pages that a step takes, without and with a copy of each last page that is not full."""
        if not room:
            return 0, 0
        starts = self.cache.block_tables(parents)[2].tolist()
        fresh = 0
        tails = 0
        for start, length in zip(starts, self.cache.lengths(parents), strict=True):
            held = -((start + length) // -self.page_size) if length else 0
            fresh += -((start + length + room) // -self.page_size) - held
            tails += bool(length and (start + length) % self.page_size)
        return fresh, fresh + tails

    def wanted(self, opened: Opened) -> Gathered:
        """The windows that a step was opened on."""
        pad = "left" if opened.step.left else "right"
        return self.oracle.side_by_side([window for _, window in opened.windows], pad=pad)

    def compare(self, opened: Opened) -> None:
        """A step shows what it was opened on, its new tokens, and zeros."""
        step = opened.step
        wanted = self.wanted(opened)
        assert step.past == wanted.keys.shape[3]
        assert step.size == step.past + opened.keys.shape[3]
        if not opened.later:  # else it would copy them
            keys = torch.cat((wanted.keys, opened.keys), dim=3)
            values = torch.cat((wanted.values, opened.values), dim=3)
            for layer in range(self.cache.layers):
                assert self.agrees(step.keys(layer), keys[layer])
                assert self.agrees(step.values(layer), values[layer])
            assert all(plane.shape[3] == step.past + step.room for plane in step.planes)
        for plane in step.columns(step.size, step.past + step.room):
            assert not plane.any(), "columns that are not used are zeros"
        new = torch.ones(len(step.parents), step.size - step.past, dtype=torch.bool)
        assert torch.equal(step.mask(), torch.cat((wanted.mask, new.to(self.device)), dim=1))
        assert step.lengths == wanted.lengths.tolist()
        assert step.then.tolist() == wanted.positions.tolist()

    @rule(data=st.data(), after=st.booleans())
    @precondition(lambda self: self.steps)
    def look(self, data: st.DataObject, after: bool) -> None:
        """The windows of a step are copied at the latest as they are looked at."""
        opened = self.some_step(data)
        with fault(self.cache, "gather", after):
            done, _ = self.attempt(lambda: opened.step.planes)
        opened.later = opened.later and not done

    @rule(data=st.data(), shifted=st.booleans())
    @precondition(lambda self: self.steps)
    def attend_in_pages(self, data: st.DataObject, shifted: bool) -> None:
        """A token attends to windows where they lie, whatever was done to parents and pool since
        they were looked up.
        """
        opened = self.some_step(data)
        if opened.step.size < opened.step.past + opened.step.room:
            self.see(opened, shifted)

    def see(self, opened: Opened, shifted: bool) -> None:
        """One more token of every row and layer."""
        step = opened.step
        if opened.in_pages is None:
            opened.shift = self.some_shift(step) if shifted else None
            opened.in_pages = step.in_pages(opened.shift)
        if opened.in_pages is None:
            assert not opened.later
            return
        keys, values = self.tokens(len(step.parents), 1)
        queries, _ = self.tokens(len(step.parents), 1)
        opened.grow(keys, values)
        for layer in range(self.cache.layers):
            tokens = torch.cat((queries[layer], keys[layer], values[layer]), dim=2)
            seen = opened.in_pages.see(step.size - step.past, layer, tokens)
            assert torch.allclose(seen, self.dense(opened, layer, queries[layer]), atol=1e-4)
        step.fill(1)

    def can_stay(self) -> bool:
        """Whether the windows of a step can be attended to where they lie."""
        cache = self.cache
        return (
            self.storage == "exact"
            and why_not(cache.device, cache.dtype) is None
            and cache._pool.storage.token_rows() is not None
        )

    def some_shift(self, step: Step) -> torch.Tensor:
        """What is added to windows."""
        part = self.cache._pool.storage.form.parts[0]
        shape = 2 * self.cache.layers, 1, part.heads, step.past + 1, part.head_size
        return torch.randn(shape, generator=self.random).to(self.cache.dtype)

    def dense(self, opened: Opened, layer: int, queries: torch.Tensor) -> torch.Tensor:
        """What queries [B, heads, 1, size] see of a step [B, heads, size], computed plainly."""
        rows = []
        for row, (_, window) in enumerate(opened.windows):
            keys = window.keys[layer]
            values = window.values[layer]
            if opened.shift is not None:
                past = keys.shape[1]
                keys = keys + opened.shift[2 * layer, 0, :, :past]
                values = values + opened.shift[2 * layer + 1, 0, :, :past]
            keys = torch.cat((keys, opened.keys[layer, row]), dim=1)
            values = torch.cat((values, opened.values[layer, row]), dim=1)
            scores = queries[row] @ keys.transpose(1, 2) / queries.shape[-1] ** 0.5
            rows.append(torch.softmax(scores, -1) @ values)
        return torch.stack(rows).squeeze(2)

    @rule(data=st.data())
    @precondition(lambda self: self.steps)
    def update(self, data: st.DataObject) -> None:
        opened = self.some_step(data)
        step = opened.step
        opened.later = False
        count = data.draw(st.integers(0, step.room + step.past - step.size))
        keys, values = self.tokens(len(step.parents), count)
        for layer in range(self.cache.layers):
            step.update(layer, keys[layer], values[layer])
        opened.grow(keys.clone(), values.clone())
        self.spoil(keys, values)

    @rule(data=st.data())
    @precondition(lambda self: self.steps)
    def change(self, data: st.DataObject) -> None:
        """Some new tokens are changed where they lie."""
        opened = self.some_step(data)
        step = opened.step
        first = data.draw(st.integers(step.past, step.size))
        for plane in step.columns(first, step.size):
            plane.neg_()
        for tensor in (opened.keys, opened.values):
            tensor[:, :, :, first - step.past :].neg_()

    @rule(data=st.data(), name=faults, after=st.booleans())
    @precondition(lambda self: self.steps and len(self.names) < 10)
    def commit(self, data: st.DataObject, name: str | None, after: bool) -> None:
        """A commit takes no page, whoever did what to the parents meanwhile."""
        opened = self.some_step(data)
        step = opened.step
        rows = len(step.parents)
        new = step.size - step.past
        slide = self.per_row(data, step.lengths)
        counts = None
        if data.draw(st.booleans()):
            counts = [data.draw(st.integers(0, new)) for _ in range(rows)]
        positions = None
        placed = None
        if data.draw(st.booleans()):
            positions = torch.randint(0, 99, (rows, new), generator=self.random)
            placed = positions.numpy().copy()
        taken = self.cache.stats.allocated_pages
        with fault(self.cache, name, after):
            done, children = self.attempt(
                lambda: step.commit(counts=counts, slide=slide, positions=placed)
            )
        if placed is not None:
            placed.fill(77)
        if not done:
            assert not step.closed, "it may be tried again"
            return
        assert self.cache.stats.allocated_pages == taken
        at = None if positions is None else positions.to(self.device)
        names = self.oracle.commit(
            opened.windows, opened.keys, opened.values, counts=counts, slide=slide, positions=at
        )
        self.names.update(zip(children, names, strict=True))
        self.steps.remove(opened)
        self.see_closed(step)

    def see_closed(self, step: Step) -> None:
        """A step that has ended says so, and can be closed again."""
        for call in (step.commit, step.mask, lambda: step.keys(0), lambda: step.then):
            with pytest.raises(ClosedStep):
                call()
        step.close()

    @rule(data=st.data(), way=st.sampled_from(["close", "drop", "leave", "raise", "collect"]))
    @precondition(lambda self: self.steps)
    def give_up(self, data: st.DataObject, way: str) -> None:
        """A step that is not committed gives all its pages back."""
        opened = self.some_step(data)
        self.steps.remove(opened)
        step = opened.step
        if way == "close":
            step.close()
        elif way == "leave":
            with step:
                pass
        elif way == "raise":
            with pytest.raises(Fault), step:
                raise Fault
        elif way == "collect":
            opened.step.itself = opened  # type: ignore[attr-defined]
        if way in ("drop", "collect"):
            del step, opened
            gc.collect(0 if way == "drop" else 2)
        else:
            self.see_closed(step)
        self.see_steps()

    def see_steps(self) -> None:
        """Open steps are counted, and hold pages as long as there are any."""
        steps = len(self.steps) + self.other_steps
        assert self.cache.open_steps == steps
        if not steps:
            assert self.held_by_steps_alone() == 0

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
            lambda: self.cache.parent(stale),
            lambda: self.cache.children(stale),
            lambda: self.cache.descendants(stale),
        ]
        before = books(self.cache.books)
        with pytest.raises(PagedKVError):
            data.draw(st.sampled_from(calls))()
        assert books(self.cache.books) == before

    # -- what always holds

    @invariant()
    def contents_agree(self) -> None:
        if not hasattr(self, "names"):
            return
        self.cache.check()
        self.left = not self.left
        self.compare_all("left" if self.left else "right")
        for opened in self.steps:
            self.compare(opened)
        for plane in self.planes:
            assert not plane.pages[0].any(), "the null page was written to"

    def compare_all(self, pad: str) -> None:
        """All that lives holds what the oracle says."""
        seqs = list(self.names)
        found = self.cache.gather(seqs, pad=pad)
        self.same(found, self.oracle.gather(self.theirs(seqs), pad=pad))

    @property
    def planes(self) -> Any:
        """Where the contents of pages lie."""
        return self.cache._pool.storage.planes  # type: ignore[attr-defined]

    @invariant()
    def trees_agree(self) -> None:
        if not hasattr(self, "names"):
            return
        for seq, name in self.names.items():
            parent = self.cache.parent(seq)
            assert (None if parent is None else self.names[parent]) == self.oracle.parent(name)
            for verb in ("children", "descendants"):
                found = self.theirs(getattr(self.cache, verb)(seq))
                assert sorted(found) == getattr(self.oracle, verb)(name), verb

    @invariant()
    def figures_agree(self) -> None:
        if not hasattr(self, "names"):
            return
        cache = self.cache
        assert cache.live() == list(self.names), "the oldest first"
        assert cache.live_sequences == len(self.names)
        assert cache.logical_tokens == sum(window.length for window in self.oracle.windows.values())
        assert cache.open_steps == len(self.steps) + self.other_steps
        assert cache.stored_tokens <= min(cache.logical_tokens, cache.pages_in_use * self.page_size)
        assert cache.pages_in_use + cache.pages_free == cache.pages_reserved
        assert self.limit is None or cache.pages_reserved <= self.limit
        assert cache.stats.allocated_pages - cache.stats.freed_pages == cache.pages_in_use

    def teardown(self) -> None:
        if not hasattr(self, "names"):
            return
        self.cache.release(list(self.names))
        assert self.cache.pages_in_use == self.held_by_steps_alone()
        while self.steps:
            self.compare(self.steps[-1])
            self.steps.pop()  # and so it is dropped
        self.cache.check()
        assert self.cache.pages_in_use == self.cache.live_sequences == 0
        for seq in self.gone:
            with pytest.raises(StaleHandle):
                self.cache.lengths([seq])

"""A cache with fewer frames than pages among all verbs: pages come and go all the time."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from bundle_machine import BundleMachine
from cache_machine import CacheMachine
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from paged_machine import PagedMachine
from small_caches import Fault, books

from paged_kv import PagedKVCache
from paged_kv.bundles.bundle import Bundle, Source
from paged_kv.errors import OutOfFrames, TierFailed
from paged_kv.pages.tiers.scratch import ScratchFiles
from paged_kv.tiers import Candidates, ColdTier, FileTier, HostTier, LeavesFirst, Tiers

ERRORS = (errno.ENOSPC, errno.EIO)


class Countdown:
    """Says when a call is to fail."""

    def __init__(self) -> None:
        self.left = 0  # calls until then; 0: none does

    def tick(self) -> bool:
        """Whether this call is to fail."""
        if not self.left:
            return False
        self.left -= 1
        return not self.left


class FailingFiles(ScratchFiles):
    """A file system whose calls fail as a countdown says, some of them half done."""

    def __init__(self, countdown: Countdown) -> None:
        self.countdown = countdown

    def write(self, file: int, data: Any, at: int) -> None:
        if self.countdown.tick():
            super().write(file, memoryview(data).cast("B")[:1], at)
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write(file, data, at)

    def read(self, file: int, into: Any, at: int) -> None:
        if self.countdown.tick():
            raise OSError(errno.EIO, "Input/output error")
        super().read(file, into, at)

    def shorten(self, file: int, size: int) -> None:
        if self.countdown.tick():
            raise OSError(errno.EIO, "Input/output error")
        super().shorten(file, size)


class FailingHost(HostTier):
    """A host that has no memory left as a countdown says, and keeps half of what it was given."""

    def __init__(self, countdown: Countdown) -> None:
        super().__init__()
        self.countdown = countdown

    def put(self, pages: Any, records: torch.Tensor) -> None:
        if self.countdown.tick():
            half = len(pages) // 2
            super().put(pages[:half], records[:half])
            raise TierFailed(self.name, "the host has no memory left")
        super().put(pages, records)


class AnyOrder:
    """A policy that gives up whatever comes."""

    def __init__(self) -> None:
        self.random = torch.Generator().manual_seed(1)

    def order(self, candidates: Candidates) -> Any:
        """See `FramePolicy`."""
        assert candidates.pages.all()
        return torch.randperm(len(candidates.pages), generator=self.random).numpy()


class TieredMachine(PagedMachine, BundleMachine):
    """As the others, with pages in tiers, whose calls may fail."""

    kind = "file"
    refusals = (Fault, OutOfFrames, TierFailed)

    @initialize(data=st.data())
    def build(self, data: st.DataObject) -> None:
        """With contents from the start, of more pages than frames."""
        CacheMachine.build(self, data)
        self.grow_tree(data)

    def make(self, data: st.DataObject, **options: Any) -> PagedKVCache:
        self.frames = data.draw(st.integers(2, 8))
        for bound in ("max_pages", "max_bytes", "grow"):
            options.pop(bound, None)
        options["num_pages"] = data.draw(st.integers(1, 12))
        options["max_pages"] = data.draw(st.sampled_from([None, 24]))
        self.countdown = Countdown()
        self.folder = tempfile.TemporaryDirectory()
        cold: ColdTier = FailingHost(self.countdown)
        if self.kind == "file":
            cold = FileTier(self.folder.name, files=FailingFiles(self.countdown))
        policy = LeavesFirst() if data.draw(st.booleans()) else AnyOrder()
        return PagedKVCache(**options, tiers=Tiers(self.frames, cold, policy))

    @rule(data=st.data())
    @precondition(lambda self: len(self.names) < 10)
    def grow_tree(self, data: st.DataObject) -> None:
        """A new sequence, and a child of it that goes on."""
        (root,) = self.cache.new(1, start=data.draw(st.integers(0, self.page_size - 1)))
        self.names[root] = self.oracle.new(1)[0]
        self.extend(root, data.draw(st.integers(1, 2 * self.page_size + 1)))
        (child,) = self.cache.fork([root])
        self.names[child] = self.oracle.fork(self.theirs([root]))[0]
        self.extend(child, data.draw(st.integers(1, self.page_size)))

    @rule(data=st.data(), count=st.integers(1, 3))
    @precondition(lambda self: self.names)
    def extend_one(self, data: st.DataObject, count: int) -> None:
        self.extend(data.draw(st.sampled_from(list(self.names))), count)

    def extend(self, seq: int, count: int) -> None:
        keys, values = self.tokens(1, count)
        need = self.cache.pages_needed([seq], count)
        done, _ = self.attempt(lambda: self.cache.append([seq], keys, values), need)
        if done:
            self.oracle.append(self.theirs([seq]), keys, values)

    def attempt(self, call: Callable[[], Any], need: int = 0) -> tuple[bool, Any]:
        """Some calls meet a tier that fails."""
        number = int(torch.randint(0, 7, (1,), generator=self.random))
        self.countdown.left = number if number < 4 else 0
        try:
            return super().attempt(call, need)
        finally:
            self.countdown.left = 0

    def see_refused(self, error: Exception) -> None:
        if isinstance(error, OutOfFrames):
            assert error.needed > error.allowed
            assert error.allowed + error.held <= self.frames
        if isinstance(error, TierFailed):
            assert not self.countdown.left

    @property
    def planes(self) -> Any:
        return self.cache._pool.storage.hot.planes  # type: ignore[attr-defined]

    def can_export(self) -> bool:
        """Whether open steps leave a frame."""
        try:
            self.cache.export(list(self.names))
        except OutOfFrames as error:
            assert error.allowed == 0
            return False
        return True

    def compare_all(self, pad: str) -> None:
        """As far as open steps leave a frame to read through."""
        seqs = list(self.names)
        if not self.can_export():
            return
        twin = self.twin()
        found = twin.gather(twin.adopt(self.cache.export(seqs)), pad=pad)
        self.same(found, self.oracle.gather(self.theirs(seqs), pad=pad))

    def send(self, seqs: list[int], data: Any) -> Bundle:
        if not self.can_export():
            seqs.clear()
        return self.cache.export(seqs, data=data)

    def receive(self, source: Source) -> list[int]:
        """Some pages are read when they are used."""
        lazy = bool(torch.randint(0, 2, (1,), generator=self.random))
        return self.cache.adopt(source, lazy=lazy)

    @rule(data=st.data(), left=st.booleans())
    @precondition(lambda self: self.names)
    def gather_some(self, data: st.DataObject, left: bool) -> None:
        seqs = self.draw(data, distinct=False)
        pad = "left" if left else "right"
        done, found = self.attempt(lambda: self.cache.gather(seqs, pad=pad))
        if done:
            self.same(found, self.oracle.gather(self.theirs(seqs), pad=pad))

    @rule(data=st.data())
    @precondition(lambda self: self.names)
    def prefetch(self, data: st.DataObject) -> None:
        seqs = self.draw(data, distinct=False)
        before = books(self.cache.books)
        done, found = self.attempt(lambda: self.cache.prefetch(seqs))
        assert books(self.cache.books) == before
        assert not done or 0 <= found <= self.frames

    @rule()
    def look_at_the_figures(self) -> None:
        frames, cold = self.cache.tiers[:2]
        assert 0 <= frames.pages <= self.frames
        assert frames.demotions >= cold.written or not cold.written
        assert cold.pages <= self.cache.pages_reserved + self.frames

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "folder"):
            self.folder.cleanup()

"""Pages in tiers: what moves when, what is refused, and what a failing place loses."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interrupts import interrupted
from tiered_machine import Countdown, FailingFiles

from paged_kv import CacheIndex, PagedKVCache
from paged_kv.errors import (
    BadArgument,
    BadCount,
    NestedCall,
    OutOfFrames,
    TierFailed,
    UnfitForKernel,
)
from paged_kv.pages.tiers.scratch import ScratchFiles
from paged_kv.tiers import Candidates, ColdTier, FileTier, HostTier, Tiers


def make(cold: ColdTier | None, frames: int | None = 4, **options: Any) -> PagedKVCache:
    """A cache with pages of two tokens."""
    return PagedKVCache(
        layers=2,
        heads=1,
        head_size=2,
        page_size=2,
        num_pages=4,
        tiers=Tiers(frames, cold, **options),
    )


def kv(seq: int, count: int) -> torch.Tensor:
    """Tokens that no other sequence has."""
    tokens = torch.arange(2 * 16 * 2, dtype=torch.float32).view(2, 1, 1, 16, 2) + 100 * seq
    return tokens[:, :, :, :count]


def fill(cache: PagedKVCache, rows: int, count: int = 4) -> list[int]:
    """Sequences of two pages each."""
    seqs = cache.new(rows)
    for row, seq in enumerate(seqs):
        cache.append([seq], kv(row, count), -kv(row, count))
    return seqs


def see(cache: PagedKVCache, seqs: list[int], count: int = 4) -> None:
    """They hold what `fill` wrote."""
    for row, seq in enumerate(seqs):
        found = cache.gather([seq])
        assert torch.equal(found.keys, kv(row, count))
        assert torch.equal(found.values, -kv(row, count))
        assert found.positions.tolist() == [list(range(count))]
    cache.check()


def cold_tier(kind: str, folder: Path) -> ColdTier:
    return HostTier() if kind == "host" else FileTier(folder)


KINDS = ["host", "file"]


@pytest.mark.parametrize("kind", KINDS)
def test_pages_come_back_as_they_were(kind: str, tmp_path: Path) -> None:
    cache = make(cold_tier(kind, tmp_path))
    seqs = fill(cache, 10)
    see(cache, seqs)
    frames, cold = cache.tiers
    assert (frames.pages, cold.name, cold.pages, cache.pages_in_use) == (4, kind, 20, 20)
    assert frames.bytes == 4 * cache.page_bytes
    assert cold.bytes_read == cold.read * cache.page_bytes
    assert min(cold.seconds_read, cold.seconds_written) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_that_was_not_written_to_is_written_once(kind: str, tmp_path: Path) -> None:
    cache = make(cold_tier(kind, tmp_path))
    seqs = fill(cache, 10, 3)
    see(cache, seqs, 3)
    see(cache, seqs, 3)
    assert cache.tiers[1].written == 20
    cache.append(seqs[:1], kv(0, 4)[:, :, :, 3:], -kv(0, 4)[:, :, :, 3:])
    cache.gather(seqs[1:3])
    assert cache.tiers[1].written == 21, "its tail, and nothing else"
    assert torch.equal(cache.gather(seqs[:1]).keys, kv(0, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_freed_pages_need_no_frame_and_no_place(kind: str, tmp_path: Path) -> None:
    cache = make(cold_tier(kind, tmp_path))
    seqs = fill(cache, 4)
    written = cache.tiers[1].written
    cache.release(seqs)
    kept = fill(cache, 2)
    assert cache.tiers[1].written == written
    assert (cache.tiers[1].pages, cache.tiers[1].bytes) == (0, 0)
    see(cache, kept)


def test_trim_gives_memory_back(tmp_path: Path) -> None:
    cache = make(FileTier(tmp_path), frames=8)
    seqs = fill(cache, 10)
    cache.release(seqs[:8])
    cache.trim()
    assert cache.pages_reserved == 4
    see_last = cache.gather(seqs[8:])
    assert torch.equal(see_last.keys[:, 1:], kv(9, 4))
    cache.release(seqs[8:])
    cache.trim()
    assert cache.tiers[0].pages == cache.tiers[1].pages == 0
    assert cache.working_bytes < 1000


# -- what is refused


def test_too_many_pages_at_once_are_refused_by_name(tmp_path: Path) -> None:
    cache = make(FileTier(tmp_path))
    seqs = fill(cache, 6)
    live = cache.live()
    wrong: list[Callable[[], Any]] = [
        lambda: cache.gather(seqs),
        lambda: cache.open(seqs[:3], 2),
        lambda: cache.attend(seqs[:2], 1),
        lambda: cache.append(cache.new(1), kv(9, 9), kv(9, 9)),
    ]
    for call in wrong:
        with pytest.raises(OutOfFrames, match=r"\d+ pages are needed .* allowed are 4") as caught:
            call()
        assert (caught.value.allowed, caught.value.held) == (4, 0)
        cache.release([seq for seq in cache.live() if seq not in live])
        assert (cache.pages_in_use, cache.open_steps) == (12, 0)
    see(cache, seqs)


def test_open_steps_hold_their_frames(tmp_path: Path) -> None:
    cache = make(FileTier(tmp_path))
    seqs = fill(cache, 3)
    step = cache.attend(seqs[:1], 2)
    with pytest.raises(OutOfFrames, match="open steps hold 3 frames") as caught:
        cache.gather(seqs[1:2])
    assert (caught.value.needed, caught.value.allowed) == (2, 1)
    assert len(cache.export(seqs)) == 3, "one after another"
    more = torch.ones(1, 1, 2, 2)
    for layer in step.layers:
        layer.attend(more, more, more)
    (child,) = step.commit()
    see(cache, seqs)
    assert torch.equal(cache.gather([child]).keys[:, :, :, 4:], torch.ones(2, 1, 1, 2, 2))


class Nothing:
    name = "nothing"


def test_tiers_of_another_kind_are_refused_by_name(tmp_path: Path) -> None:
    wrong: list[tuple[Any, type[Exception], str]] = [
        (4, BadArgument, "tiers is 4, allowed is None or Tiers"),
        (Tiers(4), BadArgument, "cold is None"),
        (Tiers(None, HostTier()), BadArgument, "frames is None"),
        (Tiers(1, HostTier()), BadCount, "frames is 1"),
        (Tiers(4, Nothing()), BadArgument, "cold is "),  # type: ignore[arg-type]
        (Tiers(4, HostTier(), Nothing()), BadArgument, "policy is "),  # type: ignore[arg-type]
    ]
    for tiers, kind, text in wrong:
        with pytest.raises(kind, match=text):
            PagedKVCache(layers=1, heads=1, head_size=2, page_size=2, tiers=tiers)
    for cold in (HostTier(), FileTier(tmp_path)):
        make(cold)
        with pytest.raises(BadArgument, match="a tier of no other cache"):
            make(cold)
    with pytest.raises(TierFailed, match="No such file or directory"):
        make(FileTier(tmp_path / "missing"))


def test_kernels_of_others_are_refused_by_name() -> None:
    cache = make(HostTier())
    seqs = fill(cache, 1)
    with pytest.raises(UnfitForKernel, match="pages move between tiers"):
        cache.flashinfer_pages(seqs, 0)


# -- who goes first


class Asked:
    """A policy that looks at the cache."""

    def __init__(self) -> None:
        self.look: Callable[[], Any] = list
        self.seen: list[Candidates] = []

    def order(self, candidates: Candidates) -> Any:
        """See `FramePolicy`."""
        self.seen.append(candidates)
        self.look()
        return np.arange(len(candidates.pages))


def test_a_policy_is_told_what_a_page_is() -> None:
    policy = Asked()
    cache = make(HostTier(), policy=policy)
    index = CacheIndex(cache)
    (root,) = fill(cache, 1)
    index.put("root", root)
    index.pin("root")
    cache.fork([root, root])
    other = cache.new(1)
    cache.append(other, kv(1, 6), kv(1, 6))
    (seen,) = policy.seen
    assert seen.shares.tolist() == [3, 3]
    assert seen.pinned.all()
    assert (seen.used > 0).all()


def test_a_policy_may_read_the_books_and_no_pages() -> None:
    policy = Asked()
    cache = make(HostTier(), policy=policy)
    seqs = fill(cache, 2)
    policy.look = lambda: cache.lengths(seqs)
    fill(cache, 1)
    policy.look = lambda: cache.export(seqs)
    with pytest.raises(NestedCall):
        fill(cache, 1)


def test_a_policy_that_is_wrong_is_refused_by_name() -> None:
    policy = Asked()
    policy.order = lambda candidates: np.zeros(4, dtype=np.int64)  # type: ignore[method-assign]
    cache = make(HostTier(), policy=policy)
    seqs = fill(cache, 2)
    with pytest.raises(BadArgument, match="what the policy of tiers returned"):
        fill(cache, 1)
    see(cache, seqs)


def test_leaves_go_before_what_many_share_and_pins_go_last(tmp_path: Path) -> None:
    cache = make(FileTier(tmp_path), frames=10)
    index = CacheIndex(cache)
    pinned, shared, leaf, *recent = fill(cache, 5)
    index.put("pinned", pinned)
    index.pin("pinned")
    children = cache.fork([shared])
    fill(cache, 1)
    assert cache.prefetch([pinned, shared, *recent]) == 0
    assert cache.prefetch([leaf]) == 2
    see(cache, [pinned, shared, leaf, *recent])
    assert torch.equal(cache.gather(children).keys, kv(1, 4))


def test_prefetch_brings_what_fits() -> None:
    cache = make(HostTier())
    seqs = fill(cache, 4)
    assert cache.prefetch(seqs) == 4
    hits = cache.tiers[0].hits
    cache.gather(seqs[:2])
    assert cache.tiers[0].hits == hits + 4
    assert PagedKVCache(layers=1, heads=1, head_size=2, page_size=2).prefetch([]) == 0


# -- what fails


def opened(folder: Path) -> list[str]:
    """Files of a folder that this process has open."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing itself
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return [name for name in found if name.startswith(str(folder))]


def test_the_file_has_no_name_and_goes_with_the_cache(tmp_path: Path) -> None:
    cache = make(FileTier(tmp_path))
    see(cache, fill(cache, 4))
    assert not os.listdir(tmp_path)
    assert len(opened(tmp_path)) == 1
    del cache
    gc.collect()
    assert not opened(tmp_path)


class Flipping(ScratchFiles):
    """A disk that flips a bit of what it read."""

    flips = False

    def read(self, file: int, into: Any, at: int) -> None:
        super().read(file, into, at)
        if self.flips:
            memoryview(into).cast("B")[3] ^= 4


def test_a_record_that_was_damaged_is_refused_by_name(tmp_path: Path) -> None:
    files = Flipping()
    cache = make(FileTier(tmp_path, files=files))
    seqs = fill(cache, 6)
    files.flips = True
    with pytest.raises(TierFailed, match=r"the record of page \d+ was damaged"):
        cache.gather(seqs[:1])
    files.flips = False
    see(cache, seqs)


@pytest.mark.parametrize("name", ["create", "unlink"])
def test_a_file_that_cannot_be_made_is_refused_by_name(name: str, tmp_path: Path) -> None:
    class Failing(ScratchFiles):
        pass

    def fail(*args: Any) -> None:
        raise PermissionError(13, "Permission denied")

    setattr(Failing, name, fail)
    with pytest.raises(TierFailed, match="Permission denied") as caught:
        make(FileTier(tmp_path, files=Failing()))
    assert caught.value.errno == 13


def test_a_fault_of_any_call_to_the_disk_loses_nothing(tmp_path: Path) -> None:
    at = 0
    failed = True
    while failed:
        at += 1
        countdown = Countdown()
        cache = make(FileTier(tmp_path, files=FailingFiles(countdown)))
        seqs = fill(cache, 5)
        countdown.left = at
        failed = False
        for verb in story(cache, seqs):
            pages = cache.pages_in_use
            try:
                verb()
            except TierFailed as error:
                failed = True
                assert error.errno in (5, 28)
                assert cache.pages_in_use == pages
                verb()
        assert bool(countdown.left) != failed
        countdown.left = 0
        see(cache, seqs)
    assert at > 12


def story(cache: PagedKVCache, seqs: list[int]) -> list[Callable[[], Any]]:
    """Calls that move pages: each may be tried again."""

    def step() -> None:
        opened = cache.open(seqs[2:3], 2)
        more = torch.ones(1, 1, 2, 2)
        for layer in opened.layers:
            layer.update(more, more)
        cache.release(opened.commit())

    def attend() -> None:
        with cache.attend(seqs[3:4], 1) as opened:
            more = torch.ones(1, 1, 1, 2)
            for layer in opened.layers:
                layer.attend(more, more, more)

    def grow() -> None:
        (child,) = cache.fork(seqs[:1], at=3)
        try:
            cache.append([child], kv(7, 1), kv(7, 1))
        finally:
            cache.release([child])

    return [
        lambda: cache.gather(seqs[:2]),
        step,
        grow,
        attend,
        lambda: cache.adopt(cache.export(seqs[:0])),
        lambda: cache.export(seqs),
        lambda: cache.prefetch(seqs),
        lambda: see(cache, seqs),
        cache.trim,
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_anywhere_loses_nothing(kind: str, tmp_path: Path) -> None:
    """Before any bytecode of a call that gives pages up, writes them, and reads others."""
    fired = True
    at = 0
    while fired:
        at += 7 + at % 3
        cache = make(cold_tier(kind, tmp_path))
        seqs = fill(cache, 4)
        shot = interrupted(partial(cache.append, seqs[:1], kv(6, 1), -kv(6, 1)), at)
        fired = shot.fired
        shot.forget()
        done = cache.lengths(seqs[:1]) == [5]
        cache.truncate(seqs[:1], int(done))
        see(cache, seqs)
        assert cache.export(seqs).contents.pages == 8
    assert at > 500


# -- coded


class Half:
    """Records of float32 as float16."""

    def encode(self, records: torch.Tensor) -> torch.Tensor:
        """See `Codec`."""
        return records.contiguous().view(torch.float32).half().view(torch.uint8)

    def decode(self, found: torch.Tensor) -> torch.Tensor:
        """See `Codec`."""
        return found.contiguous().view(torch.float16).float().view(torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_cold_pages_may_be_coded(kind: str, tmp_path: Path) -> None:
    cold = HostTier(codec=Half()) if kind == "host" else FileTier(tmp_path, codec=Half())
    cache = make(cold)
    seqs = cache.new(6)
    tokens = torch.randn(2, 6, 1, 4, 2)
    for seq, own in zip(seqs, tokens.split(1, dim=1)):
        cache.append([seq], own, own)
    for _ in range(2):
        for row, seq in enumerate(seqs[:4]):
            assert torch.equal(cache.gather([seq]).keys, tokens[:, row : row + 1].half().float())
    assert cold.nbytes == len(cold) * cache.page_bytes // 2

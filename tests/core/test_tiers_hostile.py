"""Tiers in hostile hands: codecs and policies that are wrong, a forked process, a full disk."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paged_kv import PagedKVCache
from paged_kv.errors import BadArgument, OutOfFrames, TierFailed
from paged_kv.tiers import ColdTier, FileTier, HostTier, Tiers


def make(cold: ColdTier, **options: Any) -> PagedKVCache:
    """A cache of four frames, each of two tokens."""
    return PagedKVCache(
        layers=2, heads=1, head_size=2, page_size=2, num_pages=4, tiers=Tiers(4, cold, **options)
    )


def tokens(number: int) -> torch.Tensor:
    return torch.full((2, 1, 1, 4, 2), float(number))


def fill(cache: PagedKVCache, rows: int) -> list[int]:
    """Sequences of two pages each."""
    seqs = cache.new(rows)
    for row, seq in enumerate(seqs):
        cache.append([seq], tokens(row), -tokens(row))
    return seqs


def see(cache: PagedKVCache, seqs: list[int]) -> None:
    """They hold what `fill` wrote."""
    for row, seq in enumerate(seqs):
        found = cache.gather([seq])
        assert torch.equal(found.keys, tokens(row))
        assert torch.equal(found.values, -tokens(row))
    cache.check()


class Wrong:
    """A codec that is right until it is told what to do."""

    def __init__(self) -> None:
        self.made: Any = torch.clone
        self.found: Any = torch.clone

    def encode(self, records: torch.Tensor) -> Any:
        """See `Codec`."""
        return self.made(records)

    def decode(self, found: torch.Tensor) -> Any:
        """See `Codec`."""
        return self.found(found)


WRONG: list[Any] = [
    lambda records: None,
    lambda records: records[:1],
    lambda records: records[:, :1],
    lambda records: torch.cat((records, records), dim=1),
    lambda records: records.contiguous().view(torch.float32),
    lambda records: records[0],
]


@pytest.mark.parametrize("kind", ["host", "file"])
def test_what_a_codec_makes_is_checked(kind: str, tmp_path: Path) -> None:
    """Records of another size would be written over others, or read from them."""
    for wrong in WRONG:
        codec = Wrong()
        cold = HostTier(codec=codec) if kind == "host" else FileTier(tmp_path, codec=codec)
        cache = make(cold)
        seqs = fill(cache, 6)
        (other,) = cache.new()
        codec.made = wrong
        with pytest.raises(BadArgument, match=r"what encode\(\) of a codec returned"):
            cache.append([other], tokens(7), tokens(7))
        codec.made = torch.clone
        codec.found = wrong
        with pytest.raises(BadArgument, match=r"what decode\(\) of a codec returned"):
            cache.gather(seqs[:2])
        codec.found = torch.clone
        see(cache, seqs)
        codec.made = lambda records: None
        with pytest.raises(BadArgument, match=r"what encode\(\) of a codec returned is None"):
            make(HostTier(codec=codec))


def test_what_a_codec_raises_loses_nothing(tmp_path: Path) -> None:
    codec = Wrong()
    cache = make(FileTier(tmp_path, codec=codec))
    seqs = fill(cache, 6)
    (other,) = cache.new()
    codec.made = lambda records: [][0]
    with pytest.raises(IndexError):
        cache.append([other], tokens(7), tokens(7))
    codec.made = torch.clone
    codec.found = lambda records: [][0]
    with pytest.raises(IndexError):
        cache.gather(seqs[:2])
    codec.found = torch.clone
    see(cache, seqs)


@pytest.mark.parametrize(
    "found", [None, "abc", [[1], [2, 3]], 0.5, np.arange(4.0), np.ones(4, dtype=np.bool_)]
)
def test_a_policy_that_returns_no_numbers_is_refused_by_name(found: Any) -> None:
    class Policy:
        def order(self, candidates: Any) -> Any:
            """See `FramePolicy`."""
            return found

    cache = make(HostTier(), policy=Policy())
    seqs = fill(cache, 2)
    (other,) = cache.new()
    with pytest.raises(BadArgument, match="what the policy of tiers returned"):
        cache.append([other], tokens(2), -tokens(2))
    see(cache, seqs)


def test_a_forked_process_does_not_touch_the_file(tmp_path: Path) -> None:
    """Its parent would lose pages."""
    cache = make(FileTier(tmp_path))
    seqs = fill(cache, 6)
    child = os.fork()
    if not child:
        ended = 1
        try:
            cache.gather(seqs[:2])
        except TierFailed as error:
            ended = 0 if f"process {os.getppid()}" in str(error) else 2
        cache.release(seqs)
        cache.gather([])
        os._exit(ended)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    see(cache, seqs)


def test_a_file_that_may_grow_no_more_loses_nothing(tmp_path: Path) -> None:
    """The system writes a part of what it is given, then refuses."""
    cache = make(FileTier(os.fsencode(tmp_path)))  # type: ignore[arg-type]
    seqs = fill(cache, 4)
    (other,) = cache.new()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * cache.page_bytes + 5, before[1]))
    try:
        with pytest.raises(TierFailed, match="File too large") as caught:
            cache.append([other], tokens(4), -tokens(4))
        assert caught.value.errno
        assert cache.lengths([other]) == [0]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    see(cache, seqs)


def test_a_system_without_reads_at_a_place_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "pwrite")
    monkeypatch.delattr(os, "preadv")
    cache = make(FileTier(tmp_path))
    see(cache, fill(cache, 6))


# -- free pages that a call which failed had worked on, and pages that trim renames


def leave_a_page(cache: PagedKVCache, others: list[int]) -> None:
    """A page that is free, with a copy that nobody will read: in a frame, or in a cold place where
    `others` take all frames.
    """
    (root,) = cache.new()
    cache.append([root], tokens(8)[:, :, :, :3], tokens(8)[:, :, :, :3])
    (child,) = cache.fork([root])
    cache.append([root], tokens(8)[:, :, :, :1], tokens(8)[:, :, :, :1])
    with pytest.raises(OutOfFrames):
        cache.append([child], torch.ones(2, 1, 1, 9, 2), torch.ones(2, 1, 1, 9, 2))
    cache.release([child, root])
    for _ in range(2):
        for seq in others:
            cache.gather([seq])


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("lazy", [False, True])
def test_what_a_call_that_failed_left_is_read_by_nobody(lazy: bool, cold: bool) -> None:
    source = make(HostTier())
    bundle = source.export(fill(source, 6))
    cache = make(HostTier())
    others = fill(cache, 3)
    leave_a_page(cache, others if cold else [])
    seqs = cache.adopt(bundle, lazy=lazy)
    for _ in range(2):
        see(cache, seqs)
        see(cache, others)


@pytest.mark.parametrize("cold", [False, True])
def test_a_page_that_trim_moved_is_written_when_it_goes(cold: bool) -> None:
    cache = make(HostTier())
    seqs = fill(cache, 6)
    cache.release(seqs[:3])
    leave_a_page(cache, seqs[3:] if cold else [])
    cache.trim()
    assert cache.pages_reserved == 6
    for _ in range(2):
        for row, seq in enumerate(seqs[3:], 3):
            assert torch.equal(cache.gather([seq]).keys, tokens(row))


@pytest.mark.parametrize("kind", ["host", "file"])
def test_cold_pages_beyond_a_trim_are_dropped(kind: str, tmp_path: Path) -> None:
    cache = make(HostTier() if kind == "host" else FileTier(tmp_path))
    seqs = fill(cache, 10)
    cache.release(seqs[:7])
    cache.trim()
    cache.prefetch([])
    assert cache.tiers[1].pages <= cache.pages_reserved == 6
    for row, seq in enumerate(seqs[7:], 7):
        assert torch.equal(cache.gather([seq]).keys, tokens(row))


def test_a_step_holds_its_frames_after_a_trim_too() -> None:
    """Else its second layer would go to the frames of another sequence."""
    cache = make(HostTier())
    seqs = fill(cache, 4)
    step = cache.attend(seqs[3:], 2)
    cache.release(seqs[:1])
    before = cache.page_tables(seqs[3:])
    cache.trim()
    assert cache.page_tables(seqs[3:]) != before
    more = torch.ones(1, 1, 2, 2)
    step.layers[0].attend(more, more, more)
    for seq in seqs[1:3]:
        with pytest.raises(OutOfFrames, match="open steps hold 3 frames"):
            cache.gather([seq])
    step.layers[1].attend(more, more, more)
    (child,) = step.commit()
    found = cache.gather([child])
    assert torch.equal(found.keys[:, :, :, :4], tokens(3))
    assert found.keys[:, :, :, 4:].eq(1).all()
    for row, seq in enumerate(seqs[1:3], 1):
        assert torch.equal(cache.gather([seq]).keys, tokens(row))

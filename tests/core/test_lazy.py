"""Snapshots that are loaded lazily: pages are read and checked when they are used."""

from __future__ import annotations

import os
import shutil
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from interrupts import interrupted

from paged_kv import CacheIndex, PagedKVCache
from paged_kv.errors import BadArgument, BadSnapshot
from paged_kv.snapshot import Snapshot, load, save
from paged_kv.tiers import FileTier, HostTier, Tiers

TOKENS = torch.randn(2, 6, 1, 5, 2, generator=torch.Generator().manual_seed(0))


def make(tiers: Tiers | None) -> PagedKVCache:
    return PagedKVCache(layers=2, heads=1, head_size=2, page_size=2, num_pages=4, tiers=tiers)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six sequences of five tokens, at places of their own, and a child of each."""
    cache = make(None)
    seqs = cache.new(6)
    cache.append(seqs, TOKENS, -TOKENS, torch.arange(30).view(6, 5))
    found = tmp_path / "saved"
    save(found, cache, [*seqs, *cache.fork(seqs, at=3)], data="mine")
    return found


def ways(tmp_path: Path) -> list[Tiers]:
    """With room for all, and for a few."""
    return [Tiers(), Tiers(4, FileTier(tmp_path))]


def see(cache: PagedKVCache, seqs: list[int]) -> None:
    """They hold what was saved."""
    for row, seq in enumerate(seqs):
        own = slice(row % 6, row % 6 + 1)
        tokens = cache.lengths([seq])[0]
        found = cache.gather([seq])
        assert torch.equal(found.keys, TOKENS[:, own, :, :tokens])
        assert torch.equal(found.values, -TOKENS[:, own, :, :tokens])
        first = 5 * (row % 6)
        assert found.positions.tolist() == [list(range(first, first + tokens))]
    cache.check()


def test_pages_are_read_when_they_are_used(folder: Path, tmp_path: Path) -> None:
    for tiers in ways(tmp_path):
        cache = make(tiers)
        seqs = load(folder, cache, lazy=True)
        assert cache.tiers[-1].name == "snapshot"
        assert (cache.tiers[-1].pages, cache.tiers[-1].read) == (18, 0)
        assert cache.lengths(seqs) == [5] * 6 + [3] * 6
        cache.gather(seqs[:1])
        assert cache.tiers[-1].read == 3
        see(cache, seqs)
        see(cache, seqs)
        written = sum(tier.written for tier in cache.tiers)
        assert written == 0, "what lies in a snapshot need not be written again"


def test_it_is_written_on_in(folder: Path, tmp_path: Path) -> None:
    for tiers in ways(tmp_path):
        cache = make(tiers)
        seqs = load(folder, cache, lazy=True)
        more = torch.ones(2, 1, 1, 2, 2)
        cache.append(seqs[:1], more, more)
        cache.truncate(seqs[1:2], 2)
        cache.append(seqs[1:2], more, more)
        found = cache.gather(seqs[1:2])
        assert found.positions.tolist() == [[5, 6, 7, 8, 9]]
        assert torch.equal(found.keys[:, :, :, :3], TOKENS[:, 1:2, :, :3])
        see(cache, seqs[6:])
        assert torch.equal(cache.gather(seqs[:1]).keys[:, :, :, 5:], more)


def test_a_folder_may_be_saved_into_or_removed(folder: Path, tmp_path: Path) -> None:
    for tiers in ways(tmp_path):
        cache = make(tiers)
        seqs = load(folder, cache, lazy=True)
        cache.append(seqs[:1], torch.ones(2, 1, 1, 1, 2), torch.ones(2, 1, 1, 1, 2))
        assert save(tmp_path / "other", cache, seqs).new_pages == 18
        cache.truncate(seqs[:1], 1)
        save(folder, make(None), [])
        assert len(list(folder.iterdir())) == 2, "and its files are gone"
        see(cache, seqs)
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "other", folder)
        again = make(Tiers())
        seqs = load(folder, again, lazy=True)
        again.truncate(seqs[:1], 1)
        shutil.rmtree(folder)
        see(again, seqs)
        shutil.copytree(tmp_path / "other", folder)
        shutil.rmtree(tmp_path / "other")
        save(folder, again, seqs)


def flip(folder: Path, page: int) -> None:
    """Change a bit of a page."""
    (segment,) = folder.glob("pages-*")
    with Snapshot(folder) as snapshot:
        size = snapshot.manifest.sizes.page_bytes
    data = bytearray(segment.read_bytes())
    data[4096 + page * size + 5] ^= 1
    segment.write_bytes(data)


def test_a_page_that_was_damaged_is_refused_when_it_is_used(folder: Path, tmp_path: Path) -> None:
    flip(folder, 4)
    for tiers in ways(tmp_path):
        cache = make(tiers)
        seqs = load(folder, cache, lazy=True)
        bad = [seq for seq in seqs if 5 in cache.page_tables([seq])[0]]
        good = [seq for seq in seqs if seq not in bad]
        assert len(bad) == 2
        live = cache.live()
        for _ in range(2):
            for call in (cache.gather, cache.prefetch, cache.export):
                with pytest.raises(BadSnapshot, match="holds a page that was damaged"):
                    call(bad)
            with pytest.raises(BadSnapshot):
                cache.open(bad[:1], 1)
            with pytest.raises(BadSnapshot):
                cache.attend(bad[:1], 1)
        assert (cache.live(), cache.open_steps, cache.pages_in_use) == (live, 0, 18)
        for seq in good:
            assert cache.gather([seq]).keys.any()
        cache.release(bad)
        cache.check()


def test_files_stay_open_as_long_as_pages_are_read_from_them(folder: Path) -> None:
    cache = make(Tiers())
    with Snapshot(folder) as snapshot:
        seqs = cache.adopt(snapshot, lazy=True)
        cache.gather(seqs[:1])
    with pytest.raises(BadSnapshot, match="it was closed"):
        cache.gather(seqs[1:2])
    assert torch.equal(cache.gather(seqs[:1]).keys, TOKENS[:, :1])


def test_a_bundle_may_be_adopted_lazily(tmp_path: Path) -> None:
    source = make(None)
    seqs = source.new(6)
    source.append(seqs, TOKENS, -TOKENS, torch.arange(30).view(6, 5))
    cache = make(Tiers(4, FileTier(tmp_path)))
    see(cache, cache.adopt(source.export(seqs), lazy=True))


def test_a_cache_without_tiers_is_refused_by_name(folder: Path) -> None:
    cache = make(None)
    with pytest.raises(BadArgument, match=r"lazy is True, allowed is False, or a cache with tiers"):
        load(folder, cache, lazy=True)
    assert not cache.live()
    assert len(load(folder, cache)) == 12


def test_a_load_that_was_broken_off_leaves_pages_as_good_as_new(folder: Path) -> None:
    """Before any bytecode of what adopts: the pages that it was to have are written by others, and
    those that it has can be read.
    """
    fired = True
    at = 0
    ends = set()
    while fired:
        at += 31 + at % 7
        cache = make(Tiers())
        shot = interrupted(partial(load, folder, cache, lazy=True), at)
        fired = shot.fired
        shot.forget()
        ends.add(len(cache.live()))
        see(cache, cache.live())
        cache.release(cache.live())
        seqs = cache.new(18)
        cache.append(seqs, *[torch.ones(2, 18, 1, 2, 2)] * 2)
        assert cache.gather(seqs).keys.eq(1).all()
        cache.check()
    assert ends == {0, 12}


def opened(folder: Path) -> int:
    """Files of a folder that this process has open."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing itself
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return len([name for name in found if name.startswith(str(folder))])


def test_files_are_closed_when_no_page_is_read_from_them(folder: Path) -> None:
    cache = make(Tiers(4, HostTier()))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        kept = load(folder, cache, lazy=True)
        for _ in range(3):
            seqs = load(folder, cache, lazy=True)
            see(cache, seqs)
            assert opened(folder) == 2
            cache.release(seqs)
            cache.gather([])
            assert opened(folder) == 1
        see(cache, kept)
        del cache
    assert opened(folder) == 0


def test_entries_are_loaded_lazily(folder: Path, tmp_path: Path) -> None:
    source = make(None)
    seqs = load(folder, source)
    index = CacheIndex(source)
    for key, seq in enumerate(seqs[1:]):
        index.put(key, seq)
    save(tmp_path / "other", source, seqs[:1], indexes=[index])
    cache = make(Tiers(4, HostTier()))
    mine = CacheIndex(cache)
    first = load(tmp_path / "other", cache, indexes=[mine], lazy=True)
    assert (cache.tiers[-1].pages, cache.tiers[-1].read) == (18, 0)
    see(cache, [*first, *filter(None, map(mine.get, range(11)))])


def test_processes_that_were_forked_read_one_file(folder: Path) -> None:
    """Each at places of its own."""
    cache = make(Tiers(4, HostTier()))
    seqs = load(folder, cache, lazy=True)
    children = []
    for _ in range(2):
        child = os.fork()
        if not child:
            ended = 1
            try:
                for _ in range(20):
                    see(cache, seqs)
                ended = 0
            finally:
                os._exit(ended)
        children.append(child)
    for _ in range(20):
        see(cache, seqs)
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert ends == [0, 0]

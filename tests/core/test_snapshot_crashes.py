"""Whatever ends a save, at whatever point: what is found is the snapshot before or the new one."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
from disk import FOLDER, Disk, Memory, Op, Watched, crash_states, disk_of, failing, replayed
from small_caches import books, filled, tiny_cache
from snapshot_stories import Story, damaged, held, killed

from paged_kv import PagedKVCache
from paged_kv.bundles.bundle import Bundle
from paged_kv.errors import BadSnapshot, PagedKVError, SnapshotFailed
from paged_kv.snapshot import Snapshot, load, packing

ERRORS = (errno.ENOSPC, errno.EIO)


@pytest.fixture(params=["one segment", "two at once"])
def halves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """New pages go to one segment, or to two that are written at once."""
    if request.param == "two at once":
        monkeypatch.setattr(packing, "WORTH", 1)


def recorded(folder: Path, *, again: bool) -> tuple[Disk | None, list[Op]]:
    """What was there before a save, and what the save did."""
    story = Story(folder)
    files = Watched()
    if again:
        story.first()
        before = disk_of(story.folder)
        story.go_on()
        story.second(files=files)
        return before, files.log
    story.first(files=files)
    return None, files.log


def judged(before: Disk | None, log: list[Op], new: str, samples: int = 4) -> list[str]:
    """What is wrong with states that a power cut may leave."""
    old = held(before)
    wrong = []
    for length, disk in crash_states(before, log, random.Random(0), samples):
        allowed = (new,) if length == len(log) else (old, new)
        try:
            found = held(disk)
        except BadSnapshot as error:
            wrong.append(f"after {length} of {len(log)} calls: {error}")
        else:
            if found not in allowed:
                wrong.append(f"after {length} of {len(log)} calls: {found!r}")
    return wrong


@pytest.mark.usefixtures("halves")
@pytest.mark.parametrize("again", [False, True])
def test_a_power_cut_leaves_the_old_or_the_new(tmp_path: Path, again: bool) -> None:
    before, log = recorded(tmp_path, again=again)
    new = "second" if again else "first"
    assert held(replayed(before, log, set(), None)) == new
    assert judged(before, log, new, samples=12) == []
    kinds = {op.kind for op in log}
    assert {"create", "write", "sync", "sync_folder", "replace"} <= kinds
    assert ("remove" in kinds) == again
    assert (log[1].kind == "sync_folder") != again, "the folder of a new folder"


@pytest.mark.usefixtures("halves")
@pytest.mark.parametrize("again", [False, True])
def test_every_sync_is_needed(tmp_path: Path, again: bool) -> None:
    before, log = recorded(tmp_path, again=again)
    syncs = [number for number, op in enumerate(log) if op.kind.startswith("sync")]
    assert len(syncs) >= 5
    for number in syncs:
        without = [op for at, op in enumerate(log) if at != number]
        found = judged(before, without, "second" if again else "first")
        assert found, f"nothing is lost without call {number}, {log[number].kind}"


def test_no_call_but_those_of_the_module(tmp_path: Path) -> None:
    """A log that is replayed is the folder: nothing was done behind its back."""
    before, log = recorded(tmp_path, again=True)
    assert replayed(before, log, set(), None) == disk_of(tmp_path / FOLDER)


# -- errors of the system


@pytest.mark.usefixtures("halves")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("code", ERRORS)
def test_an_error_at_any_call_leaves_the_old_or_the_new(
    tmp_path: Path, code: int, late: bool
) -> None:
    at = 0
    failed = True
    while failed:
        at += 1
        folder = tmp_path / str(at)
        folder.mkdir()
        story = Story(folder)
        story.first()
        story.go_on()
        before = books(story.cache.books)
        files = failing(at, lambda: OSError(code, os.strerror(code)), late=late)
        try:
            story.second(files=files)
            failed = False
        except SnapshotFailed as error:
            assert error.errno == code
            assert os.strerror(code) in str(error)
        assert books(story.cache.books) == before
        found = held(disk_of(story.folder))
        assert found in ("first", "second") if failed else found == "second"
        story.second()
        assert held(disk_of(story.folder)) == "second"
        kept = Snapshot(story.folder).manifest
        assert len(os.listdir(story.folder)) == 2 + len(kept.segments), "nothing is left behind"
    assert at > 20


@pytest.mark.usefixtures("halves")
def test_an_interrupt_at_any_call_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    at = 0
    failed = True
    while failed:
        at += 1
        folder = tmp_path / str(at)
        folder.mkdir()
        story = Story(folder)
        story.first()
        story.go_on()
        try:
            story.second(files=failing(at, KeyboardInterrupt, late=bool(at % 2)))
            failed = False
        except KeyboardInterrupt:
            story.cache.check()
        found = held(disk_of(story.folder))
        assert found in ("first", "second") if failed else found == "second"
        story.second()
        assert held(disk_of(story.folder)) == "second"


@pytest.mark.parametrize("code", ERRORS)
def test_an_error_at_any_call_of_a_load_changes_nothing(tmp_path: Path, code: int) -> None:
    story = Story(tmp_path)
    story.first()
    at = 0
    failed = True
    while failed:
        at += 1
        cache = tiny_cache(64)
        before = books(cache.books)
        try:
            seqs = load(
                story.folder,
                cache,
                files=failing(at, lambda: OSError(code, os.strerror(code)), late=bool(at % 2)),
            )
            failed = False
        except SnapshotFailed as error:
            assert error.errno == code
            assert books(cache.books) == before
    assert cache.lengths(seqs) == [3, 5, 4]
    assert at > 10


# -- kills


def test_a_killed_save_loses_at_most_itself(tmp_path: Path) -> None:
    rng = random.Random(0)
    done = 0
    for _ in range(25):
        done = killed(tmp_path / FOLDER, done, rng)
    assert done > 0


# -- damage


def test_no_damage_goes_unnoticed(tmp_path: Path) -> None:
    story = Story(tmp_path)
    story.first()
    story.add(6)
    story.first()
    disk = disk_of(story.folder)
    assert len(disk) == 4, "two segments, all of whose pages are in use"
    assert held(disk) == "first"
    rng = random.Random(0)
    for _ in range(1500):
        broken = damaged(disk, rng)
        with pytest.raises(BadSnapshot):
            held(broken)
    for name in disk.keys() - {"manifest.json"}:
        with pytest.raises(BadSnapshot, match="is missing"):
            held({each: data for each, data in disk.items() if each != name})


def test_damage_is_found_before_anything_changes(tmp_path: Path) -> None:
    story = Story(tmp_path)
    story.first()
    disk = disk_of(story.folder)
    cache = PagedKVCache(layers=1, heads=1, head_size=2, page_size=2, num_pages=64)
    held_before = filled(cache, 3)
    before = books(cache.books)
    rng = random.Random(1)
    for _ in range(100):
        with pytest.raises(PagedKVError):
            cache.adopt(Snapshot(FOLDER, files=Memory(damaged(disk, rng))))
        assert books(cache.books) == before
    assert cache.lengths(held_before) == [3]
    assert isinstance(Bundle.of(Snapshot(FOLDER, files=Memory(disk))), Bundle)

"""Sequences in a folder: saved, saved again, loaded whole or refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from disk import FOLDER, Memory, disk_of
from safetensors.numpy import load_file
from small_caches import books, filled, tiny_cache
from snapshot_stories import Story

from paged_kv import CacheIndex, KVCacheManager, PagedKVCache
from paged_kv.errors import (
    BadArgument,
    BadBundle,
    BadSnapshot,
    OtherFingerprint,
    PagedKVError,
    SnapshotFailed,
)
from paged_kv.search_order import SearchOrder
from paged_kv.snapshot import Snapshot, load, packing, save
from paged_kv.snapshot.files import FILES
from paged_kv.snapshot.manifest import MANIFEST, read_manifest, render
from paged_kv.snapshot.tensors import digest


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path)


def segments(folder: Path) -> list[tuple[str, int]]:
    return [(each.name, each.pages) for each in read_manifest(FILES, folder).segments]


def same(cache: PagedKVCache, seqs: list[int], other: PagedKVCache, theirs: list[int]) -> None:
    for ours, found in zip(cache.gather(seqs), other.gather(theirs), strict=True):
        assert torch.equal(ours, found)


# -- saved and loaded


def test_another_process_goes_on_from_a_snapshot(tmp_path: Path) -> None:
    story = Story(tmp_path)
    story.first()
    code = (
        "import sys, torch; sys.path.insert(0, 'tests/support');"
        "from small_caches import tiny_cache; from paged_kv.snapshot import load;"
        f"cache = tiny_cache(64); seqs = load({str(story.folder)!r}, cache);"
        "print(cache.lengths(seqs), float(cache.gather(seqs).keys.double().sum()))"
    )
    root = Path(__file__).parents[2]
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    total = float(story.cache.gather(story.seqs).keys.double().sum())
    assert out.stdout.strip() == f"[3, 5, 4] {total}"


def test_all_that_lives_is_saved_where_nothing_is_named(story: Story) -> None:
    assert save(story.folder, story.cache).pages == story.cache.pages_in_use
    cache = tiny_cache(64)
    same(story.cache, story.cache.live(), cache, load(story.folder, cache))


def test_an_index_and_a_manager_come_back(story: Story) -> None:
    index = CacheIndex(story.cache)
    index.put(("state", 1), story.seqs[0])
    manager = KVCacheManager(story.cache, 1)
    manager.set_init_caches([0], ["root"], story.seqs[1:2], pin=True)
    save(story.folder, story.cache, [], indexes=[index, manager], data={"seed": 2**60})
    cache = tiny_cache(64)
    twin = CacheIndex(cache)
    other = KVCacheManager(cache, 1)
    with Snapshot(story.folder) as snapshot:
        assert cache.adopt(snapshot, indexes=[twin, other]) == []
        assert snapshot.data() == {"seed": 2**60}
        assert len(snapshot) == 0
    assert list(twin) == [("state", 1)]
    assert other.init_pools[0].pinned("root")
    same(story.cache, index.handles(), cache, twin.handles())
    other.check()


def searched(cache: PagedKVCache) -> tuple[KVCacheManager, SearchOrder]:
    """A manager that evicts nodes by the scores of a search, and contexts by their priorities."""
    order = SearchOrder()
    return KVCacheManager(cache, 1, recur_policy=order.policy, wm_policy="priority"), order


@pytest.mark.parametrize("by_file", [False, True])
def test_a_manager_evicts_in_the_order_in_which_it_would_have(
    tmp_path: Path, by_file: bool
) -> None:
    cache = tiny_cache(64)
    manager, order = searched(cache)
    order.begin(["root"], priors=[0.25] * 4)
    for action, value in enumerate((0.5, 0.9, 0.1, 0.7)):
        key = ("node", action)
        order.expand(key, "root", action, reward=0.0, value=value, priors=[0.5, 0.5])
        manager.set_recur_cache(key, *filled(cache, 2))
    for key, score in (("a", 0.5), ("b", float("inf")), ("c", -1.0), ("d", None), ("e", 2.0)):
        manager.set_wm_cache(key, *filled(cache, 1), score)
    manager.wm_pool.set_priorities(["a"], [3.0])
    manager.wm_pool.pin("d")
    data = {"order": order.book()}

    other = tiny_cache(64)
    twin, twin_order = searched(other)
    if by_file:
        save(tmp_path / FOLDER, cache, [], indexes=[manager], data=data)
        source: Any = Snapshot(tmp_path / FOLDER)
    else:
        source = cache.export([], indexes=[manager], data=data)
    other.adopt(source, indexes=[twin])
    twin_order.restore(source.data()["order"])

    assert twin.stats == manager.stats
    assert manager.wm_pool.victims() == ["c", "e", "a", "b"]
    assert twin.wm_pool.victims() == manager.wm_pool.victims()
    assert manager.recur_pool.victims() != [("node", action) for action in range(4)]
    while manager.recur_pool.victims():
        assert twin.recur_pool.victims() == manager.recur_pool.victims()
        for each, known in ((manager, order), (twin, twin_order)):
            left = len(each.recur_pool)
            known.expand(("more", left), ("node", 2), left % 2, reward=0.0, value=0.9)
            assert each.reclaim(1)
    assert twin.reclaim(1)
    assert manager.reclaim(1)
    assert list(twin.wm_pool) == list(manager.wm_pool) == ["a", "b", "d", "e"]
    for each in (manager, twin):
        each.check()


def test_two_head_sizes_come_back(tmp_path: Path, device: str) -> None:
    shape: dict[str, Any] = {"layers": 2, "heads": 2, "head_size": 3, "value_head_size": 5}
    shape |= {"page_size": 3, "dtype": torch.bfloat16, "device": device}
    cache = PagedKVCache(**shape)
    seqs = cache.new(2)
    keys = torch.randn(2, 2, 2, 7, 3).to(device, torch.bfloat16)
    values = torch.randn(2, 2, 2, 7, 5).to(device, torch.bfloat16)
    cache.append(seqs, keys, values)
    save(tmp_path / FOLDER, cache, seqs)
    other = PagedKVCache(**shape)
    same(cache, seqs, other, load(tmp_path / FOLDER, other))


def test_the_files_are_safetensors(story: Story) -> None:
    story.first()
    for path in story.folder.iterdir():
        if path.suffix != ".safetensors":
            continue
        found = load_file(path)
        if path.name.startswith("pages"):
            pages = story.cache.pages_in_use
            assert found["pages"].shape == (pages, story.cache.page_bytes)
            assert found["positions"].shape == (pages, 2)
            assert found["digests"].shape == (pages, 16)
        else:
            assert found["lengths"].tolist() == [3, 5, 4]


@pytest.mark.parametrize("warm", [1, 1 << 30])
def test_two_segments_are_written_at_once(
    story: Story, monkeypatch: pytest.MonkeyPatch, warm: int
) -> None:
    monkeypatch.setattr(packing, "WORTH", 1)
    monkeypatch.setattr(packing, "WARM", warm)
    story.seqs += story.cache.new(2)
    kv = torch.ones(1, 2, 1, 4, 2)
    story.cache.append(story.seqs[-2:], kv, kv)  # four pages, of which two differ
    pages = story.cache.pages_in_use
    assert save(story.folder, story.cache, story.seqs).new_pages == pages - 2
    assert [count for _, count in segments(story.folder)] == [pages // 2, pages - 2 - pages // 2]
    cache = tiny_cache(64)
    same(story.cache, story.seqs, cache, load(story.folder, cache))
    story.grow(story.seqs[:1], 1)
    assert save(story.folder, story.cache, story.seqs).new_pages == 1
    assert [count for _, count in segments(story.folder)][2:] == [1]
    with Snapshot(story.folder) as snapshot:
        snapshot.verify()


# -- saved again


def test_only_new_pages_are_written_again(story: Story) -> None:
    story.first()
    one = segments(story.folder)
    assert save(story.folder, story.cache, story.seqs).new_pages == 0
    assert segments(story.folder) == one
    story.grow(story.seqs[1:2], 1)  # a tail is filled further
    children = story.cache.fork(story.seqs)
    story.grow(children[2:], 2)
    saved = save(story.folder, story.cache, [*story.seqs, *children])
    assert saved.new_pages == 2
    assert saved.pages == story.cache.pages_in_use
    assert saved.bytes_written < 10_000
    assert [pages for _, pages in segments(story.folder)] == [one[0][1], 2]
    cache = tiny_cache(64)
    same(story.cache, [*story.seqs, *children], cache, load(story.folder, cache))


def test_equal_pages_are_written_once(tmp_path: Path) -> None:
    cache = tiny_cache(64)
    seqs = cache.new(5)
    kv = torch.ones(1, 5, 1, 2, 2)
    cache.append(seqs, kv, kv)
    assert save(tmp_path / FOLDER, cache, seqs)[:2] == (5, 1)
    other = tiny_cache(64)
    found = load(tmp_path / FOLDER, other)
    same(cache, seqs, other, found)
    assert other.pages_in_use == 5


def test_a_segment_goes_when_less_than_half_of_it_is_in_use(story: Story) -> None:
    story.first()
    (old,) = segments(story.folder)
    assert old[1] == 7
    saved = save(story.folder, story.cache, story.seqs[1:])  # 5 of 7 pages
    assert (saved.new_pages, segments(story.folder)) == (0, [old])
    saved = save(story.folder, story.cache, story.seqs[2:])  # 2 of 7
    assert saved.new_pages == 2
    ((name, pages),) = segments(story.folder)
    assert (name != old[0], pages) == (True, 2)
    assert sorted(os.listdir(story.folder))[1].startswith("pages")
    assert len(os.listdir(story.folder)) == 3
    cache = tiny_cache(64)
    same(story.cache, story.seqs[2:], cache, load(story.folder, cache))


def test_many_small_segments_are_merged(story: Story) -> None:
    counts = []
    for _ in range(40):
        story.add(1)
        save(story.folder, story.cache, story.seqs, sync=False)
        counts.append(len(segments(story.folder)))
    assert max(counts) == 32
    assert counts[-1] < 32
    assert sum(pages for _, pages in segments(story.folder)) == story.cache.pages_in_use
    cache = tiny_cache(64)
    same(story.cache, story.seqs, cache, load(story.folder, cache))


def test_what_a_killed_save_left_is_removed(story: Story) -> None:
    story.folder.mkdir()
    for name in ("pages-0123456789abcdef.safetensors", "manifest-0123456789abcdef.json"):
        (story.folder / name).write_bytes(b"torn")
    story.first()
    assert len(os.listdir(story.folder)) == 3


def test_two_saves_at_once_are_refused(story: Story) -> None:
    story.first()
    lock = FILES.lock(story.folder)
    with pytest.raises(SnapshotFailed, match="another one is being saved"):
        story.first()
    lock.close()
    story.first()


# -- refused


def test_a_folder_of_something_else_is_left_alone(story: Story, tmp_path: Path) -> None:
    story.folder.mkdir()
    (story.folder / "thesis.tex").write_text("x")
    with pytest.raises(BadSnapshot, match=r"holds 'thesis.tex', and no manifest.json"):
        story.first()
    assert os.listdir(story.folder) == ["thesis.tex"]
    for path in (story.folder, story.folder / "thesis.tex", tmp_path / "nowhere"):
        with pytest.raises(BadSnapshot, match=r"it has no manifest.json"):
            Snapshot(path)
    with pytest.raises(PagedKVError):
        save(story.folder / "thesis.tex", story.cache)
    with pytest.raises(PagedKVError):
        save(tmp_path / "no" / "where", story.cache)
    with pytest.raises(BadArgument, match="sync is 1"):
        save(story.folder, story.cache, sync=1)  # type: ignore[arg-type]


def test_a_snapshot_of_another_cache_is_refused(story: Story) -> None:
    save(story.folder, story.cache, story.seqs, identity={"weights": "one"})
    before = disk_of(story.folder)
    with pytest.raises(OtherFingerprint, match="weights"):
        save(story.folder, story.cache, story.seqs, identity={"weights": "two"})
    with pytest.raises(OtherFingerprint, match="page_size"):
        load(story.folder, tiny_cache(8, page_size=4), identity={"weights": "one"})
    with pytest.raises(OtherFingerprint, match="weights"):
        load(story.folder, tiny_cache(8))
    assert disk_of(story.folder) == before
    assert load(story.folder, tiny_cache(8), identity={"weights": "one"})


def change(told: dict[str, Any], path: str, value: Any) -> None:
    *above, last = path.split(".")
    for name in above:
        told = told[int(name)] if isinstance(told, list) else told[name]
    told[int(last) if isinstance(told, list) else last] = value


HOSTILE: dict[str, tuple[str, Any]] = {
    "another format": ("format", "other"),
    "a later version": ("version", 2),
    "no fingerprint": ("fingerprint", 3),
    "no page size": ("fingerprint", {}),
    "a page of no bytes": ("fingerprint.page_bytes", 0),
    "a page of too many bytes": ("fingerprint.page_bytes", 2**62),
    "pages of text": ("counts.pages", "7"),
    "pages that are true": ("counts.pages", True),
    "too many pages": ("counts.pages", 2**40),
    "far too many pages": ("counts.pages", 10**30),
    "pages below zero": ("counts.pages", -1),
    "too many rows": ("counts.rows", 2**45),
    "more names than rows": ("counts.named", 4),
    "entries below zero": ("counts.entries", -1),
    "a huge text": ("counts.extra", 2**47),
    "one count too few": ("counts", {"pages": 7}),
    "a file elsewhere": ("tables", "../../etc/passwd"),
    "a file of another kind": ("tables", "manifest.json"),
    "no file": ("tables", None),
    "a segment elsewhere": ("segments.0.0", "/etc/passwd"),
    "a segment that is missing": ("segments.0.0", "pages-0123456789abcdef.safetensors"),
    "a segment of more pages": ("segments.0.1", 2**40),
    "a segment of fewer pages": ("segments.0.1", 6),
    "a segment of no digest": ("segments.0.2", "0"),
    "no segments": ("segments", []),
    "segments that are text": ("segments", "no"),
    "a segment of two fields": ("segments", [["a", 1]]),
    "another digest": ("digest", "0" * 32),
    "another field": ("counts.more", 1),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_manifest_that_lies_is_refused(story: Story, name: str) -> None:
    story.first()
    disk = disk_of(story.folder)
    told = json.loads(disk[MANIFEST])["snapshot"]
    change(told, *HOSTILE[name])
    body = json.dumps(told, sort_keys=True, separators=(",", ":"))
    text = f'{{"checksum":"{digest(body.encode()).hex()}","snapshot":{body}}}\n'
    cache = tiny_cache(64)
    before = books(cache.books)
    with pytest.raises((BadSnapshot, OtherFingerprint)):
        cache.adopt(Snapshot(FOLDER, files=Memory({**disk, MANIFEST: text.encode()})))
    assert books(cache.books) == before


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b'{"snapshot":1}', b"[" * 100_000, b"\xff\x00", b"1e999"]
)
def test_what_is_no_manifest_is_refused(story: Story, text: bytes) -> None:
    story.folder.mkdir()
    (story.folder / MANIFEST).write_bytes(text)
    for call in (lambda: Snapshot(story.folder), story.first):
        with pytest.raises(BadSnapshot, match="manifest"):
            call()


def rewritten(story: Story, edit: Callable[[dict[str, Any]], None]) -> Snapshot:
    """A snapshot whose tables say something else, with checksums that fit."""
    from paged_kv.bundles.contents import Contents, Tables
    from paged_kv.snapshot.manifest import Places, read_tables, tables_bytes

    manifest = read_manifest(FILES, story.folder)
    contents, places = read_tables(FILES, story.folder, manifest)
    fields = {name: field.copy() for name, field in contents.tables._asdict().items()}
    fields |= {name: field.copy() for name, field in places._asdict().items()}
    fields["extra"] = contents.extra
    edit(fields)
    tables = Tables(*(fields[name] for name in Tables._fields))
    other = Contents(contents.fingerprint, tables, contents.pages, contents.named, fields["extra"])
    counts, data = tables_bytes(other, Places(fields["segment"], fields["row"]))
    disk = disk_of(story.folder)
    disk[manifest.tables] = data
    told = manifest._replace(counts=counts, digest=digest(data).hex())
    return Snapshot(FOLDER, files=Memory({**disk, MANIFEST: render(told)}))


LIES: dict[str, tuple[str, Any]] = {
    "a segment out of range": ("segment", 1),
    "a segment below zero": ("segment", -1),
    "a row out of range": ("row", 7),
    "a row below zero": ("row", -1),
    "a page out of range": ("pages", 7),
    "a start out of range": ("starts", 2),
    "a length out of range": ("lengths", 2**62),
    "a parent out of range": ("parents", 9),
    "a place out of range": ("places", 2**63 - 1),
    "a row of no record": ("rows", 9),
}


@pytest.mark.parametrize("name", LIES)
def test_tables_that_lie_are_refused(story: Story, name: str) -> None:
    story.first()
    field, value = LIES[name]
    cache = tiny_cache(64)
    cache.adopt(rewritten(story, lambda fields: None))
    before = books(cache.books)

    def edit(fields: dict[str, Any]) -> None:
        fields[field][0] = value

    with pytest.raises((BadSnapshot, BadBundle)):
        cache.adopt(rewritten(story, edit))
    assert books(cache.books) == before


def test_what_cannot_be_decoded_is_refused(story: Story) -> None:
    story.first()
    for extra in ("{", "[]", '["tuple",[1,2,3]]', "\ud7ff"):
        found = rewritten(story, lambda fields, extra=extra: fields.update(extra=extra))
        with pytest.raises(BadBundle):
            found.data()
        with pytest.raises(BadSnapshot):
            found.verify()


def test_a_position_that_overflows_is_refused(tmp_path: Path) -> None:
    cache = tiny_cache(8)
    (seq,) = cache.new()
    kv = torch.ones(1, 1, 1, 1, 2)
    cache.append([seq], kv, kv, torch.tensor([[2**63 - 2]]))
    save(tmp_path / FOLDER, cache, [seq])
    with pytest.raises(BadBundle, match="place"):
        load(tmp_path / FOLDER, tiny_cache(8))


def test_memory_of_one_read_is_used_again(story: Story) -> None:
    story.first()
    with Snapshot(story.folder) as snapshot:
        first = snapshot.read(np.arange(2)).records
        again = snapshot.read(np.arange(2)).records
    assert first.base is again.base


def test_without_xxhash_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['xxhash'] = None\n"
        "from paged_kv.errors import MissingPackage\n"
        "try:\n    import paged_kv.snapshot\n"
        "except MissingPackage as error:\n    print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install paged-kv[snapshot]" in out.stdout

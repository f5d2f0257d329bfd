"""Sequences are saved into a folder, beside what was saved there before.

Files are written under new names, and made safe; then a new manifest takes the place of the old
one, and what only the old one named is removed. So a save that fails or is killed at any point
leaves the snapshot before, or the new one.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from paged_kv.bundles.bundle import Source, batches
from paged_kv.bundles.codec import Codec
from paged_kv.bundles.contents import Contents
from paged_kv.bundles.holders import Holder
from paged_kv.checks import flag
from paged_kv.errors import BadArgument, BadSnapshot
from paged_kv.snapshot.files import FILES, Files, named
from paged_kv.snapshot.manifest import (
    MANIFEST,
    OURS,
    Manifest,
    read_manifest,
    render,
    tables_bytes,
)
from paged_kv.snapshot.packing import Packing
from paged_kv.snapshot.segment import Listed, Segment, SegmentWriter, Sizes
from paged_kv.snapshot.tensors import digest

if TYPE_CHECKING:
    from paged_kv.cache import PagedKVCache

PIECE = 1 << 25  # bytes of pages that are looked at, and written, at a time


class Saved(NamedTuple):
    """What a save did."""

    pages: int  # of the sequences
    new_pages: int  # of them, that were written
    bytes_written: int


def save(
    path: str | os.PathLike[str],
    cache: PagedKVCache,
    seqs: Iterable[int] | None = None,
    *,
    indexes: Iterable[Holder] = (),
    data: object = None,
    identity: Mapping[str, Any] | None = None,
    codec: Codec | None = None,
    sync: bool = True,
    files: Files = FILES,
) -> Saved:
    """Save sequences (None: all) into a folder, which is made if need be, in place of what was
    saved there.

    Pages that lie there already are not written again. Without `sync` it returns before the system
    has made the files safe: a kill of the process loses nothing, a power cut may lose the folder.
    For all else see `PagedKVCache.export`. Cost: bytes of all pages are read, those of new ones
    written. Raises BadSnapshot for a folder of something else, OtherFingerprint for one of another
    cache, SnapshotFailed, and as `export` does.
    """
    folder = Path(path)
    saving = Saving(files, folder, flag("sync", sync))
    chosen = cache.live() if seqs is None else seqs
    with named(folder):
        return cache.export_to(
            saving.save, chosen, indexes=indexes, data=data, identity=identity, codec=codec
        )


def save_bundle(
    path: str | os.PathLike[str], bundle: Source, *, sync: bool = True, files: Files = FILES
) -> Saved:
    """As `save`, of what was exported: such as the nodes of a language model.

    Raises BadArgument for what is no bundle, and as `save` does.
    """
    if not isinstance(getattr(bundle, "contents", None), Contents):
        raise BadArgument("bundle", bundle, "what export() returned, or a snapshot")
    folder = Path(path)
    with named(folder):
        return Saving(files, folder, flag("sync", sync)).save(bundle)


class Saving:
    """One save."""

    def __init__(self, files: Files, folder: Path, sync: bool) -> None:
        self._files = files
        self._folder = folder
        self._sync = sync
        self._made: list[Path] = []  # files of no manifest
        self._written = 0

    def save(self, source: Source) -> Saved:
        """Save what a source holds."""
        files = self._files
        made = files.make_folder(self._folder)
        if made and self._sync:
            files.sync_folder(self._folder.absolute().parent)
        lock = files.lock(self._folder)
        try:
            saved = self._save(source, self._before())
        except BaseException:
            for path in self._made:
                with suppress(OSError):
                    files.remove(path)
            raise
        finally:
            lock.close()
        return saved

    def _before(self) -> Manifest | None:
        """What was saved here. Raises BadSnapshot for a folder of something else."""
        names = self._files.names(self._folder)
        if MANIFEST in names:
            return read_manifest(self._files, self._folder)
        other = sorted(name for name in names if not OURS.fullmatch(name))
        if other:
            raise BadSnapshot(self._folder, f"it holds {other[0]!r}, and no {MANIFEST}")
        return None

    def _save(self, source: Source, before: Manifest | None) -> Saved:
        contents = source.contents
        fingerprint = contents.fingerprint
        sizes = Sizes(fingerprint["page_bytes"], fingerprint["page_size"])
        if before is not None:
            contents.compare(before.fingerprint)
        packing = Packing(contents.pages, self._digests(before), partial(self._writer, sizes))
        try:
            for numbers in batches(contents.pages, sizes.page_bytes, PIECE):
                packing.add(numbers, source.read(numbers))
            moved = packing.let_go()
            for part in batches(len(moved), sizes.page_bytes, PIECE):
                packing.add(moved[part], source.read(moved[part]))
            segments, places = packing.finish(sync=self._sync)
        finally:
            packing.close()
        counts, tables = tables_bytes(contents, places)
        name = self._write("tables-{}.safetensors", tables)
        manifest = Manifest(fingerprint, counts, name, digest(tables).hex(), segments)
        self._publish(manifest)
        written = packing.written * sizes.page_bytes
        return Saved(contents.pages, packing.written, written + self._written)

    def _digests(self, before: Manifest | None) -> list[tuple[Listed, list[bytes]]]:
        """The checksums of all pages that lie here, segment by segment."""
        found: list[tuple[Listed, list[bytes]]] = []
        if before is None:
            return found
        for listed in before.segments:
            segment = Segment(self._files, self._folder, listed, before.sizes)
            segment.close()
            found.append((listed, segment.digests))
        return found

    # -- files

    def _new(self, pattern: str) -> Path:
        path = self._folder / pattern.format(secrets.token_hex(8))
        self._made.append(path)
        return path

    def _writer(self, sizes: Sizes) -> SegmentWriter:
        return SegmentWriter(self._files, self._new("pages-{}.safetensors"), sizes)

    def _write(self, pattern: str, data: bytes) -> str:
        """A new file that holds these bytes."""
        path = self._new(pattern)
        file = self._files.create(path)
        try:
            self._files.write(file, data, 0)
            if self._sync:
                self._files.sync(file)
        finally:
            file.close()
        self._written += len(data)
        return path.name

    def _publish(self, manifest: Manifest) -> None:
        """Let a manifest take the place of the one before, once all that it names is safe."""
        files = self._files
        folder = self._folder
        name = self._write("manifest-{}.json", render(manifest))
        if self._sync:
            files.sync_folder(folder)
        self._made = []  # from here on the new manifest may be in its place, whatever happens
        files.replace(folder / name, folder / MANIFEST)
        if self._sync:
            files.sync_folder(folder)
        named_now = {MANIFEST, manifest.tables, *(each.name for each in manifest.segments)}
        for other in files.names(folder):
            if other not in named_now and OURS.fullmatch(other):
                files.remove(folder / other)

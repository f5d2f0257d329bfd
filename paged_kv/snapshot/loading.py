"""A snapshot that is opened: what it holds, and its pages, each checked as it is read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import finalize

import numpy as np

from paged_kv.bundles.bundle import Bytes, Chunk, batches, data_of, extra_of
from paged_kv.bundles.codec import Codec
from paged_kv.bundles.contents import Contents, Ints, check_positions, checked
from paged_kv.bundles.holders import Holder
from paged_kv.errors import BadBundle, BadSnapshot
from paged_kv.snapshot.files import FILES, Files, named
from paged_kv.snapshot.manifest import MANIFEST, read_manifest, read_tables
from paged_kv.snapshot.segment import Segment

if TYPE_CHECKING:
    from paged_kv.cache import PagedKVCache


class Snapshot:
    """A folder that `save` wrote, to look into and to adopt; a context manager, which closes it.

    Names, sizes and tables are checked when it is opened, pages as they are read. Raises
    BadSnapshot for what is none, or was damaged; SnapshotFailed where the system cannot read it.

    >>> import tempfile, torch
    >>> from paged_kv import PagedKVCache
    >>> from paged_kv.snapshot import Snapshot, save
    >>> cache = PagedKVCache(layers=1, heads=1, head_size=2, page_size=2)
    >>> root, = cache.new()
    >>> cache.append([root], torch.ones(1, 1, 1, 3, 2), torch.ones(1, 1, 1, 3, 2))
    >>> folder = tempfile.mkdtemp()
    >>> save(folder, cache, [root], data={"turn": 7}).new_pages
    2
    >>> other = PagedKVCache(layers=1, heads=1, head_size=2, page_size=2)
    >>> with Snapshot(folder) as snapshot:
    ...     other.lengths(other.adopt(snapshot)), snapshot.data()
    ([3], {'turn': 7})
    """

    def __init__(self, path: str | os.PathLike[str], *, files: Files = FILES) -> None:
        self.path = Path(path)
        self._segments: list[Segment] = []
        self._memory = np.empty(0, dtype=np.uint8)
        self._closed = False
        finalize(self, _close, self._segments)  # one that a cache reads is closed by nobody else
        with named(self.path):
            try:
                self.manifest = read_manifest(files, self.path)
            except (FileNotFoundError, NotADirectoryError):
                raise BadSnapshot(self.path, f"it has no {MANIFEST}") from None
            self._contents, self._places = read_tables(files, self.path, self.manifest)
            try:
                for listed in self.manifest.segments:
                    segment = Segment(files, self.path, listed, self.manifest.sizes)
                    self._segments.append(segment)
            except BaseException:
                self.close()
                raise

    @property
    def contents(self) -> Contents:
        """All but the pages, as `cache.adopt` wants it."""
        return self._contents

    def __len__(self) -> int:
        return self._contents.named

    def data(self, codec: Codec | None = None) -> Any:
        """What the caller gave along. Raises BadBundle."""
        return data_of(self._contents, codec)

    def read(self, numbers: Ints, out: Bytes | None = None) -> Chunk:
        """The pages of these numbers. Raises BadSnapshot, SnapshotFailed."""
        if self._closed:
            raise BadSnapshot(self.path, "it was closed")
        sizes = self.manifest.sizes
        found = Chunk(
            self._room(len(numbers), sizes.page_bytes) if out is None else out,
            np.empty((len(numbers), sizes.page_size), dtype=np.int64),
        )
        segments = self._places.segment[numbers]
        rows = self._places.row[numbers]
        apart = (np.diff(segments) != 0) | (np.diff(rows) != 1)
        ends = [*(np.flatnonzero(apart) + 1).tolist(), len(numbers)]
        first = 0
        with named(self.path):
            for end in ends:
                part = Chunk(found.records[first:end], found.positions[first:end])
                self._segments[segments[first]].read(int(rows[first]), part)
                first = end
        return found

    def _room(self, pages: int, page_bytes: int) -> Any:
        """Memory that is used again."""
        size = pages * page_bytes
        if len(self._memory) < size:
            self._memory = np.empty(size, dtype=np.uint8)
        return self._memory[:size].reshape(pages, page_bytes)

    def verify(self) -> None:
        """Read everything. Raises BadSnapshot, SnapshotFailed. Cost: bytes of the pages."""
        contents = self._contents
        try:
            checked(contents, self.manifest.sizes.page_size)
            extra_of(contents, _AnyCodec())
            for numbers in batches(contents.pages, self.manifest.sizes.page_bytes):
                check_positions(self.read(numbers).positions)
        except BadBundle as error:
            raise BadSnapshot(self.path, error.why) from error

    def close(self) -> None:
        """Let go of its files. Twice is fine."""
        self._closed = True
        _close(self._segments)

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close(segments: Iterable[Segment]) -> None:
    for segment in segments:
        segment.close()


class _AnyCodec:
    """Stands for a caller's codec where its values do not matter."""

    def encode(self, value: Any) -> object:
        return value

    def decode(self, found: Any) -> object:
        return found


def load(
    path: str | os.PathLike[str],
    cache: PagedKVCache,
    *,
    indexes: Iterable[Holder] = (),
    identity: Mapping[str, Any] | None = None,
    codec: Codec | None = None,
    lazy: bool = False,
    files: Files = FILES,
) -> list[int]:
    """Have a cache adopt what was saved; returns the sequences in the order they were named in.

    All or nothing. With `lazy`, which needs a cache with tiers, each page is read and checked when
    it is first used: what uses a page that was damaged raises BadSnapshot then, and changes
    nothing. Files stay open until no page is read from them any more, so the folder may be replaced
    or removed meanwhile. Raises BadSnapshot, SnapshotFailed, and as `PagedKVCache.adopt` does.
    """
    snapshot = Snapshot(path, files=files)
    adopt = partial(cache.adopt, indexes=indexes, identity=identity, codec=codec, lazy=lazy)
    if lazy:  # whatever ends the call, the cache may have it
        return adopt(snapshot)
    with snapshot:
        return adopt(snapshot)

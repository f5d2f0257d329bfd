"""A segment: pages in a file that is written once and never changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from paged_kv.bundles.bundle import Bytes, Chunk
from paged_kv.bundles.contents import Ints
from paged_kv.errors import BadSnapshot
from paged_kv.snapshot.files import Files
from paged_kv.snapshot.tensors import DIGEST, ROOM, Field, Layout, digest, page_digests


class Sizes(NamedTuple):
    """Bytes of a page, and its tokens."""

    page_bytes: int
    page_size: int


class Listed(NamedTuple):
    """A segment, as a manifest has it."""

    name: str
    pages: int
    digest: str  # of header and checksums


def layout_of(pages: int, sizes: Sizes) -> Layout:
    """Where pages, the positions of their tokens, and a checksum each lie."""
    return Layout(
        [
            Field("pages", "U8", (pages, sizes.page_bytes)),
            Field("positions", "I64", (pages, sizes.page_size)),
            Field("digests", "U8", (pages, DIGEST)),
        ]
    )


class SegmentWriter:
    """Writes pages as they come: the header, which counts them, comes last."""

    def __init__(self, files: Files, path: Path, sizes: Sizes) -> None:
        self.pages = 0
        self._files = files
        self._path = path
        self._sizes = sizes
        self._positions: list[Ints] = []
        self._digests: list[bytes] = []
        self._digest = b""  # of header and checksums
        self._file = files.create(path)

    @property
    def listed(self) -> Listed:
        """How a manifest has it, once it is finished."""
        return Listed(self._path.name, self.pages, self._digest.hex())

    def add(self, records: Bytes, positions: Ints, digests: Sequence[bytes]) -> None:
        """Append pages."""
        self._files.write(self._file, records, ROOM + self.pages * self._sizes.page_bytes)
        self._positions.append(positions)
        self._digests += digests
        self.pages += len(records)

    def finish(self, *, sync: bool) -> None:
        """Write what comes after the pages, then the header."""
        layout = layout_of(self.pages, self._sizes)
        digests = b"".join(self._digests)
        positions = np.concatenate(self._positions)
        self._files.write(self._file, positions, layout.at["positions"])
        self._files.write(self._file, digests, layout.at["digests"])
        self._files.write(self._file, layout.header, 0)
        if sync:
            self._files.sync(self._file)
        self.close()
        self._digest = digest(layout.header, digests)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


class Segment:
    """An open segment. Its checksums were checked, its pages are as they are read."""

    def __init__(self, files: Files, folder: Path, listed: Listed, sizes: Sizes) -> None:
        self.listed = listed
        self._files = files
        self._folder = folder
        self._layout = layout_of(listed.pages, sizes)
        self._sizes = sizes
        self._file = files.open(folder / listed.name)
        try:
            self.digests = self._checked_digests()
        except BaseException:
            self.close()
            raise

    def _checked_digests(self) -> list[bytes]:
        layout = self._layout
        size = self._files.size(self._file)
        if size != layout.size:
            raise self._bad(f"has {size} bytes, not {layout.size}")
        header = bytearray(ROOM)
        found = bytearray(DIGEST * self.listed.pages)
        self._files.read(self._file, header, 0)
        self._files.read(self._file, found, layout.at["digests"])
        if header != layout.header or digest(header, found).hex() != self.listed.digest:
            raise self._bad("has a header or checksums that were damaged")
        return [bytes(found[at : at + DIGEST]) for at in range(0, len(found), DIGEST)]

    def read(self, first: int, into: Chunk) -> None:
        """Fill memory with pages from `first` on. Raises BadSnapshot where one was damaged."""
        sizes = self._sizes
        at = self._layout.at
        self._files.read(self._file, into.records, at["pages"] + first * sizes.page_bytes)
        positions = at["positions"] + first * sizes.page_size * 8
        self._files.read(self._file, into.positions, positions)
        found = page_digests(*into)
        if found != self.digests[first : first + len(found)]:
            raise self._bad("holds a page that was damaged")

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _bad(self, why: str) -> BadSnapshot:
        return BadSnapshot(self._folder, f"{self.listed.name!r} {why}")

"""A bundle: sequences and their pages, each once, as contiguous bytes.

A page is a record of bytes: K and V of all layers as the pool's storage writes them, with zeros in
slots that none of the sequences reads; beside it stand the positions of its tokens. Whatever can
hand out records is a source, and can be adopted: a bundle in memory, a snapshot in files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from paged_kv.bundles.codec import Codec, from_json
from paged_kv.bundles.contents import Contents, Ints, check_positions
from paged_kv.errors import BadBundle

Bytes = npt.NDArray[np.uint8]
BATCH = 1 << 22  # bytes that are moved at a time: they stay in the processor's cache


class Chunk(NamedTuple):
    """Some pages, to be read only. The memory may be used again for the next ones."""

    records: Bytes  # [n, bytes of a page]
    positions: Ints  # [n, page_size]


class Source(Protocol):
    """Sequences that can be adopted."""

    @property
    def contents(self) -> Contents:
        """All but the pages."""

    def read(self, numbers: Ints, out: Bytes | None = None) -> Chunk:
        """The pages of these numbers, which rise.

        Their records may be written to `out` [n, bytes of a page], and be it then. Where that
        raises, nobody reads what was written.
        """


@dataclass(frozen=True)
class Bundle:
    """Sequences in memory, apart from any cache: plain arrays and text, for any transport.

    `records` [pages, bytes of a page] and `positions` [pages, page_size] are the pages.
    """

    contents: Contents
    records: Bytes
    positions: Ints

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        tables = sum(field.nbytes for field in self.contents.tables)
        return self.records.nbytes + self.positions.nbytes + tables + len(self.contents.extra)

    def __len__(self) -> int:
        return self.contents.named

    def data(self, codec: Codec | None = None) -> Any:
        """What the caller gave along. Raises BadBundle."""
        return data_of(self.contents, codec)

    def read(self, numbers: Ints, out: Bytes | None = None) -> Chunk:
        """The pages of these numbers. Raises BadBundle."""
        if not len(self.records) == len(self.positions) == self.contents.pages:
            raise BadBundle(f"it has {len(self.records)} pages, not {self.contents.pages}")
        return Chunk(self.records[numbers], self.positions[numbers])

    @classmethod
    def of(cls, source: Source) -> Bundle:
        """All that a source holds, in memory."""
        contents = source.contents
        page_bytes = contents.fingerprint["page_bytes"]
        records = np.empty((contents.pages, page_bytes), dtype=np.uint8)
        positions = np.empty((contents.pages, contents.fingerprint["page_size"]), dtype=np.int64)
        for numbers in batches(contents.pages, page_bytes):
            chunk = source.read(numbers)
            records[numbers] = chunk.records
            positions[numbers] = chunk.positions
        return cls(contents, records, positions)


def batches(pages: int, page_bytes: int, size: int = BATCH) -> Iterator[Ints]:
    """The numbers of all pages, as many at a time as are moved at once: so many bytes of them."""
    most = max(1, size // page_bytes)
    for first in range(0, pages, most):
        yield np.arange(first, min(pages, first + most))


def data_of(contents: Contents, codec: Codec | None) -> Any:
    """The data of the caller. Raises BadBundle."""
    return extra_of(contents, codec)[0]


def extra_of(contents: Contents, codec: Codec | None) -> tuple[Any, list[Any]]:
    """The data of the caller, and the books of indexes, which are not checked. Raises BadBundle."""
    try:
        data, books = from_json(contents.extra, codec)
    except (ValueError, TypeError) as error:
        raise BadBundle(f"its keys and data cannot be read: {error}") from error
    if type(books) is not list:
        raise BadBundle("its indexes are no list")
    return data, books


def check_chunk(
    pages: int, page_bytes: int, page_size: int, records: Bytes, positions: Ints
) -> None:
    """Raise BadBundle for pages of another shape than was asked for."""
    for name, found, kind, width in (
        ("records", records, np.uint8, page_bytes),
        ("positions", positions, np.int64, page_size),
    ):
        if not isinstance(found, np.ndarray) or found.dtype != kind:
            raise BadBundle(f"its {name} are no array of {kind.__name__}")
        if found.shape != (pages, width):
            raise BadBundle(f"its {name} have shape {found.shape}, expected {(pages, width)}")
    check_positions(positions)

"""Arrays in a file, in the format of safetensors: a header of JSON, then the arrays.

The header follows from what the manifest says, so it is compared and never trusted.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from paged_kv.errors import MissingPackage

try:
    import xxhash
except ImportError as error:
    raise MissingPackage("a snapshot", "xxhash", "paged-kv[snapshot]") from error

KINDS: dict[str, np.dtype[Any]] = {"U8": np.dtype("<u1"), "I64": np.dtype("<i8")}
ROOM = 4096  # bytes of a header, which is written last: pages begin where those of a disk do
DIGEST = 16  # bytes


class Field(NamedTuple):
    """An array of a file."""

    name: str
    kind: str  # of KINDS
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        size = KINDS[self.kind].itemsize
        for extent in self.shape:
            size *= extent
        return size


class Layout:
    """Where the arrays of a file lie, one behind the other."""

    def __init__(self, fields: list[Field]) -> None:
        self.fields = fields
        self.at: dict[str, int] = {}
        listed = {}
        end = 0
        for field in fields:
            self.at[field.name] = ROOM + end
            listed[field.name] = {
                "dtype": field.kind,
                "shape": list(field.shape),
                "data_offsets": [end, end + field.nbytes],
            }
            end += field.nbytes
        self.size = ROOM + end
        text = json.dumps(listed, separators=(",", ":")).encode()
        self.header = (ROOM - 8).to_bytes(8, "little") + text.ljust(ROOM - 8)

    def split(self, data: bytes) -> dict[str, npt.NDArray[Any]]:
        """The arrays of a whole file."""
        found = {}
        for field in self.fields:
            kind = KINDS[field.kind]
            at = self.at[field.name]
            count = field.nbytes // kind.itemsize
            found[field.name] = np.frombuffer(data, kind, count, at).reshape(field.shape)
        return found


def digest(*parts: Any) -> bytes:
    """A checksum of bytes: 16 of them."""
    found = xxhash.xxh3_128()
    for part in parts:
        found.update(part)
    return bytes(found.digest())


def page_digests(records: npt.NDArray[np.uint8], positions: npt.NDArray[np.int64]) -> list[bytes]:
    """A checksum of each page: its record and the positions of its tokens."""
    found = []
    kind = xxhash.xxh3_128
    for record, places in zip(records, positions):
        state = kind(record)
        state.update(places)
        found.append(state.digest())
    return found

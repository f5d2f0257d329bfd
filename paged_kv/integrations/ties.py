"""Fixed tie-breaking for LightZero's C++ tree.

The tree seeds the C library's ``rand`` from the clock at every traversal and draws from it to
choose among actions whose scores are equal, so two runs with the same seeds differ. ``fixed_ties``
points the tree's own link to ``rand`` at a function whose answer never changes: the choice depends
on the equal actions alone, and a choice in one environment's tree does not reach the others'. Other
users of ``rand`` in the process are untouched.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_DYNAMIC = 2
_LOAD = 1
_STRTAB = 5
_SYMTAB = 6
_RELA = 7
_RELASZ = 8
_PLTRELSZ = 2
_JMPREL = 23
_READ_WRITE = 3


class _Segment(NamedTuple):
    """A program header: what a part of the file is, and where it goes in memory."""

    kind: int
    flags: int
    offset: int
    address: int
    physical: int
    file_size: int
    memory_size: int
    alignment: int

    def holds(self, address: int) -> bool:
        """Whether an address lies in what comes from the file."""
        return self.address <= address < self.address + self.file_size


@contextlib.contextmanager
def fixed_ties(module_file: str) -> Iterator[bool]:
    """Make one extension module's ``rand`` a constant for as long as the block runs.

    Yields whether it could be done: False on systems other than 64-bit Linux, or where the module
    has no such link.
    """
    slots = _import_slots(module_file, b"rand")
    # Any function without arguments that always returns the same small number would do.
    constant = ctypes.cast(ctypes.CDLL(None).getpagesize, ctypes.c_void_p).value if slots else None
    before = [_swap(slot, constant) for slot in slots]
    try:
        yield bool(slots)
    finally:
        for slot, value in zip(slots, before, strict=True):
            _swap(slot, value)


def _swap(address: int, value: int | None) -> int | None:
    """Write one pointer and return what was there; the page is made writable first."""
    page = address & ~(mmap.PAGESIZE - 1)
    ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), _READ_WRITE)
    cell = ctypes.c_void_p.from_address(address)
    before = cell.value
    cell.value = value
    return before


def _import_slots(module_file: str, name: bytes) -> list[int]:
    """Addresses in this process of the pointers through which a loaded library calls `name`."""
    if not sys.platform.startswith("linux") or sys.maxsize < 2**32:
        return []
    image = Path(module_file).read_bytes()
    base = _load_address(module_file)
    if base is None or image[:5] != b"\x7fELF\x02":
        return []
    tables = _dynamic_tables(image)
    relocations = [
        (tables.get(_JMPREL), tables.get(_PLTRELSZ)),
        (tables.get(_RELA), tables.get(_RELASZ)),
    ]
    slots = []
    for start, size in relocations:
        if start is None or size is None:
            continue
        for at in range(start, start + size, 24):
            offset, info = struct.unpack_from("<QQ", image, at)
            if _symbol_name(image, tables, info >> 32) == name:
                slots.append(base + offset)
    return slots


def _load_address(module_file: str) -> int | None:
    path = str(Path(module_file).resolve())
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == path and int(fields[2], 16) == 0:
            return int(fields[0].split("-")[0], 16)
    return None


def _dynamic_tables(image: bytes) -> dict[int, int]:
    """Tag -> value of the dynamic section, with the addresses turned into file offsets."""
    segments = _segments(image)
    loaded = [segment for segment in segments if segment.kind == _LOAD]
    dynamic = next(segment for segment in segments if segment.kind == _DYNAMIC)
    tables: dict[int, int] = {}
    for at in range(dynamic.offset, dynamic.offset + dynamic.file_size, 16):
        tag, value = struct.unpack_from("<QQ", image, at)
        if tag in (_STRTAB, _SYMTAB, _RELA, _JMPREL):
            value = _file_offset(loaded, value)
        tables[tag] = value
    return tables


def _segments(image: bytes) -> list[_Segment]:
    (start,) = struct.unpack_from("<Q", image, 32)
    size, count = struct.unpack_from("<HH", image, 54)
    places = range(start, start + size * count, size)
    return [_Segment(*struct.unpack_from("<IIQQQQQQ", image, place)) for place in places]


def _file_offset(loaded: list[_Segment], address: int) -> int:
    """Where in the file an address comes from; itself where it is in no segment."""
    found = next((segment for segment in loaded if segment.holds(address)), None)
    return address if found is None else address - found.address + found.offset


def _symbol_name(image: bytes, tables: dict[int, int], index: int) -> bytes:
    entry = tables[_SYMTAB] + index * 24
    at = tables[_STRTAB] + struct.unpack_from("<I", image, entry)[0]
    return image[at : image.index(b"\0", at)]

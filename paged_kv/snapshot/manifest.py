"""The manifest of a snapshot, which names its files, and the file of its tables.

A snapshot is what its manifest says. What reads it trusts nothing: sizes are compared with those of
the files before memory is taken for them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from paged_kv.bundles.contents import Contents, Ints, Tables
from paged_kv.errors import BadSnapshot
from paged_kv.snapshot.files import Files
from paged_kv.snapshot.segment import Listed, Sizes
from paged_kv.snapshot.tensors import Field, Layout, digest

MANIFEST = "manifest.json"
FORMAT = "paged_kv snapshot"
VERSION = 1
OURS = re.compile(r"(pages|tables)-[0-9a-f]{16}\.safetensors|manifest-[0-9a-f]{16}\.json")
SHAPE = ("layers", "heads", "head_size", "value_head_size", "page_size", "page_bytes")
MOST = 1 << 48  # of anything that is counted
LONGEST = 1 << 28  # bytes of a manifest


class Counts(NamedTuple):
    """What a file of tables holds."""

    pages: int  # that are saved
    named: int  # of the rows
    rows: int
    records: int  # that differ
    entries: int  # of all block tables together
    extra: int  # bytes of keys and data


class Manifest(NamedTuple):
    """The names and figures of a snapshot."""

    fingerprint: dict[str, Any]
    counts: Counts
    tables: str  # the name of their file
    digest: str  # of it
    segments: list[Listed]

    @property
    def sizes(self) -> Sizes:
        """Of a page."""
        return Sizes(self.fingerprint["page_bytes"], self.fingerprint["page_size"])


class Places(NamedTuple):
    """Where each page of a bundle lies."""

    segment: Ints  # its number in the manifest
    row: Ints  # in it


def render(manifest: Manifest) -> bytes:
    """A manifest as text, with a checksum of it."""
    told = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": manifest.fingerprint,
        "counts": manifest.counts._asdict(),
        "tables": manifest.tables,
        "digest": manifest.digest,
        "segments": [list(segment) for segment in manifest.segments],
    }
    return _signed(told)


def _signed(told: object) -> bytes:
    body = json.dumps(told, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f'{{"checksum":"{digest(body.encode()).hex()}","snapshot":{body}}}\n'.encode()


def read_manifest(files: Files, folder: Path) -> Manifest:
    """The manifest of a folder. Raises BadSnapshot; FileNotFoundError where there is none."""
    file = files.open(folder / MANIFEST)
    try:
        size = files.size(file)
        if size > LONGEST:
            raise BadSnapshot(folder, f"its manifest has {size} bytes")
        text = bytearray(size)
        files.read(file, text, 0)
    finally:
        file.close()
    return _parsed(folder, bytes(text))


def _parsed(folder: Path, text: bytes) -> Manifest:
    try:
        told = json.loads(text)["snapshot"]
        if _signed(told) != text:
            raise BadSnapshot(folder, "its manifest was damaged")
        if told["format"] != FORMAT or told["version"] != VERSION:
            raise BadSnapshot(folder, f"it has format {told['format']!r} {told['version']!r}")
        found = Manifest(
            told["fingerprint"],
            Counts(**told["counts"]),
            told["tables"],
            told["digest"],
            [Listed(*segment) for segment in told["segments"]],
        )
        _check(folder, found)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        if isinstance(error, BadSnapshot):
            raise
        raise BadSnapshot(folder, "its manifest is torn, or none of a snapshot") from error
    return found


def _check(folder: Path, manifest: Manifest) -> None:
    """Raise BadSnapshot, or what an unexpected type raises, unless all is in bounds."""
    shape = [manifest.fingerprint[name] for name in SHAPE]
    numbers = [*manifest.counts, *shape, *(each.pages for each in manifest.segments)]
    if any(type(number) is not int or not 0 <= number < MOST for number in numbers):
        raise BadSnapshot(folder, "its manifest counts what cannot be")
    names = [manifest.tables, *(each.name for each in manifest.segments)]
    if not all(OURS.fullmatch(name) for name in names) or len(set(names)) != len(names):
        raise BadSnapshot(folder, "its manifest names files that are none of a snapshot")
    dtype = manifest.fingerprint["dtype"]
    identity = manifest.fingerprint["identity"]
    if type(dtype) is not str or type(identity) is not dict:
        raise BadSnapshot(folder, "its manifest has another fingerprint than a snapshot")
    if manifest.counts.named > manifest.counts.rows or min(shape) < 1:
        raise BadSnapshot(folder, "its manifest contradicts itself")


# -- tables


def tables_layout(counts: Counts) -> Layout:
    """Where tables, the places of pages, and keys and data lie."""
    names = ("starts", "lengths", "parents", "places")
    records = [(name, counts.records) for name in names]
    pages = [("segment", counts.pages), ("row", counts.pages)]
    fields = [("pages", counts.entries), *records, ("rows", counts.rows), *pages]
    listed = [Field(name, "I64", (length,)) for name, length in fields]
    return Layout([*listed, Field("extra", "U8", (counts.extra,))])


def tables_bytes(contents: Contents, places: Places) -> tuple[Counts, bytes]:
    """Tables as a file, and what it holds."""
    extra = contents.extra.encode()
    tables = contents.tables
    rows = tables.sequences
    records = len(tables.starts)
    entries = len(tables.pages)
    counts = Counts(contents.pages, contents.named, rows, records, entries, len(extra))
    arrays = [np.ascontiguousarray(field, dtype="<i8").tobytes() for field in (*tables, *places)]
    return counts, b"".join((tables_layout(counts).header, *arrays, extra))


def read_tables(files: Files, folder: Path, manifest: Manifest) -> tuple[Contents, Places]:
    """What the file of tables holds. Raises BadSnapshot."""
    counts = manifest.counts
    layout = tables_layout(counts)
    file = files.open(folder / manifest.tables)
    try:
        size = files.size(file)
        if size != layout.size:
            raise BadSnapshot(folder, f"its tables have {size} bytes, not {layout.size}")
        data = bytearray(size)
        files.read(file, data, 0)
    finally:
        file.close()
    if digest(data).hex() != manifest.digest or not data.startswith(layout.header):
        raise BadSnapshot(folder, "its tables were damaged")
    found = layout.split(bytes(data))
    places = Places(found.pop("segment"), found.pop("row"))
    extra = bytes(found.pop("extra")).decode(errors="replace")
    contents = Contents(manifest.fingerprint, Tables(**found), counts.pages, counts.named, extra)
    _check_places(folder, manifest, places)
    return contents, places


def _check_places(folder: Path, manifest: Manifest, places: Places) -> None:
    """Raise BadSnapshot for a page that lies nowhere."""
    pages = np.array([segment.pages for segment in manifest.segments], dtype=np.int64)
    if (places.segment < 0).any() or (places.segment >= len(pages)).any():
        raise BadSnapshot(folder, "a page of it lies in no segment")
    if (places.row < 0).any() or (places.row >= pages[places.segment]).any():
        raise BadSnapshot(folder, "a page of it lies beyond its segment")

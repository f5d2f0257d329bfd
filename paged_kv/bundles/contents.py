"""All of a bundle but its pages: block tables as arrays, the entries of indexes, a caller's data.

What comes from elsewhere is not trusted: `checked` looks at every number before anything is done
with it. No tensors in here.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from paged_kv.errors import BadBundle, OtherFingerprint
from paged_kv.pages.records import NO_PARENT, Links, Record

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
FAR = 1 << 62  # positions and lengths lie below it, so that sums of two are no overflow


class Tables(NamedTuple):
    """The records of B sequences, with pages numbered from 0 on and sequences by their rows.

    Children of one parent that nothing was written to have one record: each of the K that there are
    stands here once.
    """

    pages: Ints  # the block tables of all records one behind the other
    starts: Ints  # [K] head offsets
    lengths: Ints  # [K] tokens
    parents: Ints  # [K] rows, of the nearest ones above that came along; -1 for none
    places: Ints  # [K] positions that follow on the last tokens
    rows: Ints  # [B] the number of each sequence's record

    @property
    def sequences(self) -> int:
        """Sequences there are."""
        return len(self.rows)

    @property
    def tokens(self) -> Ints:
        """Tokens of each sequence [B]."""
        return self.lengths[self.rows]


@dataclass(frozen=True)
class Contents:
    """What stands beside the pages of a bundle."""

    fingerprint: dict[str, Any]
    tables: Tables
    pages: int  # that the tables name
    named: int  # the first rows, which were asked for; others came with indexes
    extra: str  # JSON: the data, and the books of indexes

    def own(self) -> Contents:
        """The same, with tables that nobody else can change."""
        tables = Tables(*[copy(field) for field in self.tables])
        return replace(self, tables=tables)

    def compare(self, expected: dict[str, Any]) -> None:
        """Raise OtherFingerprint where it is not the expected one."""
        ours = flat(expected)
        theirs = flat(self.fingerprint)
        names = [*ours, *(name for name in theirs if name not in ours)]
        differences = {
            name: (theirs.get(name), ours.get(name))
            for name in names
            if name not in ours or name not in theirs or theirs[name] != ours[name]
        }
        if differences:
            raise OtherFingerprint(differences)


def flat(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """A fingerprint without the level of the caller's own part."""
    own = fingerprint.get("identity")
    if not isinstance(own, dict):
        return fingerprint
    rest = {name: value for name, value in fingerprint.items() if name != "identity"}
    return {**rest, **{f"identity[{name!r}]": value for name, value in own.items()}}


def tables_of(records: Sequence[Record], parents: Sequence[int]) -> tuple[Tables, Ints]:
    """Records as tables with the rows of their parents, and the pages by number, in order."""
    numbers: dict[Record, int] = {}
    told = [
        (pages, start, length, above, place)
        for (pages, start, length, _, place), above in zip(records, parents)
    ]
    rows = [numbers.setdefault(record, len(numbers)) for record in told]
    held = np.fromiter(chain.from_iterable([record[0] for record in numbers]), np.int64)
    names, pages = np.unique(held, return_inverse=True)
    tables = Tables(
        pages.astype(np.int64).reshape(-1),
        _numbers([record[1] for record in numbers]),
        _numbers([record[2] for record in numbers]),
        _numbers([record[3] for record in numbers]),
        _numbers([record[4] for record in numbers]),
        _numbers(rows),
    )
    return tables, names


def _numbers(found: Sequence[int]) -> Ints:
    return np.array(found, dtype=np.int64)


def records_of(
    tables: Tables, pages: Sequence[int], seqs: Sequence[int], page_size: int
) -> list[Record]:
    """The records of sequences whose tables were checked, in pages of a pool."""
    ends = np.cumsum(page_counts(tables, page_size)).tolist()
    # as objects: tables share their numbers, too, which are many more than there are pages
    names = tuple(np.array(pages, dtype=np.object_)[tables.pages].tolist())
    held = [names[first:end] for first, end in zip([0, *ends], ends)]
    named = [*seqs, NO_PARENT]  # which row -1 finds
    parents = [named[row] for row in tables.parents.tolist()]
    fields = [field.tolist() for field in (tables.starts, tables.lengths, tables.places)]
    starts, lengths, places = fields
    found = list(zip(held, starts, lengths, parents, places))
    return [found[number] for number in tables.rows.tolist()]


def links_of(tables: Tables, seqs: Sequence[int]) -> Links:
    """Each parent with its only child, or all of them, in the order of their rows."""
    above = tables.parents[tables.rows]
    order = np.argsort(above, kind="stable")
    order = order[np.searchsorted(above[order], 0) :]
    parents = above[order]
    ends = [*(np.flatnonzero(np.diff(parents)) + 1).tolist(), len(parents)]
    below = [seqs[row] for row in order.tolist()]
    links: Links = {}
    first = 0
    for end in ends if below else ():
        children = below[first:end]
        links[seqs[parents[first]]] = children[0] if end == first + 1 else dict.fromkeys(children)
        first = end
    return links


def shares_of(tables: Tables, pages: int, page_size: int) -> list[int]:
    """Sequences that hold each page."""
    rows = np.bincount(tables.rows, minlength=len(tables.starts))
    found = np.zeros(pages, dtype=np.int64)
    np.add.at(found, tables.pages, np.repeat(rows, page_counts(tables, page_size)))
    shares: list[int] = found.tolist()
    return shares


def page_counts(tables: Tables, page_size: int) -> Ints:
    """Pages of each record [K]."""
    ends = tables.starts + tables.lengths
    return np.where(tables.lengths > 0, -(-ends // page_size), 0)


def pages_held(tables: Tables, rows: Sequence[int], page_size: int) -> int:
    """Pages of some rows, each counted once."""
    wanted = np.zeros(len(tables.starts), dtype=np.bool_)
    wanted[tables.rows[rows]] = True
    return len(np.unique(tables.pages[np.repeat(wanted, page_counts(tables, page_size))]))


def slots_read(tables: Tables, pages: int, page_size: int) -> Mask:
    """The slots [pages, page_size] that some sequence reads."""
    counts = page_counts(tables, page_size)
    rows = np.repeat(np.arange(len(counts)), counts)
    before = np.arange(len(tables.pages)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = np.maximum(tables.starts[rows] - before * page_size, 0)
    ends = (tables.starts + tables.lengths)[rows]
    last = np.minimum(ends - before * page_size, page_size)
    width = page_size + 1
    begun = np.bincount(tables.pages * width + first, minlength=pages * width)
    over = np.bincount(tables.pages * width + last, minlength=pages * width)
    readers = np.cumsum((begun - over).reshape(pages, width), axis=1)
    return np.asarray(readers[:, :page_size] > 0)


def reached(read: Mask) -> list[int]:
    """How far each page is read, from the slots that are."""
    if not read.size:
        return []
    found: list[int] = (read.shape[1] - read[:, ::-1].argmax(axis=1)).tolist()
    return found


def checked(contents: Contents, page_size: int) -> None:
    """Raise BadBundle unless the tables name pages as those of a cache do. Cost: O(tables)."""
    tables = contents.tables
    for name, field in tables._asdict().items():
        if not isinstance(field, np.ndarray) or field.dtype != np.int64 or field.ndim != 1:
            raise BadBundle(f"{name} is no list of whole numbers")
    records = len(tables.starts)
    lengths = [len(field) for field in tables[1:-1]]
    if lengths != [records] * 4:
        raise BadBundle(f"its tables have {lengths} rows")
    _within("named", contents.named, 0, tables.sequences)
    _all_within("start", tables.starts, 0, page_size - 1)
    _all_within("length", tables.lengths, 0, page_size * len(tables.pages))
    _all_within("row", tables.rows, 0, records - 1)
    _all_within("place", tables.places, -FAR, FAR)
    _all_within("parent", tables.parents, -1, tables.sequences - 1)
    _all_within("page", tables.pages, 0, contents.pages - 1)
    _check_pages(tables, contents.pages, page_size)
    _check_tree(tables)


def _check_pages(tables: Tables, pages: int, page_size: int) -> None:
    """Raise BadBundle unless records hold the pages that they read, each once, and all are held."""
    records = len(tables.starts)
    counts = page_counts(tables, page_size)
    if int(counts.sum()) != len(tables.pages):
        raise BadBundle(f"its windows take {counts.sum()} pages, its tables have {len(tables[0])}")
    owners = np.repeat(np.arange(records), counts) * max(pages, 1) + tables.pages
    rising = (np.diff(owners) > 0).all()  # mostly: then none is there twice
    if not rising and len(np.unique(owners)) != len(owners):
        raise BadBundle("a table names a page twice")
    if pages > len(tables.pages) or not np.bincount(tables.pages, minlength=pages).all():
        raise BadBundle("it holds pages that no table names")
    if records > tables.sequences or not np.bincount(tables.rows, minlength=records).all():
        raise BadBundle("it holds tables of no sequence")


def check_positions(positions: Ints) -> None:
    """Raise BadBundle for a position that nothing can follow on."""
    _all_within("position", positions, -FAR, FAR)


def _check_tree(tables: Tables) -> None:
    """Raise BadBundle where a sequence is its own ancestor."""
    above = np.where(tables.parents >= 0, tables.rows[tables.parents], -1)  # records, as above
    for _ in range(len(above).bit_length()):  # each look goes twice as far up
        if (above < 0).all():
            return
        above = np.where(above >= 0, above[above], -1)
    if (above >= 0).any():
        row = int(np.argmax(above[tables.rows] >= 0))
        raise BadBundle(f"row {row} hangs below itself")


def _within(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise BadBundle(f"{name} is {value!r}, allowed is {low} to {high}")


def _all_within(name: str, values: Ints, low: int, high: int) -> None:
    wrong = (values < low) | (values > high)
    if wrong.any():
        raise BadBundle(f"a {name} is {values[wrong].flat[0]}, allowed is {low} to {high}")

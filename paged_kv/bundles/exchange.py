"""Sequences leave a cache, and come into one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain
from math import isfinite
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from paged_kv.bundles.bundle import Bytes, Chunk, Source, batches, check_chunk, extra_of
from paged_kv.bundles.codec import Codec, to_json
from paged_kv.bundles.contents import (
    Contents,
    Ints,
    checked,
    links_of,
    pages_held,
    reached,
    records_of,
    shares_of,
    slots_read,
    tables_of,
)
from paged_kv.bundles.holders import Holder, IndexBook, Shelf
from paged_kv.checks import flag, handles, listed
from paged_kv.errors import BadArgument, BadBundle, OutOfPages
from paged_kv.pages.books import Books
from paged_kv.pages.change import Arrival, Change
from paged_kv.pages.pool import Pool
from paged_kv.turns import Turns, page_reader, verb

T = TypeVar("T")


class Request(NamedTuple):
    """What is to leave a cache."""

    seqs: list[int]
    shelves: list[Shelf]
    data: object
    identity: dict[str, Any]
    codec: Codec | None


class Outgoing:
    """Sequences of a cache that stay there, as a source: to be used within the verb."""

    def __init__(self, pool: Pool, contents: Contents, pages: Ints) -> None:
        self.contents = contents
        self._pool = pool
        self._pages = pages
        self._read = slots_read(contents.tables, len(pages), pool.storage.form.page_size)
        self._memory = torch.empty(0, dtype=torch.uint8)

    def read(self, numbers: Ints, out: Bytes | None = None) -> Chunk:
        """The pages of these numbers."""
        storage = self._pool.storage
        pages = self._pages[numbers]
        size = len(pages) * storage.page_bytes
        if self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.uint8)
        memory = self._memory[:size].view(len(pages), storage.page_bytes)
        read = self._read[numbers]
        records = storage.export_pages(pages, read, memory)
        slots = pages[:, None] * read.shape[1] + np.arange(read.shape[1])
        return Chunk(records.numpy(), np.where(read, storage.positions_at(slots), 0))


class Exchange:
    """Export from one pool, and adoption into it."""

    def __init__(self, pool: Pool, turns: Turns) -> None:
        self.pool = pool
        self.turns = turns

    # -- out

    def export(
        self,
        seqs: Iterable[int],
        use: Callable[[Source], T],
        indexes: Iterable[Holder],
        data: object,
        identity: Mapping[str, Any] | None,
        codec: Codec | None,
    ) -> T:
        """What `use` makes of these sequences: see `PagedKVCache.export`."""
        shelves = self._shelves(indexes)
        request = Request(handles(seqs), shelves, data, _own(identity), codec)
        return self._export(request, use)

    @page_reader
    def _export(self, request: Request, use: Callable[[Source], T]) -> T:
        books = self.pool.books
        books.distinct_records(request.seqs)
        owned = chain.from_iterable([shelf.sequences() for shelf in request.shelves])
        seqs = list(dict.fromkeys(chain(request.seqs, owned)))
        rows = {seq: row for row, seq in enumerate(seqs)}
        tables, pages = tables_of(books.records(seqs), _parents(books, rows))
        indexes = [shelf.book(rows)._asdict() for shelf in request.shelves]
        contents = Contents(
            self.fingerprint(request.identity),
            tables,
            len(pages),
            len(request.seqs),
            to_json((request.data, indexes), request.codec),
        )
        return use(Outgoing(self.pool, contents, pages))

    def fingerprint(self, identity: Mapping[str, Any] | None) -> dict[str, Any]:
        """What contents depend on: see `PagedKVCache.fingerprint`."""
        storage = self.pool.storage
        form = storage.form
        return {
            "layers": self.pool.layers,
            "heads": form.parts[0].heads,
            "head_size": form.parts[0].head_size,
            "value_head_size": form.parts[-1].head_size,
            "page_size": form.page_size,
            "page_bytes": storage.page_bytes,
            "dtype": str(form.dtype).removeprefix("torch."),
            "layout": f"{storage.layout}, {sys.byteorder} endian",
            "identity": _own(identity),
        }

    # -- in

    def adopt(
        self,
        source: Source,
        indexes: Iterable[Holder],
        identity: Mapping[str, Any] | None,
        codec: Codec | None,
        lazy: bool,
    ) -> list[int]:
        """The sequences of a source, which is not trusted: see `PagedKVCache.adopt`."""
        if flag("lazy", lazy) and self.pool.tiers is None:
            raise BadArgument("lazy", lazy, "False, or a cache with tiers=Tiers()")
        contents = getattr(source, "contents", None)
        if not isinstance(contents, Contents):
            raise BadArgument("bundle", source, "what export() returned, or a snapshot")
        shelves = self._shelves(indexes)
        contents.compare(self.fingerprint(identity))
        contents = contents.own()
        checked(contents, self.pool.books.page_size)
        _, books = extra_of(contents, codec)
        if len(books) != len(shelves):
            raise BadBundle(f"it holds {len(books)} indexes, {len(shelves)} were given")
        try:
            return self._adopt(source, contents, books, shelves, lazy)
        except OutOfPages as full:
            self.pool.reclaim(full, ())
        return self._adopt(source, contents, books, shelves, lazy)

    @verb
    def _adopt(
        self,
        source: Source,
        contents: Contents,
        books: list[Any],
        shelves: list[Shelf],
        lazy: bool,
    ) -> list[int]:
        """Fill free pages, then let the sequences have them, and the indexes their entries."""
        pool = self.pool
        size = pool.books.page_size
        tables = contents.tables
        held = partial(pages_held, tables, page_size=size)
        entries = [
            shelf.checked(book, tables.sequences, held) for shelf, book in zip(shelves, books)
        ]
        _check_apart(entries)
        pages = pool.fresh_pages(contents.pages)
        if not lazy:
            self._fill(source, pages)
        seqs = pool.books.handles.take(tables.sequences)
        adoptions = [shelf.adoption(book, seqs) for shelf, book in zip(shelves, entries)]
        change = Change(dict(zip(seqs, records_of(tables, pages, seqs, size))))
        change.fresh = len(pages)
        shares = shares_of(tables, len(pages), size)
        change.arrival = Arrival(list(zip(pages, shares)), partial(links_of, tables, seqs))
        change.fills = list(zip(pages, reached(slots_read(tables, len(pages), size))))
        forks, appends, allocated, copied = pool.books.counted
        change.figures = forks, appends, allocated + len(pages), copied
        # keys last: they are a caller's, and may raise
        change.edits = [each.owned for each in adoptions] + [each.keys for each in adoptions]
        change.stores = [store for each in adoptions for store in each.stores]
        tiers = pool.tiers if lazy else None
        if tiers is not None:
            lent = tiers.import_later(np.array(pages, dtype=np.int64), source)
            change.stores.append(lent)
        pool.books.apply(change)
        if tiers is not None:
            tiers.catch_up()
        return seqs[: contents.named]

    def _fill(self, source: Source, pages: list[int]) -> None:
        """Write the records of a source to pages that nobody reads."""
        storage = self.pool.storage
        size = storage.form.page_size
        names = np.array(pages, dtype=np.int64)
        for numbers in batches(len(pages), storage.page_bytes):
            there = storage.records_of(names[numbers])
            records, positions = source.read(numbers, there)
            check_chunk(len(numbers), storage.page_bytes, size, records, positions)
            if records is not there:
                storage.import_pages(names[numbers], torch.from_numpy(records))
            slots = names[numbers, None] * size + np.arange(size)
            storage.place(slots.reshape(-1), positions.reshape(-1))

    def _shelves(self, indexes: Iterable[Holder]) -> list[Shelf]:
        """The entries of indexes and managers of this cache. Raises BadArgument."""
        allowed = "a list of indexes and managers of this cache"
        found: list[Shelf] = []
        for holder in listed("indexes", indexes, allowed):
            if getattr(holder, "turns", None) is not self.turns or not hasattr(holder, "shelves"):
                raise BadArgument("indexes", holder, allowed)
            found += holder.shelves
        if len(set(map(id, found))) != len(found):
            raise BadArgument("indexes", indexes, f"{allowed}, each once")
        return found


def _own(identity: Mapping[str, Any] | None) -> dict[str, Any]:
    """The caller's part of a fingerprint. Raises BadArgument."""
    found = {} if identity is None else identity
    allowed = "None or a dictionary of names with numbers or text"
    if not isinstance(found, Mapping):
        raise BadArgument("identity", identity, allowed)
    for name, value in found.items():
        plain = type(value) in (str, int, bool, type(None))
        if type(name) is not str or not (plain or (type(value) is float and isfinite(value))):
            raise BadArgument("identity", identity, allowed)
    return dict(found)


def _parents(books: Books, rows: Mapping[int, int]) -> list[int]:
    """The row of the nearest sequence above each that comes along, or -1. Cost: O(ancestors)."""
    tree = books.tree
    known: dict[int, int] = {}  # of those that stay behind
    found = []
    for seq in rows:
        passed = []
        above = tree.parent(seq)
        while above is not None and above not in rows and above not in known:
            passed.append(above)
            above = tree.parent(above)
        row = -1 if above is None else known.get(above, rows.get(above, -1))
        known.update(dict.fromkeys(passed, row))
        found.append(row)
    return found


def _check_apart(books: list[IndexBook]) -> None:
    """Raise BadBundle where two indexes own one sequence."""
    owned = [row for book in books for row in book.rows]
    if len(set(owned)) != len(owned):
        raise BadBundle("two entries hold one sequence")

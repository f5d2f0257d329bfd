"""Which pages of a save are new, and which old segments are worth keeping."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from paged_kv.bundles.bundle import Chunk
from paged_kv.bundles.contents import Ints
from paged_kv.snapshot.manifest import Places
from paged_kv.snapshot.segment import Listed, SegmentWriter
from paged_kv.snapshot.tensors import page_digests

MOST_SEGMENTS = 32  # beyond which the smaller half is written again

Old = list[tuple[Listed, list[bytes]]]


class Packing:
    """Finds each page of a save among those that lie in segments, and writes it where it is new.

    Equal checksums are equal pages: with 128 bits, a thousand million pages hold two that differ
    with odds of one to 10^21.
    """

    def __init__(self, pages: int, old: Old, writer: Callable[[], SegmentWriter]) -> None:
        self.written = 0
        self._old = old
        self._make_writer = writer
        self._writer: SegmentWriter | None = None
        self._known = {
            found: (segment, row)
            for segment, (_, digests) in enumerate(old)
            for row, found in enumerate(digests)
        }
        self._segment = np.zeros(pages, dtype=np.int64)
        self._row = np.zeros(pages, dtype=np.int64)

    def add(self, numbers: Ints, chunk: Chunk) -> None:
        """Place pages by their numbers: where they lie already, or in the new segment."""
        known = self._known
        digests = page_digests(*chunk)
        fresh: list[int] = []
        for at, found in enumerate(digests):
            if found not in known:
                known[found] = (len(self._old), self.written + len(fresh))
                fresh.append(at)
        places = [known[found] for found in digests]
        self._segment[numbers] = [segment for segment, _ in places]
        self._row[numbers] = [row for _, row in places]
        self._write(chunk, digests, fresh)

    def _write(self, chunk: Chunk, digests: list[bytes], chosen: list[int]) -> None:
        if not chosen:
            return
        if self._writer is None:
            self._writer = self._make_writer()
        records = chunk.records if len(chosen) == len(digests) else chunk.records[chosen]
        self._writer.add(records, chunk.positions[chosen], [digests[at] for at in chosen])
        self.written += len(chosen)

    def let_go(self) -> Ints:
        """Give up old segments of which less than half is in use, and some where there are many.

        Returns the pages that lie there, which are to be added again.
        """
        used = [
            len(np.unique(self._row[self._segment == number])) for number in range(len(self._old))
        ]
        gone = {
            number
            for number, (listed, _) in enumerate(self._old)
            if 2 * used[number] < listed.pages
        }
        kept = sorted(set(range(len(self._old))) - gone, key=lambda number: used[number])
        if len(kept) >= MOST_SEGMENTS:
            gone.update(kept[: len(kept) // 2])
        self._known = {found: place for found, place in self._known.items() if place[0] not in gone}
        return np.flatnonzero(np.isin(self._segment, list(gone)))

    def finish(self, *, sync: bool) -> tuple[list[Listed], Places]:
        """The segments that are in use, and where each page lies in them."""
        listed = [each for each, _ in self._old]
        if self._writer is not None:
            listed.append(self._writer.finish(sync=sync))
        used = np.unique(self._segment)
        places = Places(np.searchsorted(used, self._segment), self._row)
        return [listed[number] for number in used.tolist()], places

    def close(self) -> None:
        """Let go of the file that was written."""
        if self._writer is not None:
            self._writer.close()

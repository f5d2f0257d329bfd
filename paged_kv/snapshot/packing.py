"""Which pages of a save are new, and which old segments are worth keeping."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from paged_kv.bundles.bundle import Chunk
from paged_kv.bundles.contents import Ints
from paged_kv.snapshot.at_once import WORTH, at_once
from paged_kv.snapshot.manifest import Places
from paged_kv.snapshot.segment import Listed, SegmentWriter
from paged_kv.snapshot.tensors import page_digests

WARM = 1 << 21  # bytes that are written right after their checksums were computed
MOST_SEGMENTS = 32  # beyond which the smaller half is written again

Old = list[tuple[Listed, list[bytes]]]


class Packing:
    """Finds each page of a save among those that lie in segments, and writes it where it is new:
    one half of what is much to one new segment, and the other half to another one at once.

    Equal checksums are equal pages: with 128 bits, a thousand million pages hold two that differ
    with odds of one to 10^21.
    """

    def __init__(self, pages: int, old: Old, writer: Callable[[], SegmentWriter]) -> None:
        self._old = old
        self._make_writer = writer
        self._writers: dict[int, SegmentWriter] = {}  # by the numbers of their segments
        self._known = {
            found: (segment, row)
            for segment, (_, digests) in enumerate(old)
            for row, found in enumerate(digests)
        }
        self._segment = np.zeros(pages, dtype=np.int64)
        self._row = np.zeros(pages, dtype=np.int64)

    @property
    def written(self) -> int:
        """Pages that were new."""
        return sum(writer.pages for writer in self._writers.values())

    def add(self, numbers: Ints, chunk: Chunk) -> None:
        """Place pages by their numbers: where they lie already, or in new segments."""
        first = len(self._old)
        count = len(numbers)
        half = count // 2
        if half * chunk.records.shape[1] < WORTH:
            self._add(first, numbers, chunk, 0, count)
            return
        add = partial(self._add, numbers=numbers, chunk=chunk)
        at_once(
            [partial(add, first, begin=0, end=half), partial(add, first + 1, begin=half, end=count)]
        )

    def _add(self, segment: int, numbers: Ints, chunk: Chunk, begin: int, end: int) -> None:
        """Place some pages of a chunk, and write them while the processor has them at hand."""
        step = max(1, WARM // chunk.records.shape[1])
        for first in range(begin, end, step):
            part = slice(first, min(first + step, end))
            self._place(segment, numbers[part], Chunk(chunk.records[part], chunk.positions[part]))

    def _place(self, segment: int, numbers: Ints, chunk: Chunk) -> None:
        digests = page_digests(*chunk)
        writer = self._writers.get(segment)
        row = 0 if writer is None else writer.pages
        places = []
        fresh: list[int] = []
        for at, found in enumerate(digests):
            own = segment, row + len(fresh)
            place = self._known.setdefault(found, own)  # at once, whoever else does it
            places.append(place)
            if place is own:
                fresh.append(at)
        self._segment[numbers] = [place[0] for place in places]
        self._row[numbers] = [place[1] for place in places]
        if not fresh:
            return
        if writer is None:
            writer = self._writers[segment] = self._make_writer()
        if len(fresh) < len(digests):
            chunk = Chunk(chunk.records[fresh], chunk.positions[fresh])
        writer.add(*chunk, [digests[at] for at in fresh])

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
        writers = self._writers
        at_once([partial(writer.finish, sync=sync) for writer in writers.values()])
        listed = {number: each for number, (each, _) in enumerate(self._old)}
        listed |= {number: writer.listed for number, writer in writers.items()}
        used = np.unique(self._segment)
        places = Places(np.searchsorted(used, self._segment), self._row)
        return [listed[number] for number in used.tolist()], places

    def close(self) -> None:
        """Let go of the files that were written."""
        for writer in self._writers.values():
            writer.close()

"""Which page lies in which frame, and where else its contents are. No tensors in here."""

from __future__ import annotations

import numpy as np

from paged_kv.pages.tiers.contract import Ints

NOWHERE = 0  # but in its frame, if it has any contents
COLD = 1
SOURCES = 2  # the number of the first source, of those that pages are read from as they are used


class Frames:
    """The frames of a pool: frame 0 is that of the null page.

    `pages` [frames + 1] is the truth: the page in each frame, 0 in a free one. A page is in
    `place[page]` if it is found there. Each change is one store, so that an interrupt leaves the
    state before or after it.

    >>> import numpy as np
    >>> frames = Frames(pages=9, frames=2)
    >>> names = np.array([5, 7])
    >>> frames.seat(names, frames.free())
    >>> frames.place[names].tolist(), frames.missing(np.array([0, 5, 6])).tolist()
    ([1, 2], [6])
    """

    def __init__(self, pages: int, frames: int) -> None:
        self.pages = np.zeros(frames + 1, dtype=np.int64)
        self.used = np.zeros(frames + 1, dtype=np.int64)  # by frame
        self.place = np.zeros(pages + 1, dtype=np.int64)  # all others by page
        self.home = np.zeros(pages + 1, dtype=np.int64)  # where its contents are, too
        self.number = np.zeros(pages + 1, dtype=np.int64)  # of it in its source
        self.placed = np.ones(pages + 1, dtype=np.bool_)  # whether its positions are known
        self.clock = 0

    def resized(self, pages: int, frames: int) -> Frames:
        """The same with other numbers of pages and frames; what lies beyond is left out."""
        found = Frames(pages, frames)
        found.clock = self.clock
        for name in ("pages", "used", "place", "home", "number", "placed"):
            old = getattr(self, name)
            new = getattr(found, name)
            kept = min(len(old), len(new))
            new[:kept] = old[:kept]
        found.pages[found.pages > pages] = 0
        found.place[found.place > frames] = 0
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        by_frame = self.pages.nbytes + self.used.nbytes
        by_page = self.place.nbytes + self.home.nbytes + self.number.nbytes + self.placed.nbytes
        return by_frame + by_page

    @property
    def count(self) -> int:
        """Frames there are."""
        return len(self.pages) - 1

    @property
    def filled(self) -> int:
        """Frames with a page."""
        return int(np.count_nonzero(self.pages))

    def missing(self, pages: Ints) -> Ints:
        """Those pages that are in no frame."""
        found: Ints = pages[self.pages[self.place[pages]] != pages]
        return found

    def seats(self, pages: Ints) -> Ints:
        """The frames of those pages that are in one; of others than there are, too, none."""
        known = pages[pages < len(self.place)]
        places: Ints = self.place[known]
        found: Ints = places[self.pages[places] == known]
        return found

    def free(self) -> Ints:
        """Frames without a page."""
        return np.flatnonzero(self.pages[1:] == 0) + 1

    def taken(self) -> Ints:
        """Frames with a page."""
        return np.flatnonzero(self.pages)

    def seat(self, pages: Ints, frames: Ints) -> None:
        """Let pages be in these frames, which are free and have their contents."""
        self.place[pages] = frames
        self.pages[frames] = pages

    def clear(self, frames: Ints) -> None:
        """Let no page be in these frames."""
        self.pages[frames] = 0

    def touch(self, pages: Ints) -> None:
        """These pages, which are in frames, are used."""
        self.clock += 1
        self.used[self.place[pages]] = self.clock

    def forget(self, pages: Ints) -> None:
        """Nobody will read what these pages held. Twice is fine."""
        self.home[pages] = NOWHERE
        self.placed[pages] = True
        self.clear(self.seats(pages))

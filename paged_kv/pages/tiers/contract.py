"""What a place for cold pages does, and who says which pages become cold."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int64]


class RecordCodec(Protocol):
    """Another form of records, smaller or not as exact: all of them of one width."""

    def encode(self, records: torch.Tensor) -> torch.Tensor:
        """Records [n, bytes of a page], bytes on the host, as [n, any width]."""

    def decode(self, found: torch.Tensor) -> torch.Tensor:
        """Records [n, bytes of a page] again. What it makes of them encodes to the same bytes."""


class ColdTier(Protocol):
    """A place for the records of pages, by their names. It belongs to one cache.

    A method that raises may have lost the records that it was to write, and no others. What is kept
    is scratch: it ends with the process.
    """

    name: str

    def begin(self, page_bytes: int) -> None:
        """Take records of this size from now on. Raises TierFailed, and BadArgument for a tier of
        another cache.
        """

    def put(self, pages: Ints, records: torch.Tensor) -> None:
        """Keep records [n, page_bytes], bytes on the host, in place of those that these pages had.
        Raises TierFailed.
        """

    def get(self, pages: Ints, out: torch.Tensor) -> None:
        """Fill `out` [n, page_bytes] with the records of pages. Raises TierFailed."""

    def drop(self, pages: Ints) -> None:
        """Keep no records of these pages, where there are any."""

    def __len__(self) -> int:
        """Pages that are kept."""

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""


class Candidates(NamedTuple):
    """Pages in frames that may be given up, each field [n]."""

    pages: Ints
    used: Ints  # when each was used last: larger is later
    shares: Ints  # sequences, and rows of open steps, that hold it
    pinned: npt.NDArray[np.bool_]  # of an entry with pins


class FramePolicy(Protocol):
    """Who says which pages become cold."""

    def order(self, candidates: Candidates) -> Ints:
        """Numbers of candidates, the first to go first."""


class LeavesFirst:
    """The default: pages that nobody has used for long, and of these leaves before pages that many
    share; pages of pinned entries last.

    >>> import numpy as np
    >>> pages = np.array([4, 7, 9, 5])
    >>> used = np.array([1, 2, 8, 9])
    >>> shares = np.array([3, 1, 1, 1])
    >>> order = LeavesFirst().order(Candidates(pages, used, shares, pages == 5))
    >>> pages[order].tolist()
    [7, 4, 9, 5]
    """

    def order(self, candidates: Candidates) -> Ints:
        """See `FramePolicy`."""
        used = candidates.used
        recent = used > np.median(used)
        shared = candidates.shares > 1
        order: Ints = np.lexsort((used, shared, recent, candidates.pinned))
        return order


class Tiers(NamedTuple):
    """Where the pages of a cache lie.

    `frames` pages at most are in the pool's own memory, all others in `cold`: a tier of this cache
    alone, or a function that makes one. Without both no page is ever given up: for snapshots that
    are loaded lazily.
    """

    frames: int | None = None
    cold: ColdTier | Callable[[], ColdTier] | None = None
    policy: FramePolicy = LeavesFirst()

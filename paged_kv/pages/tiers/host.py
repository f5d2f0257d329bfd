"""Cold pages in the memory of the host."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from paged_kv.errors import BadArgument, TierFailed
from paged_kv.pages.tiers.coding import Coding
from paged_kv.pages.tiers.contract import Ints, RecordCodec


class HostTier:
    """Cold pages in the memory of the host, for a pool on a device; or coded, for any pool."""

    name = "host"

    def __init__(self, *, codec: RecordCodec | None = None) -> None:
        self._codec = codec
        self._records: dict[int, npt.NDArray[np.uint8]] | None = None
        self._coding = Coding(None, 0)

    def begin(self, page_bytes: int) -> None:
        """See `ColdTier`."""
        if self._records is not None:
            raise BadArgument("cold", self, "a tier of no other cache")
        self._coding = Coding(self._codec, page_bytes)
        self._records = {}

    def put(self, pages: Ints, records: torch.Tensor) -> None:
        """See `ColdTier`."""
        found = self._coding.encoded(records)
        try:
            copies = [row.copy() for row in found.numpy()]
        except MemoryError as error:
            raise TierFailed(self.name, "the host has no memory left") from error
        self._kept.update(zip(pages.tolist(), copies))

    def get(self, pages: Ints, out: torch.Tensor) -> None:
        """See `ColdTier`."""
        kept = self._kept
        rows = np.stack([kept[page] for page in pages.tolist()])
        self._coding.decode(torch.from_numpy(rows), out)

    def drop(self, pages: Ints) -> None:
        """See `ColdTier`."""
        kept = self._kept
        if kept:
            for page in pages.tolist():
                kept.pop(page, None)

    def __len__(self) -> int:
        return len(self._records or ())

    @property
    def nbytes(self) -> int:
        """See `ColdTier`."""
        return len(self) * self._coding.width

    @property
    def _kept(self) -> dict[int, npt.NDArray[np.uint8]]:
        assert self._records is not None, "begin() comes first"
        return self._records

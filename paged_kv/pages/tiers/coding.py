"""Records of pages as a caller's codec has them, who is not trusted."""

from __future__ import annotations

import torch

from paged_kv.errors import BadArgument
from paged_kv.pages.tiers.contract import RecordCodec


class Coding:
    """Records of one size as a place keeps them: as they are, or as a codec makes them.

    Raises BadArgument where what the codec made is no record, and what the codec raises.
    """

    def __init__(self, codec: RecordCodec | None, page_bytes: int) -> None:
        self._codec = codec
        self._page_bytes = page_bytes
        self.width = page_bytes  # bytes of a record that is kept
        if codec is not None:
            made = codec.encode(torch.zeros(1, page_bytes, dtype=torch.uint8))
            width = made.shape[-1] if isinstance(made, torch.Tensor) and made.dim() else 0
            self.width = max(1, width)
            _check("encode", made, (1, self.width))

    def encoded(self, records: torch.Tensor) -> torch.Tensor:
        """Records [n, page_bytes] as [n, width]."""
        if self._codec is None:
            return records
        made = self._codec.encode(records)
        _check("encode", made, (len(records), self.width))
        return made

    def decode(self, found: torch.Tensor, out: torch.Tensor) -> None:
        """Fill `out` [n, page_bytes] from what is kept [n, width]."""
        if self._codec is None:
            out.copy_(found)
            return
        made = self._codec.decode(found)
        _check("decode", made, (len(found), self._page_bytes))
        out.copy_(made)


def _check(what: str, made: object, shape: tuple[int, int]) -> None:
    fits = isinstance(made, torch.Tensor) and made.dtype == torch.uint8 and made.shape == shape
    if not fits or made.device.type != "cpu":  # type: ignore[attr-defined]
        found = made
        if isinstance(made, torch.Tensor):
            found = f"{list(made.shape)} {made.dtype} on {made.device}"
        allowed = f"{list(shape)} torch.uint8 on the host"
        raise BadArgument(f"what {what}() of a codec returned", found, allowed)

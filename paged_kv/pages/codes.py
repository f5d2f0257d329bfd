"""Numbers as codes of a byte, with one scale of two bytes for each row of them.

A row is what one token, layer and head holds of K, or of V. Its scale is its peak: the largest
magnitude in it, as bfloat16. A code c from -127 to 127 stands for c * peak / 127, so that a number
comes back within half a step, of peak / 127. Why the peak and not the step itself: a peak of
bfloat16 comes back as it was, whatever the numbers are rounded to, so that what was decoded is
encoded to the same codes and the same peak. And bfloat16 has the range of float32.

- A row without a magnitude of 2**-100 (8e-31) comes back as zeros.
- A row with a NaN or an infinity, or with numbers beyond float32, comes back as NaN: all of it, so
  that what went wrong shows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from paged_kv.pages.buffers import Form

CODES = torch.int8
PEAKS = torch.bfloat16
PEAK_BYTES = 2
MOST = 127  # of a code
LEAST = 2.0**-100  # of a peak: a step is still a normal number of float32
HIGHEST = {torch.float16: 65280.0}  # of a peak of bfloat16 that the dtype can hold
OTHERS_HIGHEST = torch.finfo(torch.bfloat16).max


class Coded(NamedTuple):
    """Rows of numbers as codes."""

    codes: torch.Tensor  # [..., size] int8
    peaks: torch.Tensor  # [..., 1] bfloat16


def encoded(numbers: torch.Tensor) -> Coded:
    """Rows [..., size] of any dtype of floats as codes. Cost: a dozen kernels."""
    exact = numbers.to(torch.float32)
    highest = exact.abs().amax(-1, keepdim=True)
    highest.masked_fill_(highest == torch.inf, torch.nan)
    # Rounded to the nearest, a peak is so close that the code of the number which made it is 127:
    # no code has to be cut off.
    most = HIGHEST.get(numbers.dtype, OTHERS_HIGHEST)
    peaks = highest.clamp_(max=most).to(PEAKS)
    peaks.masked_fill_(peaks < LEAST, 0)
    per_step = (MOST / peaks.to(torch.float32)).nan_to_num_(nan=0, posinf=0)
    codes = (exact * per_step).nan_to_num_(nan=0).round_()  # what is not finite times zero is NaN
    return Coded(codes.to(CODES), peaks)


def decode(
    codes: torch.Tensor,
    peaks: torch.Tensor,
    out: torch.Tensor,
    work: torch.Tensor | None = None,
) -> None:
    """Fill `out` [..., size] with what the codes stand for, rounded once to its dtype.

    `work`: memory for as many numbers in float32, where `out` is of another dtype.
    """
    steps = peaks.to(torch.float32).div_(MOST)
    if out.dtype == torch.float32:
        out.copy_(codes).mul_(steps)
    elif work is None:
        torch.mul(codes, steps, out=out)
    else:  # what torch would take memory for
        out.copy_(work.copy_(codes).mul_(steps))


class Int8Records:
    """Whole pages of floats as pages of codes, and back: for a tier of cold pages.

    A record is what a storage exports of a page. Encoded ones are those that a cache with
    `storage="int8"` of the same form exports, and what was decoded is encoded to the same bytes:
    so a page that comes back and goes again is not rounded twice.

    >>> from paged_kv.pages.buffers import Part
    >>> form = Form([Part(2, 1, 64)], 4, torch.float32, torch.device("cpu"))
    >>> records = torch.randn(3, 2 * 4 * 64).view(torch.uint8)
    >>> small = Int8Records(form)
    >>> coded = small.encode(records)
    >>> records.shape[1], coded.shape[1]
    (2048, 528)
    >>> torch.equal(small.encode(small.decode(coded)), coded)
    True
    """

    def __init__(self, form: Form) -> None:
        self._dtype = form.dtype
        self._sizes = [part.head_size for part in form.parts]
        # rows of each plane of a page
        self._rows = [part.parts * part.heads * form.page_size for part in form.parts]
        counts = [rows * size for rows, size in zip(self._rows, self._sizes)]
        self._float_bytes = [count * form.dtype.itemsize for count in counts]
        self._code_bytes = [*counts, *(rows * PEAK_BYTES for rows in self._rows)]
        self.page_bytes = sum(self._code_bytes)  # of an encoded record

    def encode(self, records: torch.Tensor) -> torch.Tensor:
        """Records [n, bytes of a page of floats] as records [n, page_bytes], uint8 on the host."""
        coded = [
            encoded(plane.contiguous().view(self._dtype).view(-1, rows, size))
            for plane, rows, size in zip(
                torch.split(records, self._float_bytes, dim=1), self._rows, self._sizes
            )
        ]
        planes = [each.codes for each in coded] + [each.peaks for each in coded]
        return torch.cat([plane.flatten(1).view(torch.uint8) for plane in planes], dim=1)

    def decode(self, records: torch.Tensor) -> torch.Tensor:
        """What the codes of records [n, page_bytes] stand for [n, bytes of a page of floats]."""
        planes = torch.split(records, self._code_bytes, dim=1)
        count = len(self._sizes)
        found = []
        for codes, peaks, rows, size in zip(
            planes[:count], planes[count:], self._rows, self._sizes
        ):
            numbers = torch.empty(len(records), rows, size, dtype=self._dtype)
            decode(
                codes.contiguous().view(CODES).view(-1, rows, size),
                peaks.contiguous().view(PEAKS).view(-1, rows, 1),
                numbers,
            )
            found.append(numbers.flatten(1).view(torch.uint8))
        return torch.cat(found, dim=1)

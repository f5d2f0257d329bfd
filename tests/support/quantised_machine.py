"""Pages of int8 codes against the exact oracle: what comes back is within the bound that the
documentation states.
"""

from __future__ import annotations

import torch
from bundle_machine import BundleMachine
from paged_machine import PagedMachine

from paged_kv.pages.codes import decode, encoded


def allowed(exact: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    """How far each number of rows [..., size] may be off: half a step, and the last bits of its
    dtype. By the words of docs/quantised.md, and not by the codes.
    """
    peak = exact.double().abs().amax(-1, keepdim=True)
    step = peak * (1 + 2**-8) / 127
    rounding = read.double().abs() * torch.finfo(read.dtype).eps
    tiny = torch.finfo(torch.float16).tiny * 2**-10 if read.dtype == torch.float16 else 0
    return torch.where(peak < 2**-100, peak, step / 2 + rounding + tiny)


def within(read: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether rows of numbers came back as promised."""
    off = (read.double() - exact.double()).abs()
    return read.shape == exact.shape and bool((off <= allowed(exact, read)).all())


class QuantisedMachine(PagedMachine, BundleMachine):
    """All verbs, paged steps and bundles, in pages of codes."""

    storage = "int8"

    def agrees(self, got: torch.Tensor, wanted: torch.Tensor) -> bool:
        return within(got, wanted)

    def as_read(self, tokens: torch.Tensor) -> torch.Tensor:
        coded = encoded(tokens)
        read = torch.empty_like(tokens, memory_format=torch.contiguous_format)
        decode(*coded, read)
        assert within(read, tokens)
        return read

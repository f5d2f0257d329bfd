"""Memory that attention works in, used again from layer to layer and from step to step."""

from __future__ import annotations

import math

import torch

from paged_kv.pages.buffers import ordinary


class Scratch:
    """Named pieces of memory on one device, each as large as the largest use of it.

    What is in them is good until the next use of the same name, by whichever step.

    >>> scratch = Scratch(torch.device("cpu"))
    >>> scratch.take("scores", (2, 3), torch.float32).shape, scratch.nbytes
    (torch.Size([2, 3]), 24)
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.version = 0  # counts the times that memory was replaced: views of before are outdated
        self._held: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory of this shape, with anything in it."""
        size = math.prod(shape)
        held = self._held.get((name, dtype))
        if held is None or held.numel() < size:
            self._held.pop((name, dtype), None)
            held = ordinary(lambda: torch.empty(size, dtype=dtype, device=self.device))
            self._held[name, dtype] = held
            self.version += 1
        return ordinary(lambda: held[:size].view(shape))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(held.numel() * held.element_size() for held in self._held.values())

    def trim(self) -> None:
        """Give it all back."""
        self._held.clear()
        self.version += 1

"""What a search asks of a cache that is compared: the same batches, node by node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from paged_kv.linears.packing import has_kernels
from paged_kv.tools.search.measuring import Held

PREFILL = "prefill"
ROOTCACHE = "rootcache"
DEEPCOPY = "deepcopy"
GATHERED = "gathered"
TREE = "tree"
PACKED = "packed"
TITLES = {
    PREFILL: "prefill again",
    ROOTCACHE: "root's cache",
    DEEPCOPY: "a copy per node",
    GATHERED: "pages, gathered",
    TREE: "pages, tree",
    PACKED: "tree, packed",
}
PACKABLE = (torch.float32, torch.bfloat16)
TODAY = (PREFILL, ROOTCACHE, DEEPCOPY)  # what programs do without pages


def sides_for(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """All caches; the one with packed weights only where the machine can multiply with them.

    >>> sides_for(torch.device("cpu"), torch.float64)
    ('prefill', 'rootcache', 'deepcopy', 'gathered', 'tree')
    """
    packs = device.type == "cpu" and dtype in PACKABLE and has_kernels(dtype)
    return tuple(name for name in TITLES if packs or name != PACKED)


class Drawn(NamedTuple):
    """What was drawn for one child."""

    tokens: tuple[int, ...]
    logprobs: list[float]


class Rule(NamedTuple):
    """How children are drawn."""

    tokens: int  # of each child
    temperature: float


class Side(Protocol):
    """A model with one kind of cache. Nodes are numbers: 0 is the root, children count on."""

    name: str

    def begin(self, prompt: Sequence[int], seed: int) -> None:
        """Take the prompt of node 0, whose draws follow from this seed."""
        ...

    def expand(self, parents: Sequence[int], seeds: Sequence[int]) -> list[Drawn]:
        """A child of each of these nodes, of equal lengths; each drawn by the numbers of its
        seed. One batch.
        """
        ...

    def peak(self) -> Held:
        """The most that was held at once since it was last asked."""
        ...

    def tokens_fed(self) -> int:
        """To the model, so far."""
        ...

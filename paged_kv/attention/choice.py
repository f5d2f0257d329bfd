"""The attention of a step: read row by row, or each shared run of pages once."""

from __future__ import annotations

import torch

from paged_kv.attention.contract import Attention, Rows
from paged_kv.attention.cost import Shape, rows_are_cheaper
from paged_kv.attention.parts import Batch
from paged_kv.attention.rowwise import DenseAttention
from paged_kv.attention.runs import plant
from paged_kv.attention.scratch import Scratch
from paged_kv.attention.tree import TreeAttention
from paged_kv.checks import choice, whole
from paged_kv.pages.storage import Storage

BACKENDS = ("auto", "dense", "tree")


def make_attention(
    storage: Storage,
    rows: Rows,
    *,
    backend: str = "auto",
    depth: int | None = None,
    scratch: Scratch | None = None,
) -> Attention:
    """The attention of one step, for all its layers.

    `backend`: "dense" gathers each row and is the reference, "tree" reads what rows share once,
    "auto" takes what is cheaper by `cost`. `depth` says how many levels of shared runs the tree
    has, 0 for none; by default those that pay. `scratch` is memory that attentions use one after
    the other. Cost: some microseconds a row; tables and pages must not be renamed or rewritten
    while it is in use. Raises BadArgument, BadCount.
    """
    choice("backend", backend, BACKENDS)
    depth = None if depth is None else whole("depth", depth, 0)
    form = storage.form
    shape = Shape(
        form.parts[0].heads,
        form.parts[0].head_size,
        form.parts[-1].head_size,
        form.dtype.itemsize,
    )
    scratch = Scratch(form.device) if scratch is None else scratch
    if backend == "dense":
        return DenseAttention(storage, rows, scratch)
    batch = Batch(rows, form.page_size, plant(rows, form.page_size))
    tree = TreeAttention(storage, rows, batch, shape, scratch, depth)
    if backend == "tree":
        return tree
    return CheaperAttention(batch, shape, tree, DenseAttention(storage, rows, scratch))


class CheaperAttention:
    """Attends rows one by one or as a tree, whichever costs less for a window."""

    def __init__(
        self, batch: Batch, shape: Shape, tree: TreeAttention, dense: DenseAttention
    ) -> None:
        self._batch = batch
        self._shape = shape
        self._tree = tree
        self._dense = dense
        self._chosen: dict[int | None, Attention] = {}

    def chosen(self, window: int | None = None) -> Attention:
        """The one that attends such windows. Raises BadCount."""
        if window not in self._chosen:
            window = None if window is None else whole("window", window, 1)
            cheaper = rows_are_cheaper(self._batch, window, self._shape)
            self._chosen[window] = self._dense if cheaper else self._tree
        return self._chosen[window]

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> torch.Tensor:
        """See `Attention`."""
        chosen = self.chosen(window)
        return chosen.attend(layer, queries, scale=scale, window=window, soft_cap=soft_cap)

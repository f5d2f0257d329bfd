"""The attention of a step: read row by row, or each shared run of pages once."""

from __future__ import annotations

import torch

from paged_kv.attention.contract import Attention, Rows
from paged_kv.attention.cost import rows_are_few
from paged_kv.attention.queries import Call
from paged_kv.attention.rowwise import DenseAttention
from paged_kv.attention.scratch import Scratch
from paged_kv.attention.tree import TreeAttention, shape_of
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
    scratch = Scratch(storage.form.device) if scratch is None else scratch
    if backend == "dense":
        return DenseAttention(storage, rows, scratch)
    if backend == "tree":
        return TreeAttention(storage, rows, scratch, depth)
    return CheaperAttention(storage, rows, scratch, depth)


def may_pay(
    storage: Storage, lengths: list[int], counts: list[int], *, window: int | None = None
) -> bool:
    """Whether a step of such rows may gain from attention over pages; if not, a dense step is as
    fast, whatever they share.

    Asks for no tables, so that it may be asked before the step is opened. Cost: a microsecond or
    two.
    """
    rows = Rows([], [], lengths, counts)
    return not rows_are_few(rows, window, shape_of(storage.form))


class CheaperAttention:
    """Attends rows one by one or as a tree, whichever costs less for a window."""

    def __init__(self, storage: Storage, rows: Rows, scratch: Scratch, depth: int | None) -> None:
        self._storage = storage
        self._rows = rows
        self._scratch = scratch
        self._depth = depth
        self._tree: TreeAttention | None = None  # planned where it may pay
        self._dense: DenseAttention | None = None
        self._chosen: dict[tuple[int | None, int], TreeAttention | DenseAttention] = {}

    def chosen(self, groups: int = 1, window: int | None = None) -> TreeAttention | DenseAttention:
        """The one that attends such windows with so many query heads for each K/V head."""
        found = self._chosen.get((window, groups))
        if found is None:
            found = self._choose(groups, window)
            self._chosen[window, groups] = found
        return found

    def _choose(self, groups: int, window: int | None) -> TreeAttention | DenseAttention:
        shape = shape_of(self._storage.form)._replace(groups=groups)
        if not rows_are_few(self._rows, window, shape):
            if self._tree is None:
                self._tree = TreeAttention(self._storage, self._rows, self._scratch, self._depth)
            if self._tree.pays(window, groups):
                return self._tree
        if self._dense is None:
            self._dense = DenseAttention(self._storage, self._rows, self._scratch)
        return self._dense

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
        call = Call(self._storage.form, self._rows, layer, queries, scale, window, soft_cap)
        return self.chosen(call.groups, call.window).answer(call)

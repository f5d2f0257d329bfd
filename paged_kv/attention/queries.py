"""Where the queries of a batch stand while they are attended, and back."""

from __future__ import annotations

import torch

from paged_kv.attention.contract import Rows
from paged_kv.checks import whole
from paged_kv.errors import BadArgument, BadShape
from paged_kv.pages.buffers import Form
from paged_kv.tensors import check_dense, check_tensor


class Call:
    """One call of `attend`, checked: how scores are made, and what of the queries is used.

    Raises BadArgument, BadCount, BadShape, BadDtype, BadDevice.
    """

    def __init__(
        self,
        form: Form,
        rows: Rows,
        layer: int,
        queries: torch.Tensor,
        scale: float | None,
        window: int | None,
        soft_cap: float | None,
    ) -> None:
        parts, heads, size = form.parts[0]
        layers = parts * len(form.parts) // 2
        self.layer = whole("layer", layer, 0, layers - 1)
        columns = max(rows.counts, default=0)
        check_dense("queries", queries)
        found = queries.shape[1] if queries.dim() == 4 else 0
        if not found or found % heads:
            allowed = (len(rows.counts), f"a multiple of {heads}", columns, size)
            raise BadShape("queries", tuple(queries.shape), allowed)
        check_tensor("queries", queries, (len(rows.counts), found, columns, size), form)
        self.queries = queries.detach()
        self.scale = size**-0.5 if scale is None else _number("scale", scale)
        self.window = None if window is None else whole("window", window, 1, None)
        self.soft_cap = None if soft_cap is None else _number("soft_cap", soft_cap)
        if self.soft_cap is not None and self.soft_cap <= 0:
            raise BadArgument("soft_cap", soft_cap, "None or a number above 0")
        self.heads = heads
        self.groups = found // heads  # query heads of each K/V head
        self.value_size = form.parts[-1].head_size

    def nothing(self) -> torch.Tensor:
        """The result where no row has a query."""
        rows, heads, columns, _ = self.queries.shape
        return self.queries.new_zeros(rows, heads, columns, self.value_size)


def _number(name: str, value: float) -> float:
    """A finite number. Raises BadArgument."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value - value != 0:
        raise BadArgument(name, value, "a finite number")
    return float(value)


class Packing:
    """Queries one behind the other, [heads, N, groups, size], and columns of a batch, [B, query
    heads, n, size].
    """

    def __init__(self, order: list[int], rows: Rows, device: torch.device) -> None:
        self.rows = len(rows.counts)
        self.columns = max(rows.counts, default=0)
        taken = [row * self.columns + column for row in order for column in range(rows.counts[row])]
        self.size = len(taken)
        self._all = taken == list(range(self.rows * self.columns))
        self._taken = torch.tensor(taken, dtype=torch.int64, device=device)

    def pack(self, call: Call, out: torch.Tensor) -> None:
        """Fill `out` [heads, N, groups, size] with the queries that are used, times the scale."""
        split = self._split(call.queries, call.heads)
        if not self._all:
            split = split.flatten(1, 2).index_select(1, self._taken)
        if split.dtype == out.dtype:
            torch.mul(split, call.scale, out=out.view(split.shape))
        else:
            out.view(split.shape).copy_(split).mul_(call.scale)

    def unpack(self, products: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The sum of what parts found [parts, heads, N, groups, size] as columns of the batch, zero
        where nothing was used.
        """
        _, heads, _, groups, size = products.shape
        shape = (self.rows, heads * groups, self.columns, size)
        result = torch.empty(shape, dtype=dtype, device=products.device)
        split = self._split(result, heads)
        if not self._all:
            packed = products.sum(0).to(dtype)
            flat = packed.new_zeros(heads, self.rows * self.columns, groups, size)
            split.copy_(flat.index_copy_(1, self._taken, packed).view(split.shape))
        elif len(products) == 1:
            split.copy_(products[0].view(split.shape))
        else:
            torch.sum(products.view(len(products), *split.shape), 0, dtype=dtype, out=split)
        return result

    def _split(self, columns: torch.Tensor, heads: int) -> torch.Tensor:
        """Columns [B, query heads, n, size] as [heads, B, n, groups, size]."""
        shape = (self.rows, heads, columns.shape[1] // heads, self.columns, columns.shape[3])
        return columns.reshape(shape).permute(1, 0, 3, 2, 4)

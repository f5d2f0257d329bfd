"""Attention of one new token a row to windows that stay in their pages, in one compiled loop.

A search step on the CPU takes longer to copy long windows together than to attend to them, and the
copies push the weights out of the processor's caches. Here each token of a window is read once for
its key and once for its value, where it lies. numba compiles the loop; without it there is none,
and windows are copied as ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch

from paged_kv.checks import whole
from paged_kv.errors import BadShape, NotCopyable
from paged_kv.pages.buffers import Layout
from paged_kv.pages.lease import Lease
from paged_kv.tensors import check_dense, check_tensor

Loop = Callable[..., None]

DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


class PageRows(NamedTuple):
    """Windows in pages that lie as rows of tokens, on the host.

    Row ((page * parts + part) * heads + head) * page_size + slot of `rows` is one token of one
    part; parts are K0, V0, K1, V1, ...
    """

    rows: torch.Tensor  # [pages * parts * heads * page_size, head_size]
    parts: int
    heads: int
    page_size: int
    tables: Sequence[tuple[int, ...]]  # pages of each window
    windows: Sequence[tuple[int, int]]  # of each: offset of its first token in them, tokens


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why windows cannot be attended to in their pages there, or None where they can be."""
    if device.type != "cpu":
        return f"contexts are on {device}, and the loop is for the CPU"
    if dtype not in DTYPES:
        return f"contexts are {dtype}, and the loop knows float32 and float64"
    if loop() is None:
        return 'numba is not installed, or told not to compile: pip install "paged-kv[numba]"'
    return None


@cache
def loop() -> Loop | None:
    """The loop, which is compiled at its first call for each kind of numbers (some seconds); None
    without numba.
    """
    try:
        from numba import config
    except Exception:  # of whatever kind: an installation may be broken in many ways
        return None
    if getattr(config, "DISABLE_JIT", False):
        return None
    from paged_kv.attention.compiled import attend

    return attend  # type: ignore[no-any-return]


class InPages:
    """Attends row by row to windows in their pages, and to new tokens before they are stored there.
    Each row sees its own window alone: nothing is padding. `layout` says where the new tokens lie,
    which move if the windows are copied meanwhile.

    Made by `Step.in_pages`. `shift` [2 * layers, 1, heads, past or more, head_size] is added to the
    window's K and V as they are read, by their index in the window. Raises BadArgument, BadShape,
    BadDtype, BadDevice.
    """

    def __init__(
        self,
        lease: Lease,
        pages: PageRows,
        layout: Callable[[], Layout],
        shift: torch.Tensor | None = None,
    ) -> None:
        self._lease = lease
        rows = pages.rows.detach()
        self._rows = rows.numpy()
        most = max(map(len, pages.tables), default=0)
        tables = [table + (0,) * (most - len(table)) for table in pages.tables]
        self._tables = np.array(tables, dtype=np.int64).reshape(len(tables), most)
        self._shape = pages.parts, pages.heads, pages.page_size
        self._windows = np.array(pages.windows, dtype=np.int64).reshape(-1, 2)
        self._layers = pages.parts // 2
        self._like = rows
        self._wanted = torch.Size((len(pages.tables), pages.heads, 3, rows.shape[1]))
        self._added = self._rows[:0] if shift is None else _table(shift, pages, rows).numpy()
        self._layout = layout
        self._room = layout().room
        self._scale = DTYPES[rows.dtype](1.0 / math.sqrt(rows.shape[1]))

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise NotCopyable("InPages")

    @property
    def dtype(self) -> torch.dtype:
        """Of the pages, and of the tokens that it takes."""
        return self._like.dtype

    def see(self, column: int, layer: int, tokens: torch.Tensor) -> torch.Tensor:
        """Write K and V of a new token to a column of the step's room, and attend to everything up
        to it: [B, heads, head_size].

        `tokens` [B, heads, 3, head_size] are its queries, keys and values; scores are scaled by
        1 / sqrt(head_size). Columns are filled from 0 on, and `Step.fill` says that they are.
        Autograd does not follow. Raises ClosedStep, BadCount, BadArgument, BadShape, BadDtype,
        BadDevice.
        """
        column = whole("column", column, 0, self._room - 1)
        layer = whole("layer", layer, 0, self._layers - 1)
        self._lease.check("see")
        check_dense("tokens", tokens)
        check_tensor("tokens", tokens, self._wanted, self._like)
        made = tokens.detach().contiguous().numpy()
        if made.shape != self._wanted:  # a tensor may say what it likes
            raise BadShape("tokens", made.shape, self._wanted)
        batch, heads, _, size = self._wanted
        seen = np.empty((batch, heads, size), made.dtype)
        layout = self._layout()
        attend = loop()
        assert attend is not None  # or nobody made this
        attend(
            self._rows,
            self._shape,
            self._tables,
            self._windows,
            self._added,
            layout.tokens[0].numpy(),
            (layout.width, layout.first + layout.past),
            (layer, column),
            made.reshape(-1, size),
            self._scale,
            seen.reshape(-1, size),
        )
        return torch.from_numpy(seen)


def _table(shift: torch.Tensor, pages: PageRows, rows: torch.Tensor) -> torch.Tensor:
    """What is added to windows, as rows. Raises BadArgument, BadShape, BadDtype, BadDevice."""
    check_dense("shift", shift)
    size = rows.shape[1]
    longest = max([*shift.shape[3:4], *[length for _, length in pages.windows]])
    check_tensor("shift", shift, (pages.parts, 1, pages.heads, longest, size), rows)
    return shift.detach().contiguous().view(-1, size)

"""One model step that attends where the pages lie: no dense copy of the contexts."""

from __future__ import annotations

from itertools import chain
from typing import Any, NoReturn

import torch

from paged_kv import checks
from paged_kv.attention.choice import make_attention
from paged_kv.attention.contract import Attention, Rows
from paged_kv.attention.scratch import Scratch
from paged_kv.checks import Counts
from paged_kv.errors import BadArgument, BadCount, NotCopyable
from paged_kv.pages.lease import Lease
from paged_kv.pages.pool import Pool
from paged_kv.pages.records import Record
from paged_kv.tensors import check_dense, check_tensor
from paged_kv.turns import Turns, page_reader, verb


class PagedStep:
    """A batch of contexts that is attended in its pages, and new tokens that are written there.

    Made by `PagedKVCache.attend`. Row r has `counts[r]` new tokens; those of all rows lie in
    columns from 0 on. `layers` takes their K and V, one layer after the other, and says what their
    queries see; `commit` publishes the children. A fork that nobody sees yet, as `Step`: its
    parents may change or end meanwhile, several may be open, and one that is closed, or dropped,
    gives everything back.

    Attributes: `parents`; `counts`; `lengths`, tokens of each window before; `layers`.

    >>> from paged_kv import PagedKVCache
    >>> cache = PagedKVCache(layers=1, heads=1, head_size=2, page_size=4)
    >>> root, = cache.new()
    >>> with cache.attend([root], 3) as step:
    ...     kv = torch.ones(1, 1, 3, 2)
    ...     seen = step.layers[0].attend(kv, kv, kv)
    ...     child, = step.commit()
    >>> seen.shape, cache.lengths([child])
    (torch.Size([1, 1, 3, 2]), [3])
    """

    def __init__(self, work: Work) -> None:
        self.turns = work.turns
        self.parents = work.lease.parents
        self.counts = work.counts
        self.lengths = [record[2] for record in work.lease.records]
        self._pool = work.pool
        self._lease = work.lease
        self._work = work
        self.layers = [PagedLayer(work, index) for index in range(work.pool.layers)]

    def __enter__(self) -> PagedStep:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise NotCopyable("PagedStep")

    def __repr__(self) -> str:
        done = sum(self._work.written)
        state = "closed" if self.closed else f"{done} of {len(self.layers)} layers written"
        return f"<PagedStep of {len(self.parents)} rows, {sum(self.counts)} new tokens, {state}>"

    @property
    def closed(self) -> bool:
        """Whether it was committed or closed."""
        return self._lease.closed

    @verb
    def commit(self, counts: Counts | None = None) -> list[int]:
        """Publish the children, one a row; ends the step.

        `counts`: new tokens that each child keeps, the first ones; all by default. Nothing is
        copied. Raises BadCount, also where a layer was not attended; ClosedStep.
        """
        lease = self._lease
        records = lease.windows("commit")
        kept = self.counts
        if counts is not None:
            kept = checks.counts("counts", counts, self.counts)
        layers = len(self.layers)
        written = sum(self._work.written)
        if written < layers and any(kept):
            raise BadCount("layers attended", written, f"all {layers}, before commit()")
        places = [
            record[4] - new + index
            for record, new in zip(records, self.counts)
            for index in range(new)
        ]
        self._pool.storage.place(self._work.slots(records), places)
        return self._pool.steps.publish(lease.number, kept)

    def close(self) -> None:
        """Give the step up; nothing is stored, its pages are free. Closing twice is fine.

        May be called at any time, as `PagedKVCache.release`.
        """
        self.turns.abandon(self._lease.number)


class Work:
    """What the layers of a step share: where their tokens go, and how they are attended."""

    def __init__(
        self,
        pool: Pool,
        turns: Turns,
        lease: Lease,
        counts: list[int],
        backend: str,
        scratch: Scratch,
    ) -> None:
        self.turns = turns
        self.lease = lease
        self.pool = pool
        self.counts = counts
        self.columns = max(counts, default=0)
        self.written = [False] * pool.layers
        self._backend = backend
        self._scratch = scratch
        self._records: list[Record] | None = None
        self._attention: Attention | None = None
        self._chosen: torch.Tensor | None = None  # of rows x columns, where some are padding
        if counts.count(self.columns) != len(counts):
            taken = [
                row * self.columns + column
                for row, new in enumerate(counts)
                for column in range(new)
            ]
            self._chosen = torch.tensor(taken, device=pool.storage.form.device)

    def slots(self, records: list[Record]) -> list[int]:
        """Where the new tokens go, row by row."""
        size = self.pool.books.page_size
        return [
            record[0][index // size] * size + index % size
            for record, new in zip(records, self.counts)
            for index in range(record[1] + record[2] - new, record[1] + record[2])
        ]

    @page_reader
    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float | None,
        window: int | None,
        soft_cap: float | None,
    ) -> torch.Tensor:
        """Write K and V of a layer, then attend: alone, since others move pages."""
        attention = self._look()
        storage = self.pool.storage
        storage.write_tokens(layer, self._index, self._flat(keys), self._flat(values))
        seen = attention.attend(
            layer, queries.detach(), scale=scale, window=window, soft_cap=soft_cap
        )
        self.written[layer] = True
        return seen

    def _look(self) -> Attention:
        """How the rows are attended, made anew where their pages were moved."""
        records = self.lease.windows("attend")
        if records is not self._records or self._attention is None:
            rows = Rows(
                [record[0] for record in records],
                [record[1] for record in records],
                [record[2] - new for record, new in zip(records, self.counts)],
                self.counts,
            )
            storage = self.pool.storage
            storage.hold(self.lease.number, chain.from_iterable(rows.tables))
            self._attention = make_attention(
                storage, rows, backend=self._backend, scratch=self._scratch
            )
            slots = torch.tensor(self.slots(records), dtype=torch.int64)
            self._index = storage.slot_index(slots.to(storage.form.device))
            self._records = records
        return self._attention

    def _flat(self, tokens: torch.Tensor) -> torch.Tensor:
        """New tokens [B, heads, columns, size] as [N, heads, size], without the padding."""
        flat = tokens.detach().transpose(1, 2).flatten(0, 1)
        return flat if self._chosen is None else flat.index_select(0, self._chosen)


class PagedLayer:
    """One layer of a paged step."""

    __slots__ = ("_index", "_work")

    def __init__(self, work: Work, index: int) -> None:
        self._work = work
        self._index = index

    def attend(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> torch.Tensor:
        """Store K and V [B, heads, n, head_size] of the new tokens, and attend the queries
        [B, query heads, n, head_size] to all that each may see: [B, query heads, n,
        value_head_size].

        n is the largest of `counts`; what lies behind the count of a row is passed over, and 0 in
        the result. Query heads are a multiple of the K/V heads, and neighbours share one. `scale`
        is by default 1 / sqrt(head_size); of a `window` each token sees the last tokens only,
        itself included; `soft_cap` c turns scores s into c * tanh(s / c). Called again, it stores
        anew. Autograd does not follow.
        Raises BadArgument, BadShape, BadDtype, BadDevice, ClosedStep.
        """
        work = self._work
        self._check(queries, keys, values)
        return work.attend(self._index, queries, keys, values, scale, window, soft_cap)

    def _check(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Raise unless the tensors fit the step."""
        work = self._work
        work.lease.check("attend")
        form = work.pool.storage.form
        rows = len(work.counts)
        heads = form.parts[0].heads
        sizes = form.parts[0].head_size, form.parts[-1].head_size
        try:
            check_tensor("keys", keys, (rows, heads, work.columns, sizes[0]), form)
            check_tensor("values", values, (rows, heads, work.columns, sizes[1]), form)
            groups = queries.shape[1] // heads if queries.dim() == 4 else 0
            wanted = (rows, max(groups, 1) * heads, work.columns, sizes[0])
            check_tensor("queries", queries, wanted, form)
        except AttributeError:
            raise BadArgument("queries", queries, "a tensor") from None
        except RuntimeError:  # of torch, for which a nested tensor has no shape
            for name, tensor in (("keys", keys), ("values", values), ("queries", queries)):
                check_dense(name, tensor)
            raise

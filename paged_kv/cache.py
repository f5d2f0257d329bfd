"""PagedKVCache: sequences over shared pages, with their tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from paged_kv.block_table import Counts, Record, check_count
from paged_kv.errors import BadCount, BadDtype, BadShape, ParentChanged
from paged_kv.pool import PagePool, one_thread
from paged_kv.staging import Rebase, StagingBatch, check_tensor
from paged_kv.storage import window_slots
from paged_kv.workspace import Ints, Layout, Workspace

Mask = npt.NDArray[np.bool_]


class Gathered(NamedTuple):
    """Dense contexts: views of a buffer that the next gather overwrites; clone to keep."""

    keys: torch.Tensor  # [layers, B, heads, W, head_size]
    values: torch.Tensor  # [layers, B, heads, W, value_head_size]
    lengths: torch.Tensor  # [B] int64
    mask: torch.Tensor  # [B, W] bool, true at tokens
    positions: torch.Tensor  # [B, W] int64, where each token was written; 0 in padding


class PagedKVCache(PagePool):
    """K/V contexts as block tables over shared pages: fork for free, copy on write, all layers at once.

    Keys are [layers, B, heads, tokens, head_size], values the same with `value_head_size`; `heads` counts K/V
    heads. Sequences are int handles. Every verb takes a batch, succeeds whole or raises and changes nothing.
    The pool begins with `num_pages` and doubles up to `max_pages` or `max_bytes`; `grow=False` fixes it.

    >>> cache = PagedKVCache(layers=2, heads=1, head_size=4, page_size=2)
    >>> root, = cache.new(1)
    >>> kv = torch.randn(2, 1, 1, 3, 4)
    >>> cache.append([root], kv, kv)
    >>> left, right = cache.fork([root, root])
    >>> cache.append([left], kv[..., :1, :], kv[..., :1, :])
    >>> cache.lengths([root, left, right]), cache.pages_in_use
    ([3, 4, 3], 3)
    >>> torch.equal(cache.gather([right]).keys, kv)
    True
    >>> cache.release([root, left, right])
    >>> cache.pages_in_use
    0
    """

    _staged: StagingBatch | None = None

    # -- sequences ---------------------------------------------------------------------------------------

    @one_thread
    def new(self, count: int = 1, *, start: int = 0) -> list[int]:
        """Make empty sequences. `start` (0 to page_size - 1) is the offset of the first token in its page.

        A root of r tokens whose children add page_size tokens each wastes nothing with start = -r % page_size.
        """
        return self._tables.new(count, start=start)

    @one_thread
    def fork(self, parents: Iterable[int], *, at: Counts | None = None) -> list[int]:
        """Make one child a parent, sharing every page of its first `at` tokens. Copies no K/V.

        `parents` may name one sequence more than once. Cost: O(pages of the parents) integer increments.
        """
        children = self._tables.fork(parents, at=at)
        self.stats.forks += len(children)
        return children

    @one_thread
    def append(
        self,
        seqs: Iterable[int],
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor | None = None,
    ) -> None:
        """Append n tokens to each sequence: keys [layers, B, heads, n, head_size], values likewise.

        `positions` [B, n] says where the model placed them; by default their index in the window. A shared partial
        tail page is copied first. One kernel, two more where pages are copied. Raises OutOfPages, BadShape,
        BadDtype, BadDevice, DuplicateSequence, StaleHandle, ForeignHandle.
        """
        seqs = list(seqs)
        count = keys.shape[3] if keys.dim() == 5 else 0
        rows = self._storage.planes[0].rows
        for name, tensor, width in (("keys", keys, self.head_size), ("values", values, self.value_head_size)):
            check_tensor(name, tensor, (self.layers, len(seqs), self.heads, count, width), rows)
        if positions is not None:
            check_positions(positions, (len(seqs), count))
        plan = self._plan(seqs, count)
        if positions is None:
            placed = following([length - count for length in plan.lengths], count)
        else:
            placed = positions.cpu().numpy()
        self._write(plan, self._sources(keys, values), placed)
        self._apply(plan)
        self.stats.appends += len(seqs)

    @one_thread
    def slide(self, seqs: Iterable[int], count: Counts) -> None:
        """Drop `count` tokens (one number, or one a sequence) from the front. Moves no data."""
        self.stats.freed_pages += self._tables.slide(seqs, count)

    @one_thread
    def truncate(self, seqs: Iterable[int], count: Counts) -> None:
        """Drop `count` tokens (one number, or one a sequence) from the end. Moves no data."""
        self.stats.freed_pages += self._tables.truncate(seqs, count)

    @one_thread
    def release(self, seqs: Iterable[int]) -> None:
        """Drop sequences; pages that nobody shares become free. Raises StaleHandle where one was released before."""
        self.stats.freed_pages += self._tables.release(seqs)

    @one_thread
    def release_subtree(self, seq: int) -> int:
        """Release `seq` and all its descendants; returns how many. Cost: O(live sequences), no tensor touched.

        Descendants are found over live parents: release children before or with their parents.
        """
        doomed = self._tables.subtree(seq)
        self.release(doomed)
        return len(doomed)

    @one_thread
    def promote(self, child: int) -> int:
        """Keep `child` and its path, release the subtrees of its siblings; returns how many were released."""
        doomed = [seq for sibling in self._tables.siblings(child) for seq in self._tables.subtree(sibling)]
        self.release(doomed)
        return len(doomed)

    # -- reading -----------------------------------------------------------------------------------------

    @one_thread
    def lengths(self, seqs: Iterable[int]) -> list[int]:
        """Tokens of each sequence."""
        return self._tables.lengths(seqs)

    @one_thread
    def gather(self, seqs: Iterable[int], *, pad: str = "right") -> Gathered:
        """Dense K/V of a batch, padded with zeros on the `pad` side ("left" or "right"), in one kernel.

        The tensors are views of a buffer that the next gather overwrites. Cost: bytes of B x the longest window.
        """
        records, left = self._tables.records(list(seqs)), _is_left(pad)
        lengths = [record[2] for record in records]
        layout, index, uniform = self._placed(self._dense, records, 0, left)
        self._storage.gather(index, layout)
        if layout.paged and not uniform:
            layout.blank([(record[1], record[2]) for record in records])
        positions, kept = self._positions(records, left)
        device = self._storage.device
        keys, values = layout.all_layers()
        return Gathered(
            keys,
            values,
            torch.tensor(lengths, dtype=torch.int64, device=device),
            torch.from_numpy(kept).to(device),
            torch.from_numpy(positions).to(device),
        )

    @one_thread
    def block_tables(self, seqs: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pages [B, P] (padded with the null page 0), lengths [B] and head offsets [B], all int32."""
        tables, starts, lengths = self._tables.windows(seqs)
        longest = max(map(len, tables), default=0)
        padded = [(*table, *(0,) * (longest - len(table))) for table in tables]
        options = {"dtype": torch.int32, "device": self._storage.device}
        pages = torch.tensor(padded, **options).reshape(len(tables), longest)  # type: ignore[arg-type]
        return pages, torch.tensor(lengths, **options), torch.tensor(starts, **options)  # type: ignore[arg-type]

    # -- a model step ------------------------------------------------------------------------------------

    @one_thread
    def open(self, seqs: Iterable[int], room: int, *, pad: str = "left", rebase: Rebase | None = None) -> StagingBatch:
        """Gather contexts into a reused dense buffer with room for `room` new tokens each, in one kernel.

        `rebase` is called on the batch after the gather; it may change `planes` in place, by `then` and `now`. A batch
        that is still open is closed: its buffers are taken over.
        """
        parents, left = list(seqs), _is_left(pad)
        check_count("room", room, 0, None)
        records = self._tables.records(parents)
        layout, index, uniform = self._placed(self._stage, records, room, left)
        if self._staged is not None:
            self._staged.close()
        self._storage.gather(index, layout)
        if layout.paged and not uniform:
            layout.blank([(record[1], record[2]) for record in records])
        batch = self._staged = StagingBatch(self, parents, records, left, layout, uniform)
        if rebase is not None:
            rebase(batch)
        return batch

    def _placed(
        self, workspace: Workspace, records: list[Record], room: int, left: bool
    ) -> tuple[Layout, Ints, bool]:
        """The buffers for a batch of windows, the pages or slots that they are filled from, and whether all are alike.

        Windows that end at one offset of their pages are gathered by pages, padded in front with the null page.
        """
        planes, batch, size = self._storage.planes, len(records), self.page_size
        uniform = bool(records) and [record[1:3] for record in records].count(records[0][1:3]) == batch
        if uniform or (left and len({(record[1] + record[2]) % size for record in records}) == 1):
            past = max([record[2] for record in records])
            start = (records[0][1] + records[0][2] - past) % size
            width = -((start + past) // -size) if past else 0
            tables = [record[0] for record in records]
            if not uniform:
                tables = [(0,) * (width - len(pages)) + pages for pages in tables]
            index = np.fromiter(chain.from_iterable(tables), np.int64, batch * width).reshape(batch, width)
            return workspace.layout(planes, batch, past, room, start), index, uniform
        slots = self._slots(records, left)
        return workspace.layout(planes, batch, slots.shape[1], room, None), slots, False

    def _slots(self, records: list[Record], left: bool) -> Ints:
        tables, starts, lengths = ([record[field] for record in records] for field in range(3))
        return window_slots(tables, starts, lengths, self.page_size, left=left)  # type: ignore[arg-type]

    def _positions(self, records: list[Record], left: bool) -> tuple[Ints, Mask]:
        """Where each token of the windows was written, 0 in padding; and which columns are tokens. [B, past]."""
        slots = self._slots(records, left)
        kept = slots >= self.page_size
        return np.where(kept, self._storage.positions.reshape(-1)[slots], 0), kept

    @one_thread
    def _commit(
        self,
        batch: StagingBatch,
        new: int,
        slide: Counts,
        rewrite: Sequence[int | None] | None,
        positions: Ints | None,
        less: Sequence[torch.Tensor] | None,
    ) -> list[int]:
        if self._tables.records(batch.parents) != batch.records:
            raise ParentChanged(batch.parents)
        if positions is not None:
            check_positions(positions, (len(batch.parents), new))
        if rewrite is not None and checked_columns(rewrite, len(batch.parents), batch.size) != [None] * len(rewrite):
            return self._commit_rewritten(batch, new, slide, rewrite, positions, less)
        layout, size = batch.layout, self.page_size
        sources = layout.columns(layout.past, layout.past + new)
        if less is not None:
            check_less(less, sources)
        if positions is None:
            positions = layout.next_positions(new) if batch.uniform else following(batch.lengths, new)
        shortest = layout.past if batch.uniform else min(batch.lengths, default=0)
        if layout.on_edge and new == size and type(slide) is int and 0 <= slide <= shortest and not slide % size:
            pages = self._pages.peek(len(batch.parents))
            if pages:  # what a search does at every step: one fresh page a child
                self._storage.write_pages(pages, 0, sources, positions, less)
                children = self._tables.extend(batch.parents, batch.records, slide // size)
                self._note(len(children))
                return children
        plan = self._plan(batch.parents, new, fork=True, slide=slide)
        self._write(plan, sources, positions, less)
        return self._apply(plan)

    def _commit_rewritten(
        self,
        batch: StagingBatch,
        new: int,
        slide: Counts,
        rewrite: Sequence[int | None],
        positions: Ints | None,
        less: Sequence[torch.Tensor] | None,
    ) -> list[int]:
        if less is not None:
            raise BadCount("less", "given", "None where rows are rewritten")
        if not batch.left:
            raise BadCount("rewrite", list(rewrite), 'None in a batch opened with pad="right"')
        first = list(rewrite)
        plan = self._plan(
            batch.parents, new, fork=True, slide=slide, anew=[None if c is None else batch.size - c for c in first]
        )
        begins = [batch.past if column is None else column for column in first]
        rows = np.repeat(np.arange(len(begins)), [batch.size - column for column in begins])
        columns = np.concatenate([np.arange(column, batch.size) for column in begins])
        zero = [batch.past - length if c is None else c for c, length in zip(first, batch.lengths)]
        placed = columns - np.array(zero)[rows]
        if positions is not None:
            shared = np.array([column is None for column in first])[rows]
            placed[shared] = positions[[column is None for column in first]].reshape(-1)
        device = self._storage.device
        at = torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)
        tokens = [plane.permute(1, 3, 0, 2, 4)[at].permute(1, 0, 2, 3).unsqueeze(3) for plane in batch.planes]
        self._write(plan, tokens, placed[:, None])
        return self._apply(plan)


def check_less(less: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Raise BadCount or BadShape unless these can be subtracted from the new tokens without making them larger."""
    if len(less) != len(sources):
        raise BadCount("less (one a plane)", len(less), f"{len(sources)} tensors")
    for part, source in zip(less, sources):
        got, wanted = part.shape, source.shape
        if len(got) != len(wanted) or [a for a, b in zip(got, wanted) if a != b and a != 1]:
            raise BadShape("less", tuple(got), tuple(wanted))


def following(lengths: Sequence[int], new: int) -> Ints:
    """The positions [B, new] after windows of these lengths."""
    return np.array(lengths, dtype=np.int64)[:, None] + np.arange(new)


def check_positions(positions: torch.Tensor | Ints, shape: tuple[int, int]) -> None:
    """Raise BadShape or BadDtype unless these are int64 numbers [B, n]."""
    if tuple(positions.shape) != shape:
        raise BadShape("positions", tuple(positions.shape), shape)
    if positions.dtype not in (torch.int64, np.int64):
        raise BadDtype("positions", positions.dtype, "int64")


def checked_columns(rewrite: Sequence[int | None], rows: int, size: int) -> list[int | None]:
    """The first columns to store anew, checked against the batch."""
    if len(rewrite) != rows:
        raise BadCount("rewrite (one a row)", list(rewrite), f"{rows} columns or None")
    for column in rewrite:
        if column is not None:
            check_count("rewrite", column, 0, size)
    return list(rewrite)


def _is_left(pad: str) -> bool:
    if pad not in ("left", "right"):
        raise BadCount("pad", pad, '"left" or "right"')
    return pad == "left"

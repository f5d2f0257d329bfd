"""PagedKVCache: sequences over shared pages, with their tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from paged_kv.checks import Counts, amount, choice, columns, flag, function, handle, handles
from paged_kv.errors import (
    BadArgument,
    BadCount,
    BadDevice,
    BadDtype,
    BadShape,
    ClosedBatch,
    ConcurrentCall,
    NestedCall,
    OutOfPages,
    ParentChanged,
)
from paged_kv.pages.buffers import Ints, Layout, Workspace
from paged_kv.pages.change import Record
from paged_kv.pages.pool import PagePool
from paged_kv.pages.storage import window_slots
from paged_kv.scope import Scope
from paged_kv.staging import Rebase, StagingBatch, check_dense, check_tensor
from paged_kv.turns import reader, verb

Mask = npt.NDArray[np.bool_]


class Gathered(NamedTuple):
    """Dense contexts: views of a buffer that the next gather overwrites; clone to keep."""

    keys: torch.Tensor  # [layers, B, heads, W, head_size]
    values: torch.Tensor  # [layers, B, heads, W, value_head_size]
    lengths: torch.Tensor  # [B] int64
    mask: torch.Tensor  # [B, W] bool, true at tokens
    positions: torch.Tensor  # [B, W] int64, where each token was written; 0 in padding


class PagedKVCache(PagePool):
    """K/V contexts as block tables over shared pages: fork for free, copy on write, all layers at
    once.

    Keys are [layers, B, heads, tokens, head_size], values the same with `value_head_size`; `heads`
    counts K/V heads. Sequences are int handles. Every verb takes a batch, succeeds whole or raises
    and changes nothing. The pool begins with `num_pages` and doubles up to `max_pages` or
    `max_bytes`; `grow=False` fixes it.

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

    # -- sequences

    @verb
    def new(self, count: int = 1, *, start: int = 0) -> list[int]:
        """Make empty sequences. `start` (0 to page_size - 1) is the offset of the first token in
        its page.

        A root of r tokens whose children add page_size tokens each wastes nothing with start = -r %
        page_size.
        """
        return self._tables.new(count, start=start)

    @verb
    def fork(self, parents: Iterable[int], *, at: Counts | None = None) -> list[int]:
        """Make one child a parent, sharing every page of its first `at` tokens. Copies no K/V.

        `parents` may name one sequence more than once. Cost: O(pages of the parents) integer
        increments.
        """
        return self._tables.fork(handles(parents, "parents"), at=at)

    def append(
        self,
        seqs: Iterable[int],
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor | None = None,
    ) -> None:
        """Append n tokens to each sequence: keys [layers, B, heads, n, head_size], values likewise.

        `positions` [B, n] says where the model placed them; by default their index in the window. A
        shared partial tail page is copied first. One kernel, two more where pages are copied.
        Raises OutOfPages, BadShape, BadDtype, BadDevice, DuplicateSequence, StaleHandle,
        ForeignHandle, OwnedSequence.
        """
        rows = handles(seqs)
        like = self._storage.planes[0].rows
        try:
            count = keys.shape[3] if isinstance(keys, torch.Tensor) and keys.dim() == 5 else 0
            for name, tensor, width in (
                ("keys", keys, self.head_size),
                ("values", values, self.value_head_size),
            ):
                check_tensor(name, tensor, (self.layers, len(rows), self.heads, count, width), like)
        except RuntimeError:  # of torch, for which a nested tensor has no shape
            check_dense("keys", keys)
            check_dense("values", values)
            raise
        placed = None if positions is None else own_positions(positions, (len(rows), count))
        sources = self._sources(keys, values)
        try:
            self._append(rows, count, sources, placed)
        except OutOfPages as full:
            self._reclaim(full, rows)
        else:
            return
        self._append(rows, count, sources, placed)

    @verb
    def _append(
        self, seqs: list[int], count: int, sources: list[torch.Tensor], positions: Ints | None
    ) -> None:
        self._tables.loose_records(seqs)
        plan = self._plan(seqs, count)
        if positions is None:
            positions = following([record[2] - count for record in plan.becomes], count)
        self._write(plan, sources, positions)
        self._tables.carry_out(plan)

    @verb
    def slide(self, seqs: Iterable[int], count: Counts) -> None:
        """Drop `count` tokens (one number, or one a sequence) from the front. Moves no data."""
        self._tables.slide(handles(seqs), count)

    @verb
    def truncate(self, seqs: Iterable[int], count: Counts) -> None:
        """Drop `count` tokens (one number, or one a sequence) from the end. Moves no data."""
        self._tables.truncate(handles(seqs), count)

    def release(self, seqs: Iterable[int], *, missing_ok: bool = False) -> None:
        """Drop sequences; pages that nobody shares become free.

        May be called at any time, also by a finalizer, a signal handler or another thread while a
        verb of this cache is running: then it is put off until that verb is done, and what is wrong
        with it goes to `sys.unraisablehook`. Else raises StaleHandle where a sequence was released
        before (`missing_ok=True` passes over those), ForeignHandle, DuplicateSequence,
        OwnedSequence.
        """
        doomed = handles(seqs, ordered=False)
        passing = flag("missing_ok", missing_ok)
        try:
            self._release(doomed, passing)
        except (ConcurrentCall, NestedCall):
            self.turns.put_off(doomed, passing)

    @verb
    def _release(self, seqs: list[int], missing_ok: bool) -> None:
        self._tables.release(seqs, missing_ok=missing_ok)

    @verb
    def release_subtree(self, seq: int) -> int:
        """Release `seq` and all its descendants; returns how many. Cost: O(live sequences), no
        tensor touched.

        Descendants are found over live parents: release children before or with their parents.
        Sequences that an index owns end too, and their entries with them; raises PinnedEntry where
        one is pinned.
        """
        doomed = self._tables.subtree(handle(seq))
        self._tables.end_subtrees(doomed)
        return len(doomed)

    @verb
    def promote(self, child: int) -> int:
        """Keep `child` and its path, release the subtrees of its siblings; returns how many were
        released.

        Sequences that an index owns end too, and their entries with them; raises PinnedEntry where
        one is pinned.
        """
        siblings = self._tables.siblings(handle(child))
        doomed = [seq for sibling in siblings for seq in self._tables.subtree(sibling)]
        self._tables.end_subtrees(doomed)
        return len(doomed)

    # -- reading

    @reader
    def lengths(self, seqs: Iterable[int]) -> list[int]:
        """Tokens of each sequence."""
        return self._tables.lengths(handles(seqs))

    @reader
    def live(self) -> list[int]:
        """All sequences that exist, the oldest first: also those that an interrupted verb made and
        nobody received.

        Cost: O(sequences).
        """
        return self._tables.live()

    def scope(self) -> Scope:
        """A block at whose end every sequence is released that was made in it, unless it is kept or
        an index owns it.

        So nothing is lost however the block ends, by Ctrl-C within a verb too.

        >>> cache = PagedKVCache(layers=1, heads=1, head_size=2)
        >>> with cache.scope() as scope:
        ...     root, draft = cache.new(2)
        ...     kept = scope.keep([root])
        >>> cache.live() == kept
        True
        """
        return Scope(self)

    def mark(self) -> tuple[int, int]:
        """This moment, for `made_since`."""
        return self._tables.mark()

    def made_since(self, mark: tuple[int, int]) -> list[int]:
        """Sequences that exist, were made after a moment and belong to no index, the newest first.

        Cost: O(sequences made since).
        """
        # whoever is inside has settled: no scope must wait for him
        with suppress(ConcurrentCall, NestedCall):
            self.settle()
        owned = self._tables.owned
        return [seq for seq in self._tables.made_since(mark) if seq not in owned]

    @verb
    def gather(self, seqs: Iterable[int], *, pad: str = "right") -> Gathered:
        """Dense K/V of a batch, padded with zeros on the `pad` side ("left" or "right"), in one
        kernel.

        The tensors are views of a buffer that the next gather overwrites. Cost: bytes of B x the
        longest window.
        """
        records = self._tables.records(handles(seqs))
        left = _is_left(pad)
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

    @reader
    def block_tables(self, seqs: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pages [B, P] (padded with the null page 0), lengths [B] and head offsets [B],
        all int32.
        """
        tables, starts, lengths = self._tables.windows(handles(seqs))
        longest = max(map(len, tables), default=0)
        padded = [(*table, *(0,) * (longest - len(table))) for table in tables]
        options = {"dtype": torch.int32, "device": self._storage.device}
        pages = torch.tensor(padded, **options).reshape(len(tables), longest)  # type: ignore[arg-type]
        return pages, torch.tensor(lengths, **options), torch.tensor(starts, **options)  # type: ignore[arg-type]

    # -- a model step

    def open(
        self, seqs: Iterable[int], room: int, *, pad: str = "left", rebase: Rebase | None = None
    ) -> StagingBatch:
        """Gather contexts into a reused dense buffer with room for `room` new tokens each, in one
        kernel.

        `rebase` is called on the batch after the gather; it may change `planes` in place, by `then`
        and `now`. A batch that is still open is closed first, whatever happens then: its buffers
        are taken over.
        """
        if rebase is not None:
            function("rebase", rebase, "None or a function of the batch")
        batch = self._open(handles(seqs), amount("room", room, 0), _is_left(pad))
        if rebase is not None:
            self._rebase(batch, rebase)
        return batch

    @verb
    def _open(self, parents: list[int], room: int, left: bool) -> StagingBatch:
        records = self._tables.records(parents)
        layout, index, uniform = self._placed(self._stage, records, room, left)
        if self._staged is not None and not self._staged.closed:
            self._staged.close()
            self._stage = Workspace()  # whoever still works on that batch keeps its buffers
            layout = self._placed(self._stage, records, room, left)[0]
        self._storage.gather(index, layout)
        if layout.paged and not uniform:
            layout.blank([(record[1], record[2]) for record in records])
        batch = StagingBatch(self, parents, records, left, layout, uniform)
        self._staged = batch
        return batch

    @staticmethod
    def _rebase(batch: StagingBatch, rebase: Rebase) -> None:
        """Let a client change the windows of a batch; where it raises, the batch is closed."""
        try:
            rebase(batch)
        except BaseException:
            batch.close()
            raise

    def _placed(
        self, workspace: Workspace, records: list[Record], room: int, left: bool
    ) -> tuple[Layout, Ints, bool]:
        """The buffers for a batch of windows, the pages or slots that they are filled from, and
        whether all are alike.

        Windows that end at one offset of their pages are gathered by pages, padded in front with
        the null page.
        """
        planes = self._storage.planes
        batch = len(records)
        size = self.page_size
        uniform = (
            bool(records) and [record[1:3] for record in records].count(records[0][1:3]) == batch
        )
        if uniform or (left and len({(record[1] + record[2]) % size for record in records}) == 1):
            past = max([record[2] for record in records])
            start = (records[0][1] + records[0][2] - past) % size
            width = -((start + past) // -size) if past else 0
            tables = [record[0] for record in records]
            if not uniform:
                tables = [(0,) * (width - len(pages)) + pages for pages in tables]
            index = np.fromiter(chain.from_iterable(tables), np.int64, batch * width).reshape(
                batch, width
            )
            return workspace.layout(planes, batch, past, room, start), index, uniform
        slots = self._slots(records, left)
        return workspace.layout(planes, batch, slots.shape[1], room, None), slots, False

    def _slots(self, records: list[Record], left: bool) -> Ints:
        tables, starts, lengths = ([record[field] for record in records] for field in range(3))
        return window_slots(tables, starts, lengths, self.page_size, left=left)  # type: ignore[arg-type]

    @reader
    def positions_of(self, batch: StagingBatch) -> Ints:
        """Where each token of the windows of an open batch was written [B, past], 0 in padding."""
        self._check_parents(batch)
        return self._positions(batch.records, batch.left)[0]

    def _check_parents(self, batch: StagingBatch) -> None:
        """Raise ParentChanged unless every window is the very one that was opened."""
        if not self._tables.are_still(batch.parents, batch.records):
            self._tables.records(batch.parents)  # raises where one was released
            raise ParentChanged(batch.parents)

    def _positions(self, records: list[Record], left: bool) -> tuple[Ints, Mask]:
        """Where each token of the windows was written, 0 in padding; and which columns are tokens.
        [B, past].
        """
        slots = self._slots(records, left)
        kept = slots >= self.page_size
        return np.where(kept, self._storage.positions.reshape(-1)[slots], 0), kept

    def commit(
        self,
        batch: StagingBatch,
        *,
        slide: Counts = 0,
        rewrite: Sequence[int | None] | None = None,
        positions: torch.Tensor | Ints | None = None,
        less: Sequence[torch.Tensor] | None = None,
    ) -> list[int]:
        """Store the new tokens of a batch of this cache: see `StagingBatch.commit`, which calls
        this.
        """
        if not isinstance(batch, StagingBatch) or batch.opened("commit") is not self:
            raise BadArgument("batch", batch, "what open() of this cache returned")
        rows = len(batch.parents)
        new = batch.filled()
        placed = None if positions is None else own_positions(positions, (rows, new))
        first = None if rewrite is None else columns("rewrite", rewrite, rows, batch.past + new)
        parents = batch.parents
        try:
            return self._commit(parents, batch, new, slide, first, placed, less)
        except OutOfPages as full:
            self._reclaim(full, parents)
        return self._commit(parents, batch, new, slide, first, placed, less)

    @verb
    def _commit(
        self,
        parents: list[int],
        batch: StagingBatch,
        new: int,
        slide: Counts,
        rewrite: list[int | None] | None,
        positions: Ints | None,
        less: Sequence[torch.Tensor] | None,
    ) -> list[int]:
        if batch.closed:
            raise ClosedBatch("commit")
        self._check_parents(batch)
        if rewrite is not None and rewrite != [None] * len(rewrite):
            return self._commit_rewritten(batch, new, slide, rewrite, positions, less)
        layout = batch.layout
        size = self.page_size
        sources = layout.columns(layout.past, layout.past + new)
        if less is not None:
            less = checked_less(less, sources)
        if positions is None:
            positions = (
                layout.next_positions(new) if batch.uniform else following(batch.lengths, new)
            )
        shortest = layout.past if batch.uniform else min(batch.lengths, default=0)
        if (
            layout.on_edge
            and new == size
            and type(slide) is int
            and 0 <= slide <= shortest
            and not slide % size
        ):
            pages = self._pages.peek(len(parents))
            if pages:  # what a search does at every step: one fresh page a child
                self._storage.write_pages(pages, 0, sources, positions, less)
                return self._tables.extend(parents, batch.records, slide // size, pages, batch)
        plan = self._plan(parents, new, fork=True, slide=slide)
        self._write(plan, sources, positions, less)
        return self._tables.carry_out(plan, batch)

    def _commit_rewritten(
        self,
        batch: StagingBatch,
        new: int,
        slide: Counts,
        first: list[int | None],
        positions: Ints | None,
        less: Sequence[torch.Tensor] | None,
    ) -> list[int]:
        if less is not None:
            raise BadCount("less", "given", "None where rows are rewritten")
        if not batch.left:
            raise BadCount("rewrite", first, 'None in a batch opened with pad="right"')
        size = batch.past + new
        anew = [None if column is None else size - column for column in first]
        plan = self._plan(batch.parents, new, fork=True, slide=slide, anew=anew)
        begins = [batch.past if column is None else column for column in first]
        rows = np.repeat(np.arange(len(begins)), [size - column for column in begins])
        columns = np.concatenate([np.arange(column, size) for column in begins])
        zero = [batch.past - length if c is None else c for c, length in zip(first, batch.lengths)]
        placed = columns - np.array(zero)[rows]
        if positions is not None:
            shared = np.array([column is None for column in first])[rows]
            placed[shared] = positions[[column is None for column in first]].reshape(-1)
        device = self._storage.device
        at = torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)
        tokens = [
            plane.permute(1, 3, 0, 2, 4)[at].permute(1, 0, 2, 3).unsqueeze(3)
            for plane in batch.planes
        ]
        self._write(plan, tokens, placed[:, None])
        return self._tables.carry_out(plan, batch)


def checked_less(
    less: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """What can be subtracted from the new tokens without making them larger, without the graph of
    what made it.

    Raises BadArgument, BadCount, BadShape or BadDtype.
    """
    if not isinstance(less, (list, tuple)):
        raise BadArgument("less", less, "a list of tensors, one a plane")
    if len(less) != len(sources):
        raise BadCount("less (one a plane)", len(less), f"{len(sources)} tensors")
    for part, source in zip(less, sources):
        check_dense("less", part)
        got = part.shape
        wanted = source.shape
        if len(got) != len(wanted) or [a for a, b in zip(got, wanted) if a != b and a != 1]:
            raise BadShape("less", tuple(got), tuple(wanted))
        if part.dtype != source.dtype:
            raise BadDtype("less", part.dtype, source.dtype)
        if part.device != source.device:
            raise BadDevice("less", part.device, source.device)
    return [part.detach() for part in less]


def following(lengths: Sequence[int], new: int) -> Ints:
    """The positions [B, new] after windows of these lengths."""
    return np.array(lengths, dtype=np.int64)[:, None] + np.arange(new)


def own_positions(positions: torch.Tensor | Ints, shape: tuple[int, int]) -> Ints:
    """A copy of int64 numbers [B, n], on the host. Raises BadArgument, BadShape, BadDtype or
    BadDevice.
    """
    if not isinstance(positions, (torch.Tensor, np.ndarray)):
        raise BadArgument("positions", positions, "an int64 tensor or array [B, n]")
    if isinstance(positions, torch.Tensor):
        check_dense("positions", positions)
    if tuple(positions.shape) != shape:
        raise BadShape("positions", tuple(positions.shape), shape)
    if positions.dtype not in (torch.int64, np.int64):
        raise BadDtype("positions", positions.dtype, "int64")
    if isinstance(positions, torch.Tensor):
        if positions.is_meta:
            raise BadDevice("positions", positions.device, "a device that holds data")
        positions = positions.detach().cpu().numpy()
    return np.array(positions)


def _is_left(pad: str) -> bool:
    return choice("pad", pad, ("left", "right")) == "left"

"""The memory under a cache: makes room, writes, then applies what was planned; and the figures of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import wraps
from typing import Any, Protocol, TypeVar

import torch

from paged_kv.allocator import PageAllocator
from paged_kv.block_table import BlockTables, Counts, check_count
from paged_kv.errors import BadCount, BadDtype, ConcurrentCall, OutOfPages
from paged_kv.plan import Plan
from paged_kv.stats import CacheStats
from paged_kv.storage import PageStorage
from paged_kv.workspace import Ints, Workspace

F = TypeVar("F", bound=Callable[..., Any])


class Reclaimer(Protocol):
    """Who gives pages back when the pool is full and cannot grow: an index or a manager."""

    def reclaim(self, need: int, busy: Collection[int]) -> bool:
        """Free at least `need` pages, never of sequences in `busy`, or change nothing and return False."""

    def pinned_pages(self) -> int:
        """Pages that pins keep from being given back."""


def one_thread(method: F) -> F:
    """Refuse a call from a second thread while one is running; the same thread may nest calls."""

    @wraps(method)
    def guarded(self: PagePool, *args: Any, **kwargs: Any) -> Any:
        lock = self._lock
        if not lock.acquire(blocking=False):
            raise ConcurrentCall(method.__name__.lstrip("_"))
        try:
            return method(self, *args, **kwargs)
        finally:
            lock.release()

    return guarded  # type: ignore[return-value]


class PagePool:
    """Pages, block tables and tensors of one cache. `PagedKVCache` adds the verbs; see there for the arguments."""

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        head_size: int,
        value_head_size: int | None = None,
        page_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        num_pages: int = 64,
        max_pages: int | None = None,
        max_bytes: int | None = None,
        grow: bool = True,
    ) -> None:
        value_head_size = head_size if value_head_size is None else value_head_size
        sizes = {"layers": layers, "heads": heads, "head_size": head_size, "value_head_size": value_head_size}
        for name, value in {**sizes, "page_size": page_size, "num_pages": num_pages}.items():
            check_count(name, value, 1, None)
        self.layers, self.heads, self.head_size, self.value_head_size = layers, heads, head_size, value_head_size
        self.page_size = page_size
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise BadDtype("the cache", dtype, "a floating point dtype, as torch.float32 or torch.bfloat16")
        self._storage = PageStorage(layers, heads, head_size, value_head_size, page_size, dtype, torch.device(device))
        self.page_bytes = self._storage.page_bytes
        limit = self._page_limit(num_pages, max_pages, max_bytes)
        limit = limit if grow else num_pages
        self._pages = PageAllocator(num_pages, max_pages=limit)
        self._tables = BlockTables(self._pages, page_size)
        self._storage.grow(num_pages)
        self._stage, self._dense = Workspace(), Workspace()
        self._reclaimer: Reclaimer | None = None
        self._lock = threading.RLock()
        self.stats = CacheStats()

    def _page_limit(self, num_pages: int, max_pages: int | None, max_bytes: int | None) -> int | None:
        limits = [] if max_pages is None else [max_pages]
        if max_bytes is not None:
            if max_bytes < num_pages * self.page_bytes:
                raise BadCount("max_bytes", max_bytes, f">= num_pages * page_bytes = {num_pages * self.page_bytes}")
            limits.append(max_bytes // self.page_bytes)
        if max_pages is not None:
            check_count("max_pages", max_pages, num_pages, None)
        return min(limits, default=None)

    def _plan(
        self,
        seqs: list[int],
        count: Counts,
        *,
        fork: bool = False,
        slide: Counts = 0,
        anew: Sequence[int | None] | None = None,
    ) -> Plan:
        """A plan that the free pages can carry: grows the pool, then evicts, or raises OutOfPages."""
        plan = self._tables.plan(seqs, count, fork=fork, slide=slide, anew=anew)
        if plan.fresh > self._pages.free_count:
            self._make_room(plan.fresh, seqs)
            plan = self._tables.plan(seqs, count, fork=fork, slide=slide, anew=anew)
            if plan.fresh > self._pages.free_count:  # the reclaimer promised more than it gave
                raise OutOfPages(plan.fresh, self._pages.free_count)
        return plan

    def _make_room(self, need: int, busy: list[int]) -> None:
        """Make `need` pages free: evict what growth cannot give, then grow."""
        free, reclaimer = self._pages.free_count, self._reclaimer
        short = need - free - self._pages.growable
        if short > 0 and (reclaimer is None or not reclaimer.reclaim(short, frozenset(busy))):
            raise OutOfPages(need, free, 0 if reclaimer is None else reclaimer.pinned_pages())
        size = self._pages.growth_for(need)
        if size > self._pages.capacity:
            self._storage.grow(size)
            self._pages.grow(size)
            self.stats.growths += 1

    def _write(
        self, plan: Plan, sources: Sequence[torch.Tensor], positions: Ints, less: Sequence[torch.Tensor] | None = None
    ) -> None:
        """Fill fresh pages and dead slots: nothing a live sequence reads, so a failure changes nothing."""
        if plan.copies:
            self._storage.copy_pages(plan.copies)
        if not any(plan.counts):
            return
        pages = plan.row_pages() if sources[0].shape[1] == len(plan.seqs) else None  # else they come token by token
        if pages is None:
            self._storage.scatter(plan.slots, sources, positions, less)
        else:
            self._storage.write_pages(*pages, sources, positions, less)

    def _apply(self, plan: Plan) -> list[int]:
        free, stats = self._pages.free_count, self.stats
        seqs = self._tables.apply(plan)
        stats.freed_pages += self._pages.free_count - free + plan.fresh
        stats.copied_pages += len(plan.copies)
        self._note(plan.fresh)
        return seqs

    def _note(self, fresh: int) -> None:
        """Count pages that were taken."""
        stats, used = self.stats, self._pages.used_count
        stats.allocated_pages += fresh
        if used > stats.peak_pages:
            stats.peak_pages = used

    def _sources(self, keys: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
        """The tokens of an append, one tensor a plane: K0, V0, K1, V1, ... where both lie in one plane."""
        keys, values = keys.detach(), values.detach()  # the pool must not hold the graph of what made the tokens
        if len(self._storage.planes) == 2:
            return [keys, values]
        return [torch.stack((keys, values), dim=1).flatten(0, 1)]

    @one_thread
    def page_tables(self, seqs: Iterable[int]) -> list[tuple[int, ...]]:
        """The pages of each sequence, on the host; `block_tables` has them as a tensor."""
        return self._tables.windows(seqs)[0]

    @one_thread
    def pages_needed(self, seqs: Iterable[int], count: Counts, *, fork: bool = False) -> int:
        """Dry run: pages that appending `count` tokens (to forked children) would take."""
        return self._tables.plan(seqs, count, fork=fork).fresh

    @one_thread
    def pages_freed_by(self, seqs: Iterable[int]) -> int:
        """Dry run: pages that releasing all of `seqs` would free."""
        return self._tables.freed_by(seqs)

    @one_thread
    def set_reclaimer(self, reclaimer: Reclaimer | None) -> None:
        """Ask `reclaimer` for pages when the pool is full and cannot grow."""
        self._reclaimer = reclaimer

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self._storage.dtype

    @property
    def device(self) -> torch.device:
        """Where the pages lie."""
        return self._storage.planes[0].rows.device

    @property
    def token_bytes(self) -> int:
        """K and V of one token, all layers."""
        return self.page_bytes // self.page_size

    @property
    def pages_in_use(self) -> int:
        """Pages that some sequence holds."""
        return self._pages.used_count

    @property
    def pages_free(self) -> int:
        """Pages ready to be taken without growth."""
        return self._pages.free_count

    @property
    def pages_reserved(self) -> int:
        """Pages the pool has memory for."""
        return self._pages.capacity

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the pages in use."""
        return self.pages_in_use * self.page_bytes

    @property
    def bytes_reserved(self) -> int:
        """Bytes of all pages the pool has memory for, the null page not counted."""
        return self.pages_reserved * self.page_bytes

    @property
    def working_bytes(self) -> int:
        """Bytes of the reused dense buffers of open() and gather()."""
        return self._stage.nbytes + self._dense.nbytes

    @property
    def live_sequences(self) -> int:
        """Sequences that exist."""
        return self._tables.live_count

    @property
    def logical_tokens(self) -> int:
        """Tokens of all live sequences, shared ones counted once a sequence. Cost: O(sequences)."""
        return sum(self._tables.lengths(self._tables.live()))

    @property
    def stored_tokens(self) -> int:
        """Slots that live sequences read, each counted once. Cost: O(all block tables)."""
        return self._tables.stored_tokens()

    @one_thread
    def check(self) -> None:
        """Raise CorruptCache unless every invariant of docs/design.md holds. Cost: O(everything)."""
        self._tables.check()

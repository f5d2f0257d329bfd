"""The memory under a cache: makes room, writes, then lets a plan take effect; and the figures of
it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NoReturn, Protocol, TypeVar

import torch

from paged_kv.checks import Counts, amount, flag, function, handles, limit
from paged_kv.errors import BadArgument, BadDevice, BadDtype, NotCopyable, OutOfPages
from paged_kv.pages.allocator import PageAllocator
from paged_kv.pages.block_tables import BlockTables, Listener
from paged_kv.pages.buffers import Ints, Workspace
from paged_kv.pages.plan import Plan
from paged_kv.pages.storage import PageStorage
from paged_kv.stats import CacheStats
from paged_kv.turns import Turns, reader, verb

T = TypeVar("T")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Reclaimer(Protocol):
    """Who gives pages back when the pool is full and cannot grow: an index or a manager."""

    def reclaim(self, need: int, busy: Collection[int]) -> bool:
        """Free at least `need` pages, never of sequences in `busy`, or change nothing and return
        False.

        It is called between two verbs, and may call any. What it freed stays free where the verb
        that asked fails after all.
        """

    def pinned_pages(self) -> int:
        """Pages that pins keep from being given back."""


class PagePool:
    """Pages, block tables and tensors of one cache. `PagedKVCache` adds the verbs; see there for
    the arguments.
    """

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
        self.layers = amount("layers", layers, 1)
        self.heads = amount("heads", heads, 1)
        self.head_size = amount("head_size", head_size, 1)
        self.value_head_size = self.head_size
        if value_head_size is not None:
            self.value_head_size = amount("value_head_size", value_head_size, 1)
        self.page_size = amount("page_size", page_size, 1)
        if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
            allowed = (
                "torch.float32, float64, float16 or bfloat16: tokens are stored as they "
                "are, never scaled"
            )
            raise BadDtype("the cache", dtype, allowed)
        num_pages = amount("num_pages", num_pages, 1)
        most = limit(
            "max_pages", max_pages, num_pages, f"None or an int >= num_pages = {num_pages}"
        )
        bytes_allowed = limit("max_bytes", max_bytes, 0, "None or an int >= 0")
        growing = flag("grow", grow)
        self._storage = _storage(self, dtype, device)
        self.page_bytes = self._storage.page_bytes
        if bytes_allowed is not None:
            least = num_pages * self.page_bytes
            limit(
                "max_bytes", max_bytes, least, f"None or an int >= num_pages * page_bytes = {least}"
            )
            pages_allowed = bytes_allowed // self.page_bytes
            most = pages_allowed if most is None else min(most, pages_allowed)
        self._pages = PageAllocator(num_pages, max_pages=most if growing else num_pages)
        self._tables = BlockTables(self._pages, self.page_size)
        self.turns = Turns(self._tables)
        self._storage.grow(num_pages)
        self._stage = Workspace()
        self._dense = Workspace()
        self._reclaimer: Reclaimer | None = None

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise NotCopyable(type(self).__name__)

    # -- room

    def _reclaim(self, full: OutOfPages, busy: list[int]) -> None:
        """Have as many pages freed as growth cannot give, or raise OutOfPages.

        Called between two tries of a verb, so that a reclaimer may call any verb itself.
        """
        reclaimer = self._reclaimer
        if reclaimer is None:
            raise full
        short = full.requested - full.free - self._pages.growable
        if not reclaimer.reclaim(short, frozenset(busy)):
            raise OutOfPages(full.requested, full.free, reclaimer.pinned_pages()) from None

    def _plan(
        self,
        seqs: list[int],
        count: Counts,
        *,
        fork: bool = False,
        slide: Counts = 0,
        anew: Sequence[int | None] | None = None,
    ) -> Plan:
        """A plan that the free pages can carry: grows the pool where it may, or raises
        OutOfPages.
        """
        plan = self._tables.plan(seqs, count, fork=fork, slide=slide, anew=anew)
        if plan.fresh > self._pages.free_count:
            self._grow_for(plan.fresh)
            plan = self._tables.plan(seqs, count, fork=fork, slide=slide, anew=anew)
        return plan

    def _grow_for(self, need: int) -> None:
        """Let `need` pages be free. Raises OutOfPages."""
        pages = self._pages
        if need - pages.free_count > pages.growable:
            raise OutOfPages(need, pages.free_count)
        size = pages.growth_for(need)
        self._storage.grow(size)
        self._tables.grow(size)

    # -- a plan is carried out

    def _write(
        self,
        plan: Plan,
        sources: Sequence[torch.Tensor],
        positions: Ints,
        less: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """Fill fresh pages and dead slots: nothing a live sequence reads, so a failure changes
        nothing.
        """
        if plan.copies:
            self._storage.copy_pages(plan.copies)
        if not any(plan.counts):
            return
        # else they come token by token
        pages = plan.row_pages() if sources[0].shape[1] == len(plan.seqs) else None
        if pages is None:
            self._storage.scatter(plan.slots, sources, positions, less)
        else:
            self._storage.write_pages(*pages, sources, positions, less)

    def _sources(self, keys: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
        """The tokens of an append, one tensor a plane: K0, V0, K1, V1, ... where both lie in one
        plane.
        """
        keys = keys.detach()  # the pool must not hold the graph of what made the tokens
        values = values.detach()
        if len(self._storage.planes) == 2:
            return [keys, values]
        return [torch.stack((keys, values), dim=1).flatten(0, 1)]

    # -- reading

    @reader
    def page_tables(self, seqs: Iterable[int]) -> list[tuple[int, ...]]:
        """The pages of each sequence, on the host; `block_tables` has them as a tensor."""
        return self._tables.windows(handles(seqs))[0]

    @reader
    def pages_needed(self, seqs: Iterable[int], count: Counts, *, fork: bool = False) -> int:
        """Dry run: pages that appending `count` tokens (to forked children) would take."""
        return self._tables.plan(handles(seqs), count, fork=flag("fork", fork)).fresh

    @reader
    def pages_freed_by(self, seqs: Iterable[int]) -> int:
        """Dry run: pages that releasing all of `seqs` would free."""
        return self._tables.freed_by(handles(seqs, ordered=False))

    @verb
    def set_reclaimer(self, reclaimer: Reclaimer | None) -> None:
        """Ask `reclaimer` for pages when the pool is full and cannot grow. None: nobody. Raises
        BadArgument.
        """
        if reclaimer is not None:
            self._check_reclaimer(reclaimer)
        self._reclaimer = reclaimer

    def _check_reclaimer(self, reclaimer: Reclaimer) -> None:
        """Raise BadArgument unless it has the hooks; an index or a manager must be one of this
        cache.
        """
        hooks = (getattr(reclaimer, hook, None) for hook in ("reclaim", "pinned_pages"))
        if isinstance(reclaimer, type) or not all(map(callable, hooks)):
            allowed = "None or an object with reclaim() and pinned_pages()"
            raise BadArgument("reclaimer", reclaimer, allowed)
        turns = getattr(reclaimer, "turns", self.turns)
        if isinstance(turns, Turns) and turns is not self.turns:
            raise BadArgument("reclaimer", reclaimer, "an index or a manager of this cache")

    @property
    def reclaimer(self) -> Reclaimer | None:
        """Who is asked for pages when the pool is full."""
        return self._reclaimer

    def settle(self) -> None:
        """Finish what an interrupted verb left half done. Every verb and every figure begins with
        it.
        """
        if self._tables.change is not None:
            self._settle()

    @verb
    def _settle(self) -> None:
        pass  # what has to be done is done before a verb begins

    @property
    def tables(self) -> BlockTables:
        """The books: to be read only."""
        self.settle()
        return self._tables

    @reader
    def look(self, read: Callable[[BlockTables], T]) -> T:
        """What `read` finds in the books, which nobody changes meanwhile. Raises BadArgument."""
        function("read", read, "a function of the books")
        return read(self._tables)

    @verb
    def listen(self, listener: Listener) -> None:
        """Tell `listener` of every change from now on; see `Listener`. It may read, and release.

        Raises BadArgument where it cannot be called.
        """
        function("listener", listener, "a function of a change and two lists of pages")
        self._tables.listeners.append(listener)

    @verb
    def unlisten(self, listener: Listener) -> None:
        """Tell it no more. Raises BadArgument where it was not told before."""
        if not callable(listener) or listener not in self._tables.listeners:
            raise BadArgument("listener", listener, "one that listens")
        self._tables.listeners.remove(listener)

    @property
    def stats(self) -> CacheStats:
        """What the cache did since it was made. Cost: a new record each time."""
        done = self.tables.figures
        pages = self._pages
        return CacheStats(
            done.forks,
            done.appends,
            done.allocated,
            done.copied,
            done.allocated - pages.used_count,
            pages.growths,
            pages.peak,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self._storage.dtype

    @property
    def device(self) -> torch.device:
        """Where the pages lie."""
        return self._storage.device

    @property
    def token_bytes(self) -> int:
        """K and V of one token, all layers."""
        return self.page_bytes // self.page_size

    @property
    def pages_in_use(self) -> int:
        """Pages that some sequence holds."""
        return self.tables.pages.used_count

    @property
    def pages_free(self) -> int:
        """Pages ready to be taken without growth."""
        return self.tables.pages.free_count

    @property
    def pages_reserved(self) -> int:
        """Pages the pool has memory for."""
        return self.tables.pages.capacity

    @property
    def max_pages(self) -> int | None:
        """Pages that the pool may grow to; None where nothing bounds it."""
        return self._pages.max_pages

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
        return self.tables.live_count

    @property
    def logical_tokens(self) -> int:
        """Tokens of all live sequences, shared ones counted once a sequence. Cost: O(sequences)."""
        return sum(record[2] for _, record in self.tables.items())

    @property
    def stored_tokens(self) -> int:
        """Slots that live sequences read, each counted once. Cost: O(all block tables)."""
        return self.tables.stored_tokens()

    @reader
    def check(self) -> None:
        """Raise CorruptCache unless every invariant of docs/design.md holds. Cost:
        O(everything).
        """
        self._tables.check()


def _storage(pool: PagePool, dtype: torch.dtype, device: torch.device | str) -> PageStorage:
    """Memory for no page yet. Raises BadDevice where torch cannot put a tensor on the device."""
    allowed = "a device of this machine that holds data, as 'cpu' or 'cuda:0'"
    if not isinstance(device, (str, torch.device)):
        raise BadDevice("the cache", device, allowed)
    try:
        where = torch.device(device)
        torch.empty(1, device=where)
    except Exception as error:  # torch has many kinds for what is not there
        raise BadDevice("the cache", device, allowed) from error
    if where.type == "meta":
        raise BadDevice("the cache", device, allowed)
    sizes = pool.layers, pool.heads, pool.head_size, pool.value_head_size, pool.page_size
    return PageStorage(*sizes, dtype, where)

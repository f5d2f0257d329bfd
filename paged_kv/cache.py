"""PagedKVCache: sequences over shared pages, with their tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import chain
from typing import Any, NoReturn, TypeVar
from weakref import ref

import torch

from paged_kv.append import Appender
from paged_kv.attention.contract import Rows
from paged_kv.attention.kernels import (
    FlashAttentionPages,
    FlashInferPages,
    flash_attention_pages,
    flashinfer_pages,
)
from paged_kv.bundles.bundle import Bundle, Source
from paged_kv.bundles.codec import Codec
from paged_kv.bundles.exchange import Exchange
from paged_kv.bundles.holders import Holder
from paged_kv.checks import Counts, flag, function, handle, handles, whole
from paged_kv.errors import (
    BadArgument,
    ConcurrentCall,
    NestedCall,
    NotCopyable,
)
from paged_kv.events import Listener
from paged_kv.gather import Gathered, gather_windows
from paged_kv.opening import Opener
from paged_kv.paged_step import PagedStep
from paged_kv.pages.audit import audit
from paged_kv.pages.books import Books
from paged_kv.pages.making import Bounds, Sizes, make_pool
from paged_kv.pages.pool import Reclaimer
from paged_kv.pages.tiers.contract import Tiers
from paged_kv.scope import Scope
from paged_kv.stats import CacheStats, TierStats
from paged_kv.step import Hook, Step
from paged_kv.tensors import is_left
from paged_kv.turns import Turns, page_reader, reader, verb

T = TypeVar("T")


class PagedKVCache:
    """K/V contexts as block tables over shared pages: fork for free, copy on write, all layers at
    once.

    Keys are [layers, B, heads, tokens, head_size], values the same with `value_head_size`.
    Sequences are int handles. Every verb takes a batch, succeeds whole or raises and changes
    nothing.

    - `layers`, `heads` (K/V heads), `head_size`, `value_head_size` (by default `head_size`).
    - `page_size`: tokens of a page. A page is shared as a whole, and what it holds beyond the last
      token is waste: take what a step of the search adds (2 for UniZero), a few tokens where it
      adds one, 16 where branches are long.
    - `dtype`, `device`: of the tokens that come and go.
    - `storage`: "exact" keeps them as they are; "int8" in a byte a number and two for each row of a
      head, each within half a step of what it was: see docs/quantised.md.
    - `num_pages` to begin with; the pool doubles up to `max_pages` or `max_bytes`, or without an
      end where neither is given. `grow=False` fixes it at `num_pages`.

    - `tiers`: how many pages lie in memory of that device, and where all others do; see
      `paged_kv.tiers`. By default all do.

    Raises BadCount, BadArgument, BadDtype, BadDevice.

    >>> cache = PagedKVCache(layers=2, heads=1, head_size=4, page_size=2)
    >>> root, = cache.new(1)
    >>> kv = torch.randn(2, 1, 1, 3, 4)
    >>> cache.append([root], kv, kv)
    >>> left, right = cache.fork([root, root])
    >>> cache.append([left], kv[..., :1, :], kv[..., :1, :])
    >>> cache.lengths([root, left, right]), cache.pages_in_use
    ([3, 4, 3], 2)
    >>> torch.equal(cache.gather([right]).keys, kv)
    True
    >>> cache.release([root, left, right])
    >>> cache.pages_in_use
    0
    """

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        head_size: int,
        page_size: int,
        value_head_size: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        storage: str = "exact",
        num_pages: int = 64,
        max_pages: int | None = None,
        max_bytes: int | None = None,
        grow: bool = True,
        tiers: Tiers | None = None,
    ) -> None:
        self._pool = make_pool(
            Sizes(layers, heads, head_size, value_head_size, page_size),
            dtype,
            device,
            Bounds(num_pages, max_pages, max_bytes, grow),
            storage,
            tiers,
        )
        self.storage = storage
        form = self._pool.storage.form
        self.layers = self._pool.layers
        self.heads = form.parts[0].heads
        self.head_size = form.parts[0].head_size
        self.value_head_size = form.parts[-1].head_size
        self.page_size = form.page_size
        self.page_bytes = self._pool.storage.page_bytes
        self.turns = Turns(self._pool.steps)
        self._appender = Appender(self._pool, self.turns)
        self._opener = Opener(self._pool, self.turns)
        self._exchange = Exchange(self._pool, self.turns)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise NotCopyable(type(self).__name__)

    def __repr__(self) -> str:
        pool = self._pool  # as it is: this may be called inside a verb
        kind = str(self.dtype).removeprefix("torch.")
        return (
            f"<PagedKVCache of {self.layers} layers x {self.heads} heads x {self.head_size} {kind} "
            f"on {self.device}: {pool.books.live_count} sequences, {pool.pages.used_count} of "
            f"{pool.pages.capacity} pages of {self.page_size} tokens in use>"
        )

    # -- sequences

    @verb
    def new(self, count: int = 1, *, start: int = 0) -> list[int]:
        """Make empty sequences. `start` (0 to page_size - 1) is the offset of the first token in
        its page.

        A root of r tokens whose children add page_size tokens each wastes nothing with start = -r %
        page_size.
        """
        return self._pool.tables.new(count, start=start)

    @verb
    def fork(
        self, parents: Iterable[int], *, at: Counts | None = None, root: bool = False
    ) -> list[int]:
        """Make one child a parent, sharing every page of its first `at` tokens. Copies no K/V.

        `parents` may name one sequence more than once. With `root=True` each child begins a tree of
        its own: so a prompt that is used again begins another search. Cost: O(pages of the parents)
        integer increments.
        """
        pool = self._pool
        return pool.tables.fork(
            handles(parents, "parents"),
            at=at,
            root=flag("root", root),
            position_of=pool.position_of,
        )

    def append(
        self,
        seqs: Iterable[int],
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor | None = None,
    ) -> None:
        """Append n tokens to each sequence: keys [layers, B, heads, n, head_size], values likewise.

        `positions` [B, n] says where the model placed them; by default each goes one behind the
        token before it. A partial last page that another sequence has written on in is copied
        first. One kernel, two more where pages are copied.
        Raises OutOfPages, BadShape, BadDtype, BadDevice, DuplicateSequence, StaleHandle,
        ForeignHandle, OwnedSequence.
        """
        self._appender.append(seqs, keys, values, positions)

    @verb
    def slide(self, seqs: Iterable[int], count: Counts) -> None:
        """Drop `count` tokens (one number, or one a sequence) from the front. Moves no data."""
        self._pool.tables.slide(handles(seqs), count)

    @verb
    def truncate(self, seqs: Iterable[int], count: Counts) -> None:
        """Drop `count` tokens (one number, or one a sequence) from the end. Moves no data."""
        self._pool.tables.truncate(handles(seqs), count, self._pool.position_of)

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
        self._pool.tables.release(seqs, missing_ok=missing_ok)

    @verb
    def release_subtree(self, seq: int) -> int:
        """Release `seq` and all its descendants; returns how many.

        Sequences that an index owns end too, and their entries with them; raises PinnedEntry where
        one is pinned. Cost: O(pages of what is released), no tensor touched.
        """
        pool = self._pool
        root = handle(seq)
        pool.books.records([root])
        doomed = pool.books.tree.below([root])
        pool.tables.end_subtrees(doomed)
        return len(doomed)

    @verb
    def promote(self, child: int) -> int:
        """Keep `child` and all below it; release what else hangs below its parent.

        Returns how many were released. Its parent is the nearest sequence above it that lives;
        where none does, all else in its tree goes. A tree begins at `new()` or at `fork(...,
        root=True)`, and nothing beyond is touched. Sequences that an index owns end too, and their
        entries with them; raises PinnedEntry where one is pinned. Cost: O(pages of what is
        released).
        """
        pool = self._pool
        kept = handle(child)
        pool.books.records([kept])
        doomed = pool.books.tree.rivals(kept)
        pool.tables.end_subtrees(doomed)
        return len(doomed)

    # -- the tree

    @reader
    def parent(self, seq: int) -> int | None:
        """The nearest sequence above `seq` that lives; None at the top of a tree."""
        known = handle(seq)
        self._pool.books.records([known])
        return self._pool.books.tree.parent(known)

    @reader
    def children(self, seq: int) -> list[int]:
        """The nearest sequences below `seq` that live. Cost: O(their number)."""
        known = handle(seq)
        self._pool.books.records([known])
        return self._pool.books.tree.children(known)

    @reader
    def descendants(self, seq: int) -> list[int]:
        """All that lives below `seq`, each above what hangs on it. Cost: O(their number)."""
        known = handle(seq)
        self._pool.books.records([known])
        return self._pool.books.tree.below([known])[1:]

    # -- reading

    @reader
    def lengths(self, seqs: Iterable[int]) -> list[int]:
        """Tokens of each sequence."""
        return self._pool.books.lengths(handles(seqs))

    @reader
    def live(self) -> list[int]:
        """All sequences that exist, the oldest first: also those that an interrupted verb made and
        nobody received.

        Cost: O(sequences).
        """
        return self._pool.books.live()

    def scope(self) -> Scope:
        """A block at whose end every sequence is released that was made in it, unless it is kept or
        an index owns it.

        So nothing is lost however the block ends, by Ctrl-C within a verb too.

        >>> cache = PagedKVCache(layers=1, heads=1, head_size=2, page_size=4)
        >>> with cache.scope() as scope:
        ...     root, draft = cache.new(2)
        ...     kept = scope.keep([root])
        >>> cache.live() == kept
        True
        """
        return Scope(self)

    def mark(self) -> tuple[int, int]:
        """This moment, for `made_since`."""
        return self._pool.books.mark()

    def made_since(self, mark: tuple[int, int]) -> list[int]:
        """Sequences that exist, were made after a moment and belong to no index, the newest first.

        Cost: O(sequences made since).
        """
        # whoever is inside has settled: no scope must wait for him
        with suppress(ConcurrentCall, NestedCall):
            self.settle()
        owned = self._pool.books.owned
        return [seq for seq in self._pool.books.made_since(mark) if seq not in owned]

    @verb
    def gather(self, seqs: Iterable[int], *, pad: str = "right", reuse: bool = False) -> Gathered:
        """Dense K/V of a batch, padded with zeros on the `pad` side ("left" or "right"), in one
        kernel.

        The tensors are the caller's own; with `reuse=True` they are views of a buffer that the next
        such gather overwrites, which saves the memory and the time to get it. Cost: bytes of B x
        the longest window.
        """
        left = is_left(pad)
        return gather_windows(self._pool, handles(seqs), left=left, reuse=flag("reuse", reuse))

    @reader
    def block_tables(self, seqs: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pages [B, P] (padded with the null page 0), lengths [B] and head offsets [B],
        all int32.
        """
        tables, starts, lengths = self._pool.books.windows(handles(seqs))
        longest = max(map(len, tables), default=0)
        padded = [(*table, *(0,) * (longest - len(table))) for table in tables]
        options = {"dtype": torch.int32, "device": self.device}
        pages = torch.tensor(padded, **options).reshape(len(tables), longest)  # type: ignore[arg-type]
        return pages, torch.tensor(lengths, **options), torch.tensor(starts, **options)  # type: ignore[arg-type]

    @reader
    def flashinfer_pages(self, seqs: Iterable[int], layer: int) -> FlashInferPages:
        """A layer as FlashInfer's wrappers read it, without a copy; good until the pool grows or is
        trimmed. Raises UnfitForKernel, BadCount.
        """
        return flashinfer_pages(self._pool.storage, *self._rows_and_layer(seqs, layer))

    @reader
    def flash_attention_pages(
        self, seqs: Iterable[int], layer: int, *, multiple: int = 256
    ) -> FlashAttentionPages:
        """A layer as `flash_attn_with_kvcache` reads it, without a copy; good until the pool grows
        or is trimmed. `multiple`: what the kernel wants page_size to be one of. Raises
        UnfitForKernel, BadCount.
        """
        rows, index = self._rows_and_layer(seqs, layer)
        return flash_attention_pages(self._pool.storage, rows, index, multiple=multiple)

    def _rows_and_layer(self, seqs: Iterable[int], layer: int) -> tuple[Rows, int]:
        tables, starts, lengths = self._pool.books.windows(handles(seqs))
        rows = Rows(tables, starts, lengths, [0] * len(lengths))
        return rows, whole("layer", layer, 0, self.layers - 1)

    @page_reader
    def prefetch(self, seqs: Iterable[int]) -> int:
        """Have the pages of these sequences in memory, the first ones first and as many as there
        are frames for; returns how many were read. Without tiers all are.

        Raises TierFailed, and BadSnapshot for what was loaded lazily and is damaged.
        """
        tables = self._pool.books.windows(handles(seqs))[0]
        tiers = self._pool.tiers
        return 0 if tiers is None else tiers.prefetch(chain.from_iterable(tables))

    # -- a model step

    def open(
        self,
        seqs: Iterable[int],
        room: int,
        *,
        pad: str = "left",
        rebase: Hook | None = None,
        gather: str = "now",
    ) -> Step:
        """Gather contexts into a dense buffer with room for `room` new tokens each, in one kernel.

        The pages that the room needs are taken now: raises OutOfPages before the model has worked.
        `rebase` is called on the step after the gather; it may change its columns in place, by
        `then` and `now`, and where it raises the step is closed. `gather="later"` copies nothing
        until something asks for it, for `Step.in_pages`, where that can be; then `rebase` is
        called, on a step with the copies, and where it raises nothing was copied.
        """
        return self._opener.open(seqs, room, pad, rebase, gather)

    def attend(self, seqs: Iterable[int], counts: Counts, *, backend: str = "auto") -> PagedStep:
        """A step whose layers write `counts` new tokens (one number, or one a sequence) into pages
        and attend to them there: no dense copy.

        The pages are taken now: raises OutOfPages before the model has worked. `backend` is "tree",
        which reads each page that rows share once, "dense", which reads it for each row, or "auto",
        the cheaper one by its estimate.
        """
        return self._opener.attend(seqs, counts, backend)

    # -- other caches

    def export(
        self,
        seqs: Iterable[int],
        *,
        indexes: Iterable[Holder] = (),
        data: object = None,
        identity: Mapping[str, Any] | None = None,
        codec: Codec | None = None,
    ) -> Bundle:
        """These sequences, and the entries of `indexes` (and managers), in memory of their own.

        Each page comes along once, and what none of the sequences reads is zeros. A parent is the
        nearest sequence above that comes along, too. `data` is the caller's: JSON types, bytes and
        tuples, or what `codec` makes such, as keys are; `identity` says what the contents depend
        on, such as a hash of the weights, and is compared when they are adopted. Cost: bytes of
        the pages. Raises DuplicateSequence, StaleHandle, ForeignHandle, BadArgument.

        >>> cache = PagedKVCache(layers=1, heads=1, head_size=2, page_size=2)
        >>> root, = cache.new()
        >>> cache.append([root], torch.ones(1, 1, 1, 3, 2), torch.ones(1, 1, 1, 3, 2))
        >>> bundle = cache.export([root, *cache.fork([root])], data={"turn": 7})
        >>> other = PagedKVCache(layers=1, heads=1, head_size=2, page_size=2)
        >>> other.lengths(other.adopt(bundle)), other.pages_in_use, bundle.data()
        ([3, 3], 2, {'turn': 7})
        """
        return self._exchange.export(seqs, Bundle.of, indexes, data, identity, codec)

    def export_to(
        self,
        use: Callable[[Source], T],
        seqs: Iterable[int],
        *,
        indexes: Iterable[Holder] = (),
        data: object = None,
        identity: Mapping[str, Any] | None = None,
        codec: Codec | None = None,
    ) -> T:
        """As `export`, but hands a source to `use`, which reads the pages in place while no verb
        may run; returns what it returns.
        """
        function("use", use, "a function of a source")
        return self._exchange.export(seqs, use, indexes, data, identity, codec)

    def adopt(
        self,
        bundle: Source,
        *,
        indexes: Iterable[Holder] = (),
        identity: Mapping[str, Any] | None = None,
        codec: Codec | None = None,
        lazy: bool = False,
    ) -> list[int]:
        """New sequences with the contents of those that were exported, in the same order.

        They share among them what those shared. `indexes` are as many empty ones (or managers) as
        came along, in the same order, which own their entries. All or nothing. Cost: bytes of the
        pages; with `lazy`, which needs tiers, only of the tables: then each page is read, and
        checked, when it is first used. Raises OtherFingerprint, BadBundle, CapacityExceeded,
        OutOfPages, BadArgument, and what a source raises that cannot be read.
        """
        return self._exchange.adopt(bundle, indexes, identity, codec, lazy)

    def fingerprint(self, identity: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What contents depend on, `identity` included: where it is equal, `adopt` takes them.
        Raises BadArgument.
        """
        return self._exchange.fingerprint(identity)

    # -- room

    @reader
    def page_tables(self, seqs: Iterable[int]) -> list[tuple[int, ...]]:
        """The pages of each sequence, on the host; `block_tables` has them as a tensor."""
        return self._pool.books.windows(handles(seqs))[0]

    @reader
    def pages_needed(self, seqs: Iterable[int], count: Counts, *, fork: bool = False) -> int:
        """Dry run: pages that appending `count` tokens (to forked children) would take.

        Fewer may do where entries of an index have to go for it.
        """
        return self._pool.tables.plan(handles(seqs), count, fork=flag("fork", fork)).fresh

    @reader
    def pages_freed_by(self, seqs: Iterable[int]) -> int:
        """Dry run: pages that releasing all of `seqs` would free."""
        return self._pool.books.freed_by(handles(seqs, ordered=False))

    @verb
    def set_reclaimer(self, reclaimer: Reclaimer | None) -> None:
        """Ask `reclaimer` for pages when the pool is full and cannot grow. None: nobody.

        An index or a manager holds the cache, so it is not held in turn. Raises BadArgument.
        """
        if reclaimer is None:
            self._pool.reclaimer = None
            return
        self._check_reclaimer(reclaimer)
        ours = getattr(reclaimer, "turns", None) is self.turns
        self._pool.reclaimer = ref(reclaimer) if ours else lambda: reclaimer

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
        held = self._pool.reclaimer
        return None if held is None else held()

    def settle(self) -> None:
        """Finish what an interrupted verb left half done. Every verb and every figure begins with
        it.
        """
        books = self._pool.books
        if books.change is not None:
            self._settle()
        elif self.turns.tickets or books.light:
            # beside a verb of another thread, figures are those before what was put off
            with suppress(ConcurrentCall):
                self._settle()

    @reader
    def _settle(self) -> None:
        pass  # what has to be done is done before it begins

    @property
    def books(self) -> Books:
        """The books: to be read only."""
        self.settle()
        return self._pool.books

    @verb
    def trim(self) -> None:
        """Give back memory that nothing uses: of pages, which move to the front, and of buffers.

        Handles stay as they are. Cost: bytes of the pages in use, and all block tables.
        """
        self._pool.trim()
        self._opener.scratch.trim()

    @reader
    def look(self, read: Callable[[Books], T]) -> T:
        """What `read` finds in the books, which nobody changes meanwhile. Raises BadArgument."""
        function("read", read, "a function of the books")
        return read(self._pool.books)

    @verb
    def listen(self, listener: Listener) -> None:
        """Tell `listener` of every verb from now on, as it ends; see `paged_kv.events.Event`.

        It may read, and release.

        Raises BadArgument where it cannot be called.
        """
        function("listener", listener, "a function of an event")
        self.turns.listen(listener)

    @verb
    def unlisten(self, listener: Listener) -> None:
        """Tell it no more. Raises BadArgument where it was not told before."""
        if not callable(listener) or listener not in self.turns.listeners:
            raise BadArgument("listener", listener, "one that listens")
        self.turns.unlisten(listener)

    @property
    def stats(self) -> CacheStats:
        """What the cache did since it was made. Cost: a new record each time."""
        done = self.books.figures
        pages = self._pool.pages
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
    def tiers(self) -> list[TierStats]:
        """Where pages lie and what moved since the cache was made, the nearest place first.

        Empty without tiers.
        """
        tiers = self._pool.tiers
        return [] if tiers is None else tiers.figures()

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self._pool.storage.form.dtype

    @property
    def device(self) -> torch.device:
        """Where the pages lie."""
        return self._pool.storage.form.device

    @property
    def token_bytes(self) -> int:
        """K and V of one token, all layers."""
        return self.page_bytes // self.page_size

    @property
    def pages_in_use(self) -> int:
        """Pages that some sequence holds."""
        return self.books.pages.used_count

    @property
    def pages_free(self) -> int:
        """Pages ready to be taken without growth."""
        return self.books.pages.free_count

    @property
    def pages_reserved(self) -> int:
        """Pages the pool has memory for."""
        return self.books.pages.capacity

    @property
    def max_pages(self) -> int | None:
        """Pages that the pool may grow to; None where nothing bounds it."""
        return self._pool.pages.max_pages

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
        """Bytes held beside the pages: the buffers of steps, of attention and of
        `gather(reuse=True)`, positions.
        """
        return self._pool.working_bytes + self._opener.scratch.nbytes

    @property
    def open_steps(self) -> int:
        """Steps that were neither committed nor given up: they hold pages, too."""
        return len(self.books.pending)

    @property
    def live_sequences(self) -> int:
        """Sequences that exist."""
        return self.books.live_count

    @property
    def logical_tokens(self) -> int:
        """Tokens of all live sequences, shared ones counted once a sequence. Cost: O(sequences)."""
        return sum(record[2] for _, record in self.books.items())

    @property
    def stored_tokens(self) -> int:
        """Slots that live sequences read, each counted once. Cost: O(all block tables)."""
        return self.books.stored_tokens()

    @reader
    def check(self) -> None:
        """Raise CorruptCache unless every invariant of docs/design.md holds. Cost:
        O(everything).
        """
        audit(self._pool.books)

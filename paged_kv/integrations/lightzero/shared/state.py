"""The contexts of one world model: a paged cache, its pools, the nodes of the search, and the batch
in work.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch

from paged_kv.attention.in_pages import InPages, why_not
from paged_kv.cache import PagedKVCache
from paged_kv.errors import BadCount, UnknownEnv, WeightsChanged
from paged_kv.integrations.lightzero.shared.batch import Entry, StepBatch
from paged_kv.integrations.lightzero.shared.choices import Choices
from paged_kv.integrations.lightzero.shared.evictable import EvictableNodes
from paged_kv.integrations.lightzero.shared.lean.running import Lean
from paged_kv.integrations.lightzero.shared.positions import ReadShift, WriteShift
from paged_kv.integrations.lightzero.shared.search import SearchNodes
from paged_kv.integrations.lightzero.shared.weights import OldContexts
from paged_kv.integrations.lightzero.shared.windows import SLIDE, side_by_side, slid, store_anew
from paged_kv.linears import PackedLinears
from paged_kv.manager import KVCacheManager
from paged_kv.search_order import SearchOrder
from paged_kv.step import Step

ROOM = 2  # a step appends an action and an observation
LOSSES = (
    "the pool was too small for all nodes of a search: some were evicted, and begin anew without "
    "their context. world_model.paged.manager.stats counts misses and evictions; with keys='node' "
    "such nodes are computed again, with more pages nothing is lost"
)

FORGET = (
    'clear_caches() forgets them; attach(..., weights="drop") does so by itself, weights="keep" '
    "goes on with them"
)


class Roots(NamedTuple):
    """Rows of a batch, the environments they are, and the observations of the whole batch."""

    rows: list[int]
    envs: list[int]
    seen: torch.Tensor


class PagedState:
    """The contexts of one world model, and the batch that is in work.

    `cache` and `manager` are made at the first use, on the device of the model. A copy, deep or
    pickled, is empty: a target network starts without contexts, and never shares any.
    """

    # The last root of an environment is all that a later step asks for: the step after it, and its
    # own search.
    init_entries = 1
    stored: type = Entry  # what LightZero is given of a context

    def __init__(
        self,
        options: dict[str, Any],
        *,
        envs: int,
        context_length: int,
        choices: Choices,
        rotary: bool,
    ) -> None:
        choices.check()
        self.options = options
        self.envs = envs
        self.context_length = context_length
        self.rotary = rotary
        self.choices = choices
        self.at = choices.at
        self.keys = choices.keys
        self.padding = choices.padding
        self.window = choices.window
        self.old = OldContexts()
        self.gather = "later" if choices.attention == "pages" else "now"
        self.linears = PackedLinears() if choices.linears == "packed" else None
        self.lean = Lean(self.linears, choices.compile) if choices.step == "lean" else None
        self.nodes: SearchNodes | EvictableNodes = SearchNodes()
        self.environments: list[int] | None = (
            None  # of the rows of the step that is running, where a policy tells
        )
        self._envs: list[int] = []  # of the rows of the search
        # what each root ends with: a batch and a row of it
        self._seen: dict[int, tuple[torch.Tensor, int]] = {}
        shifts = not rotary and context_length > SLIDE and self.window == "cached"
        self.read_shift = ReadShift() if shifts and self.at == "read" else None
        self.write_shift = WriteShift(context_length) if shifts and self.at == "write" else None
        self._cache: PagedKVCache | None = None
        self._manager: KVCacheManager | None = None
        self._batch: Step | None = None
        # contexts that live for one step: of nodes that were not found
        self._guests: list[int] = []
        self._told_of_losses = False

    def __reduce__(self) -> Any:
        return _empty_state, (
            type(self),
            self.options,
            self.envs,
            self.context_length,
            self.choices,
            self.rotary,
        )

    @property
    def cache(self) -> PagedKVCache:
        """The paged cache."""
        if self._cache is None:
            self.start("cpu", torch.float32)
        assert self._cache is not None
        return self._cache

    @property
    def started(self) -> bool:
        """Whether the cache was made."""
        return self._cache is not None

    @property
    def manager(self) -> KVCacheManager:
        """The pools: one root context an environment, and the nodes of the search."""
        self.cache  # noqa: B018  (makes both)
        assert self._manager is not None
        return self._manager

    def start(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """Begin with an empty cache on a device, and drop what another one held."""
        self._batch = None
        self._guests = []
        self._seen = {}
        self.nodes.begin([])
        self._cache = PagedKVCache(**self.options, device=device, dtype=dtype)
        if self.gather == "later":
            self._tell_of_copies(why_not(self._cache.device, dtype))
        order = SearchOrder()
        by_search = self.choices.eviction == "search" and self.keys == "node"
        policy = order.policy if by_search else self.choices.eviction.replace("search", "lru")
        self._manager = KVCacheManager(
            self._cache, self.envs, init_entries=self.init_entries, recur_policy=policy
        )
        if self.keys == "node" and self.bounded:
            pool = self._manager.recur_pool
            self.nodes = EvictableNodes(pool, order if by_search else None)

    def _tell_of_copies(self, reason: str | None) -> None:
        """Warn where windows are copied all the same."""
        if reason is not None:
            warnings.warn(
                f'attention="pages" is not used, since {reason}: contexts are gathered',
                stacklevel=2,
            )

    @property
    def bounded(self) -> bool:
        """Whether the pool may run out of pages."""
        limits = self.options.get("max_pages"), self.options.get("max_bytes")
        return limits != (None, None) or not self.options.get("grow", True)

    def by_node(self, model: Any) -> bool:
        """Whether the search's own names find its nodes now: not in reanalysis, which keeps no
        contexts.
        """
        return self.keys == "node" and not model.reanalyze_phase and self.context_length > SLIDE

    # -- the weights

    def heed_weights(self, model: Any) -> None:
        """Between two searches: where weights changed, do what was chosen with the contexts held.

        Raises WeightsChanged, every time until they are gone.
        """
        changed = self.old.changed(model)
        if self.lean is not None:
            if changed:
                self.lean.forget_weights()
            self.lean.begin(model, self, searching=True)
        if not changed:
            return
        held = self._roots_held()
        if held and self.choices.weights == "refuse":
            raise WeightsChanged(len(held), FORGET)
        if held and self.choices.weights == "drop":
            self.forget_nodes()
            for env in range(self.envs):
                self.forget_roots(env)
            held = []
        self.old.follow(model, held)

    def as_batch(self, model: Any, step: Step, shift: ReadShift | None = None) -> Any:
        """A step under LightZero's names; `shift` is what its windows need, as they are read."""
        return StepBatch(step, self.padding == "masked", self.in_pages(step, shift))

    def in_pages(self, step: Step, shift: ReadShift | None) -> InPages | None:
        """Attention to the windows of a step where they lie, where that was chosen and can be."""
        if self.gather == "now":
            return None
        return step.in_pages(None if shift is None else shift.table)

    def weights_changed(self) -> None:
        """Say that weights changed where nothing shows it: they were written through `.data`, or by
        a kernel of somebody's own. Takes effect at the next search.
        """
        self.old.distrust()
        if self.linears is not None:
            self.linears.repack()

    def went_on(self, parents: Sequence[int], children: Sequence[int]) -> None:
        """Roots that go on from others, which may hold contexts of old weights."""
        if not self.old.any:
            return
        self.old.inherit(parents, children)
        if self.old.crowded:
            self.old.forget_all_but({*self._roots_held(), *children})

    def _roots_held(self) -> list[int]:
        if self._manager is None:
            return []
        return [root for pool in self._manager.init_pools for root in pool.handles()]

    # -- the roots

    def environments_of(self, rows: int) -> list[int]:
        """The environment of each row of a root step: what the policy said, or else the
        row itself.
        """
        envs = list(range(rows)) if self.environments is None else self.environments
        if len(envs) != rows:
            raise BadCount(
                "ready environments", envs, f"one for each of the {rows} rows of the batch"
            )
        for env in envs:
            if not 0 <= env < self.envs:
                raise UnknownEnv(env, self.envs)
        return envs

    def roots_after(self, roots: Roots) -> list[int | None]:
        """The root of each environment, or None where its window does not end with what the row has
        seen.
        """
        if self._manager is None:
            return [None] * len(roots.envs)
        known = [self._manager.get_init_cache(env, env) for env in roots.envs]
        pairs = zip(known, roots.envs, roots.rows)
        return [
            root if root is not None and self._saw(env, roots.seen, row) else None
            for root, env, row in pairs
        ]

    def roots_at(self, roots: Roots, keys: Sequence[Hashable]) -> list[int | None]:
        """The root of each environment, or None where its window does not end with the latent state
        of the row.
        """
        if self._manager is None:
            return [None] * len(roots.envs)
        return [
            self._manager.get_init_cache(env, keys[row]) for env, row in zip(roots.envs, roots.rows)
        ]

    def store_roots(
        self, roots: Roots, children: Sequence[int], keys: Sequence[Hashable] | None
    ) -> None:
        """Keep the root of each environment in place of the one before: under its key, or else as
        the only one.
        """
        if keys is None:  # a search goes on from its root: no lack of pages may take it
            self.manager.set_init_caches(roots.envs, roots.envs, children, pin=True)
            self._seen.update((env, (roots.seen, row)) for env, row in zip(roots.envs, roots.rows))
        else:
            self.manager.set_init_caches(roots.envs, keys, children)

    def begin_search(self, envs: list[int]) -> None:
        """A search below the roots of these environments, one a row."""
        self._envs = envs
        if self.keys == "node" and self.context_length > SLIDE:
            self.nodes.begin([self.manager.init_pools[env].handles()[0] for env in envs])

    def _saw(self, env: int, seen: torch.Tensor, row: int) -> bool:
        """Whether the root of an environment ends with this observation."""
        batch, place = self._seen[env]
        if batch is seen and place == row:  # the policy hands the same tensor over again
            return True
        return row < len(seen) and torch.equal(batch[place], seen[row])

    # -- the nodes of the search

    def lookup(self, keys: Sequence[Hashable]) -> list[int | None]:
        """The context of each row's node, first among the roots of its environment, then among the
        nodes; or None.
        """
        if self._manager is None:
            return [None] * len(keys)
        lookup = self._manager.retrieve_cache_hierarchical
        envs = self._envs if len(self._envs) == len(keys) else range(len(keys))
        found = [lookup(env, key) for env, key in zip(envs, keys)]
        if None in found:
            self.missed()
        return found

    def missed(self) -> None:
        """A search found no context for a latent state: says once that a bounded pool loses
        some.
        """
        if self._manager is None or self._told_of_losses:
            return
        if self._manager.recur_pool.stats.evictions:
            self._told_of_losses = True
            warnings.warn(LOSSES, stacklevel=2)

    def entry(self, handle: int) -> Entry:
        """A stored context as LightZero sees it."""
        return Entry(handle, self.cache.lengths((handle,))[0])

    def store_nodes(self, keys: Sequence[Hashable], children: Sequence[int]) -> None:
        """Keep search nodes until the next search."""
        self.manager.set_recur_caches(keys, children)

    def end_search(self) -> None:
        """Release the nodes of the search, in one call; one that was interrupted may be
        made again.
        """
        doomed = self.nodes.made()
        if doomed:
            self.cache.release(doomed, missing_ok=True)
        self.nodes.end()

    def forget_nodes(self) -> None:
        """Release the nodes of the search."""
        self.end_search()
        if self._manager is not None:
            self._manager.clear_recur_cache()

    def forget_roots(self, env: int) -> None:
        """Release the root of one environment."""
        if self._manager is not None:
            self.nodes.lose_roots(self._manager.init_pools[env].handles())
            self._manager.clear_init_caches((env,))

    # -- a model step

    def open(self, model: Any, contexts: Sequence[Any]) -> Any:
        """Gather a batch of stored contexts, or handles of them, and of fresh `KeysValues`.

        Left-padded.
        """
        if type(contexts[0]) is int:
            return self.open_sequences(model, contexts)
        self._drop_guests()
        parents = [context.handle if type(context) is Entry else 0 for context in contexts]
        strangers = [row for row, parent in enumerate(parents) if not parent]
        for size in {contexts[row].size for row in strangers}:
            rows = [row for row in strangers if contexts[row].size == size]
            guests = self.take_in(model, [contexts[row] for row in rows], len(rows), size)
            self._guests += guests
            for row, guest in zip(rows, guests):
                parents[row] = guest
        return self.open_sequences(model, parents)

    def open_sequences(self, model: Any, parents: Sequence[int]) -> Any:
        """Gather a batch of sequences, left-padded."""
        shift = self.read_shift
        if shift is not None:
            shift.follow(model)
        cache = self._cache
        assert cache is not None  # whose sequences these are
        batch = self._batch = cache.open(parents, ROOM, rebase=shift, gather=self.gather)
        return self.as_batch(model, batch, shift)

    def fresh(self, model: Any, latent: torch.Tensor, start_pos: int) -> Any:
        """A context of one observation, which is nobody's yet."""
        empty = model.transformer.generate_empty_keys_values(n=1, max_tokens=self.context_length)
        model.forward(
            {"obs_embeddings": latent},
            past_keys_values=empty,
            is_init_infer=True,
            start_pos=start_pos,
        )
        return empty

    def open_empty(self, model: Any, rows: int, device: torch.device, dtype: torch.dtype) -> Any:
        """A batch of contexts that begin with their next token."""
        cache = self._cache
        if cache is None or device != cache.device or dtype != cache.dtype:
            self.start(device, dtype)
        self._drop_guests()
        # so that later pairs fill whole pages
        self._guests = self.cache.new(rows, start=-1 % self.cache.page_size)
        return self.open_sequences(model, self._guests)

    def commit(self, model: Any, sizes: Sequence[int]) -> list[int]:
        """Store the batch of a search step, whose contexts have `sizes` tokens; returns the new
        contexts.
        """
        batch = self._in_work()
        size = batch.size
        if not batch.uniform or self.write_shift is not None or batch.past < SLIDE:
            return self._commit(model, batch, sizes, [None] * len(batch.parents))
        if self.read_shift is not None:
            self.read_shift.take_off(batch)
        children = batch.commit(slide=SLIDE if size >= self.context_length - 1 else 0)
        self._batch = None
        if self._guests:
            self._drop_guests()
        return children

    def commit_roots(self, model: Any) -> list[int]:
        """Store a batch of roots.

        LightZero 0.2.0 stores every root with the length of the longest, so that the zeros in front
        of a shorter one become tokens of it. They take part in attention from then on; here too
        where padding is "attended", so that both give the same numbers. Where it is "masked", every
        root keeps its own length.
        """
        batch = self._in_work()
        children = self._commit_roots(model, batch)
        self.went_on(batch.parents, children)
        return children

    def _commit_roots(self, model: Any, batch: Step) -> list[int]:
        size = batch.size
        if batch.uniform or self.padding == "masked":
            return self.commit(model, [length + size - batch.past for length in batch.lengths])
        # what is stored whole is stored without positions, padding included
        if self.read_shift is not None:
            batch.columns(0, size)[0].sub_(self.read_shift.of(0, size))
        return self._commit(model, batch, [size] * len(batch.parents), [0] * len(batch.parents))

    def close(self) -> None:
        """Give up the batch in work; nothing is stored."""
        if self._batch is not None:
            self._batch.close()
            self._batch = None
        self._drop_guests()

    def take_in(self, model: Any, contexts: Sequence[Any], rows: int, size: int) -> list[int]:
        """New sequences with the `size` tokens of one or more `KeysValues`, `rows` rows in all."""
        first = contexts[0][0]._k_cache._cache
        cache = self._cache
        if cache is None or first.device != cache.device or first.dtype != cache.dtype:
            self.start(first.device, first.dtype)
        keys, values = side_by_side(contexts, rows, size)
        if self.read_shift is not None:
            self.read_shift.follow(model)
            positions = self.read_shift.of(0, size)
            keys = keys - positions[0::2]
            values = values - positions[1::2]
        # Placed so that the pairs appended later fill whole pages.
        guests = self.cache.new(rows, start=-size % self.cache.page_size)
        self.cache.append(guests, keys, values)
        return guests

    def adopt(self, model: Any, context: Any) -> int:
        """A sequence of its own with the contents of a stored context or of a `KeysValues` of one
        row.
        """
        if isinstance(context, Entry):
            return self.cache.fork([context.handle])[0]
        return self.take_in(model, [context], 1, context.size)[0]

    # -- inside

    def _commit(
        self, model: Any, batch: Step, sizes: Sequence[int], rewrite: list[int | None]
    ) -> list[int]:
        limit = self.context_length - 1
        slide = [0] * len(sizes)
        late = [0] * len(sizes)
        full = [row for row, size in enumerate(sizes) if size >= limit]
        if full and self.write_shift is not None:
            self.write_shift.follow(model)
            for row, first in slid(batch, self.write_shift, sizes, full).items():
                rewrite[row] = first
        else:
            # what is rewritten as a whole, or has too short a parent, slides once it is stored
            for row in full:
                (slide if rewrite[row] is None and batch.lengths[row] >= SLIDE else late)[row] = (
                    SLIDE
                )
        anew = {row: first for row, first in enumerate(rewrite) if first is not None}
        if self.read_shift is not None and not anew:
            self.read_shift.take_off(batch)
        with self.cache.scope() as scope:
            stored = store_anew(self.cache, batch, anew)
            if len(stored) < len(sizes):
                children = batch.commit(slide=slide)
            else:
                children = [0] * len(sizes)
            for row, seq in stored.items():
                children[row] = seq
            if any(late):
                self.cache.slide(children, late)
            scope.keep(children)
        self.close()
        return children

    def _drop_guests(self) -> None:
        if self._guests:
            # an interrupt may have come after it before
            self.cache.release(self._guests, missing_ok=True)
            self._guests = []

    def _in_work(self) -> Step:
        if self._batch is None:
            raise BadCount("keys_values_wm", None, "a batch made by trim_and_pad_kv_cache")
        return self._batch


def _empty_state(
    kind: type[PagedState],
    options: dict[str, Any],
    envs: int,
    context_length: int,
    choices: Choices,
    rotary: bool,
) -> PagedState:
    return kind(options, envs=envs, context_length=context_length, choices=choices, rotary=rotary)

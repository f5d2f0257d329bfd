"""The contexts of one world model of LightZero's main."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from paged_kv.integrations.lightzero.main.batch import Context, MainBatch, Window
from paged_kv.integrations.lightzero.shared.batch import Entry
from paged_kv.integrations.lightzero.shared.choices import Choices
from paged_kv.integrations.lightzero.shared.positions import ReadShift, WriteShift
from paged_kv.integrations.lightzero.shared.state import ROOM, PagedState
from paged_kv.integrations.lightzero.shared.windows import SLIDE, store_anew
from paged_kv.step import Step

# latent states that differ by less, relative to their norm, are one that was encoded twice
ROUNDING = 1e-5


class Root(NamedTuple):
    """The root that a search begins at: where it lies in its pool, and the latent it ends with."""

    name: str
    latent: torch.Tensor


class MainState(PagedState):
    """The contexts of one world model, and the batch that is in work.

    Beyond 0.2.0: window modes that the model may change at any time, contexts stored without the
    padding in front of them, a root for each phase of an environment (collection and evaluation
    share one model), and windows that LightZero rebuilt.
    """

    stored = Context

    def __init__(
        self, options: dict[str, Any], *, envs: int, init_entries: int, choices: Choices
    ) -> None:
        super().__init__(options, envs=envs, context_length=0, choices=choices, rotary=True)
        self.init_entries = init_entries
        self._mode: tuple[bool, int] | None = None
        # what a policy is doing, where it tells
        self.phase: str | None = None
        # of each environment in each phase, with node keys
        self._roots: dict[tuple[int, str | None], Root] = {}

    def __reduce__(self) -> Any:
        return _empty_state, (self.options, self.envs, self.init_entries, self.choices)

    def follow(self, model: Any) -> None:
        """Go by the window mode and length that the model has now; contexts stored under another
        mode are dropped.
        """
        length = model.context_length
        # Position tables exist in this mode alone: rotary keys never move, and rebuilt windows
        # begin at position 0.
        shifts = length > SLIDE and not (
            model.config.rotary_emb
            or model.exact_kv_window_reset
            or model.rebuild_kv_window_from_tokens
        )
        if self._mode is None or self._mode[0] != shifts:
            if self._cache is not None:
                self.start(self._cache.device, self._cache.dtype)
            self.read_shift = ReadShift() if shifts and self.at == "read" else None
        if self._mode != (shifts, length):
            self.write_shift = WriteShift(length) if shifts and self.at == "write" else None
            self.context_length = length
            self._mode = (shifts, length)
        if self.read_shift is not None:
            self.read_shift.follow(model)

    def by_node(self, model: Any) -> bool:
        """Whether the search's own names find its nodes now.

        Not in reanalysis, whose roots LightZero seeds under hashes, and not where windows are
        rebuilt from tokens, which LightZero keeps in dictionaries by hash.
        """
        return (
            self.keys == "node"
            and not model.reanalyze_phase
            and not model.rebuild_kv_window_from_tokens
            and model.context_length > SLIDE
        )

    # -- what is stored

    def entry(self, handle: int) -> Context:  # type: ignore[override]
        """A stored context as LightZero sees it."""
        return Context(self, handle, self.cache.lengths((handle,))[0])

    def dense(self, handle: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Copies of K and V of every layer, with the positions of the window."""
        found = self.cache.gather((handle,))
        keys = found.keys.clone()
        values = found.values.clone()
        if self.read_shift is not None:
            positions = self.read_shift.of(0, keys.shape[3])
            keys = keys + positions[0::2]
            values = values + positions[1::2]
        return list(zip(keys, values))

    def start(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """Begin with an empty cache on a device, and drop what another one held."""
        super().start(device, dtype)
        self._roots = {}

    def named(self, key: str) -> str:
        """Where the root with this key lies: two phases of an environment may come by one state in
        different ways.
        """
        return key if self.phase is None else f"{self.phase} {key}"

    def put_roots(self, envs: Sequence[int], keys: Sequence[str], children: Iterable[int]) -> None:
        """Store roots under LightZero's keys, beside others."""
        for env, key, child in zip(envs, keys, children):
            self.manager.set_init_cache(env, key, child)

    def replace_roots(
        self,
        envs: Sequence[int],
        keys: Sequence[str],
        children: Iterable[int],
        latents: torch.Tensor,
    ) -> None:
        """Store the root of each environment in place of the one before, of the same phase.

        No lack of pages takes one before the next is there: a search goes on from it.
        """
        for env, key, child, latent in zip(envs, keys, children, latents):
            pool = self.manager.init_pools[env]
            name = self.named(key)
            pool.put(name, child)
            if not pool.pinned(name):
                pool.pin(name)
            before = self._roots.get((env, self.phase))
            self._roots[env, self.phase] = Root(name, latent.clone())
            if before is not None and before.name != name and before.name in pool:
                pool.unpin(before.name)
                pool.remove(before.name)

    def forget_roots(self, env: int) -> None:
        """Release the roots of one environment, of both phases."""
        super().forget_roots(env)
        for known in [known for known in self._roots if known[0] == env]:
            del self._roots[known]

    def as_stored(self, envs: Sequence[int], latents: torch.Tensor) -> torch.Tensor:
        """Latent states with that of their environment's root in their place where they differ by
        rounding only.

        An encoder's last bits depend on how many environments are in its batch, and with them every
        hash.
        """
        found = latents.clone()
        for row, env in enumerate(envs):
            root = self._roots.get((env, self.phase))
            if root is not None and _alike(root.latent, latents[row]):
                found[row] = root.latent
        return found

    def begin(self, envs: Sequence[int]) -> None:
        """A search below the roots of these environments, one a row."""
        self.end_search()
        pools = self.manager.init_pools
        roots = [self._roots.get((env, self.phase)) for env in envs]
        self.nodes.begin(
            [None if root is None else pools[env].get(root.name) for env, root in zip(envs, roots)]
        )

    # -- a model step

    def open(self, model: Any, contexts: Sequence[Any]) -> Any:
        """Gather a batch of stored contexts and of fresh `KeysValues`, left-padded."""
        self.follow(model)
        return super().open(model, [_entry_of(context) for context in contexts])

    def open_sequences(self, model: Any, parents: Sequence[int]) -> MainBatch:
        """Gather a batch of sequences, left-padded."""
        self.follow(model)
        room = (
            ROOM + model.transformer.register_token_num
            if model.transformer.use_register_token
            else ROOM
        )
        self._batch = self.cache.open(parents, room, rebase=self.read_shift, gather=self.gather)
        return self.as_batch(model, self._batch, self.read_shift)

    def as_batch(self, model: Any, step: Step, shift: ReadShift | None = None) -> MainBatch:
        """A step under LightZero's names."""
        return MainBatch(step, in_pages=self.in_pages(step, shift))

    def store(self, model: Any, batch: Any, sizes: Sequence[int], rebuilt: Any) -> list[int]:
        """New contexts of `sizes` tokens, one a row of a batch in work or of a `KeysValues`; closes
        what is in work.

        `rebuilt`: the windows that LightZero computed anew in place of sliding, with `offsets` row
        -> its row; or None.
        """
        self.follow(model)
        anew: dict[int, int] = {} if rebuilt is None else rebuilt.offsets
        if not isinstance(batch, MainBatch):  # a first step, a seed of reanalysis
            self.close()
            children = self._take_in_rows(model, batch, sizes, anew)
        elif not anew:
            return self.commit(model, sizes)
        elif len(anew) < len(sizes):
            children = self._in_work().commit()
            self.cache.release([children[row] for row in anew])
        else:
            children = [0] * len(sizes)
        self.close()
        if anew:
            fresh = self.take_in(model, [rebuilt.cache], len(anew), rebuilt.cache.size)
            for row, offset in anew.items():
                children[row] = fresh[offset]
        return children

    def adopt(self, model: Any, context: Any) -> int:
        """A sequence of its own with the contents of a stored context or of a `KeysValues` of one
        row.
        """
        self.follow(model)
        return super().adopt(model, _entry_of(context))

    # -- inside

    def _take_in_rows(
        self, model: Any, whole: Any, sizes: Sequence[int], skip: dict[int, int]
    ) -> list[int]:
        """Sequences of the last `sizes[row]` columns of each row but those in `skip`, slid where a
        window is full.
        """
        children = [0] * len(sizes)
        for size in {size for row, size in enumerate(sizes) if row not in skip}:
            rows = [row for row, other in enumerate(sizes) if other == size and row not in skip]
            got = self.take_in(model, [Window(whole, rows, whole.size - size)], len(rows), size)
            if size >= self.context_length - 1:
                got = self._slide_stored(model, got, size)
            for row, child in zip(rows, got):
                children[row] = child
        return children

    def _slide_stored(self, model: Any, seqs: list[int], size: int) -> list[int]:
        """Windows of LightZero's length after a slide, of full ones that were taken in: tokens 2 to
        context - 2.
        """
        self.cache.truncate(seqs, size - (self.context_length - 1))
        shift = self.write_shift
        if shift is None:
            self.cache.slide(seqs, SLIDE)
            return seqs
        shift.follow(model)
        batch = self.cache.open(seqs, 0)
        shift.apply(batch, list(range(len(seqs))), SLIDE)
        slid = store_anew(self.cache, batch, dict.fromkeys(range(len(seqs)), SLIDE))
        batch.close()
        self.cache.release(seqs)
        return [slid[row] for row in range(len(seqs))]


def _alike(stored: torch.Tensor, seen: torch.Tensor) -> bool:
    return bool((stored - seen).norm() <= ROUNDING * seen.norm())


def _entry_of(context: Any) -> Any:
    return Entry(context.handle, context.size) if type(context) is Context else context


def _empty_state(
    options: dict[str, Any], envs: int, init_entries: int, choices: Choices
) -> MainState:
    return MainState(options, envs=envs, init_entries=init_entries, choices=choices)

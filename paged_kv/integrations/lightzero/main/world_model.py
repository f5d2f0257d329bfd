"""The world models of LightZero's main on pages. Importing this file needs LightZero's main.

Main finds contexts by environment and by a hash of the latent state, masks the padding in front of
shorter contexts and stores none of it, and rebuilds full windows where it is told to. All of that
stays its own code: replaced are the gathering of a batch, the storing of a step, and the stores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lzero.model.unizero_world_models.ppo_world_model import PPOWorldModel
from lzero.model.unizero_world_models.utils import hash_state
from lzero.model.unizero_world_models.world_model import WorldModel

from paged_kv.errors import BadCount
from paged_kv.integrations.lightzero.main.batch import MainBatch
from paged_kv.integrations.lightzero.main.policy import name_phases, remember_exactly
from paged_kv.integrations.lightzero.main.state import MainState
from paged_kv.integrations.lightzero.main.stores import Keys, ManagerView
from paged_kv.integrations.lightzero.shared.again import ComesBack
from paged_kv.integrations.lightzero.shared.choices import Choices
from paged_kv.integrations.lightzero.shared.copies import SharedCopies
from paged_kv.integrations.lightzero.shared.search import announce_searches
from paged_kv.integrations.lightzero.shared.stores import Pool
from paged_kv.integrations.lightzero.shared.windows import SLIDE

# Where models are made: attributes that name the class to build.
BUILDERS: tuple[tuple[str, str, str], ...] = (
    ("lzero.model.unizero_model", "UniZeroModel", "world_model_cls"),
    ("lzero.model.unizero_ppo_model", "UniZeroPPOModel", "world_model_cls"),
    ("lzero.model.sampled_unizero_model", "", "WorldModel"),
)


class PagedMainWorldModel(ComesBack, SharedCopies, WorldModel):  # type: ignore[misc]
    """The world model of LightZero's main with contexts in pages; `attach` turns a `WorldModel`
    into one in place.

    `paged` holds the contexts. It is no module: parameters, buffers and state_dict are those of
    `WorldModel`.
    """

    paged: MainState

    def wm_forward_for_initial_infererence(
        self,
        last_obs_embeddings: Any,
        batch_action: Any = None,
        current_obs_embeddings: Any = None,
        start_pos: Any = 0,
        ready_env_id: Sequence[int] | None = None,
    ) -> Any:
        """The step of the roots; the search that follows begins at the contexts that it stored."""
        paged = self.paged
        paged.follow(self)
        if current_obs_embeddings is not None:
            paged.heed_weights(self)
        if current_obs_embeddings is not None and paged.by_node(self):
            envs = (
                range(len(current_obs_embeddings))
                if ready_env_id is None
                else [int(env) for env in ready_env_id]
            )
            last_obs_embeddings = paged.as_stored(envs, last_obs_embeddings)
        outputs = super().wm_forward_for_initial_infererence(
            last_obs_embeddings, batch_action, current_obs_embeddings, start_pos, ready_env_id
        )
        if current_obs_embeddings is not None and paged.by_node(self):
            paged.begin(self.current_infer_env_ids)
        return outputs

    def retrieve_or_generate_kvcache(
        self, latent_state: Any, ready_env_num: int, simulation_index: int = 0, start_pos: Any = 0
    ) -> list[int]:
        """Find the contexts of a batch of search nodes; a node that has none gets a context of its
        own token.
        """
        paged = self.paged
        paged.follow(self)
        if not paged.by_node(self):
            return super().retrieve_or_generate_kvcache(  # type: ignore[no-any-return]
                latent_state, ready_env_num, simulation_index, start_pos
            )
        return self._use(paged.nodes.take(ready_env_num), latent_state, start_pos)

    def trim_and_pad_kv_cache(self, is_init_infer: bool = True) -> list[int]:
        """Gather the contexts of the batch, all layers at once, left-padded to the longest."""
        contexts = self.keys_values_wm_list
        paged = self.paged
        batch = paged.open(self, contexts)
        self.__dict__["keys_values_wm"] = batch
        sizes: list[int] = batch.lengths
        self._count_padding(sizes)
        return sizes

    def _count_padding(self, sizes: list[int]) -> None:
        """LightZero's counters of padding, which its diagnostics print."""
        attributes = self.__dict__
        longest = max(sizes)
        attributes["kv_padding_total_batches"] += 1
        attributes["kv_padding_total_samples"] += len(sizes)
        pads = [longest - size for size in sizes if size < longest]
        if pads:
            attributes["kv_padding_unequal_batches"] += 1
            attributes["kv_padding_padded_samples"] += len(pads)
            attributes["kv_padding_token_count"] += sum(pads)
            attributes["kv_padding_max_tokens"] = max(self.kv_padding_max_tokens, *pads)
        if attributes["kv_padding_total_batches"] % 50_000 == 0:
            self._log_kv_padding_diagnostics()

    def update_cache_context(
        self,
        latent_state: torch.Tensor,
        is_init_infer: bool = True,
        simulation_index: int = 0,
        search_depth: Any = None,
        valid_context_lengths: Any = None,
        env_ids: Sequence[int] | None = None,
    ) -> None:
        """Store what the step appended: new contexts of the batch, by node or under hashes of their
        latent states.
        """
        if self.context_length <= SLIDE:  # no context is kept
            self.paged.close()
        elif is_init_infer:
            rows = latent_state.size(0)
            envs = list(range(rows)) if env_ids is None else [int(env) for env in env_ids]
            if len(envs) != rows:
                raise ValueError(f"env_ids has {len(envs)} entries, latent_state {rows} rows")
            lengths = (
                [self.keys_values_wm.size] * rows
                if valid_context_lengths is None
                else valid_context_lengths
            )
            self._store_roots(latent_state, envs, [int(lengths[row]) for row in range(rows)])
        else:
            self._store_nodes(latent_state)

    def _store_roots(self, latent_state: torch.Tensor, envs: list[int], sizes: list[int]) -> None:
        paged = self.paged
        keys = _hashes(latent_state)
        batch = self.keys_values_wm
        parents = batch.parents if type(batch) is MainBatch else []
        children, tokens = self._stored(latent_state, sizes)
        paged.went_on(parents, children)
        if paged.by_node(self):
            paged.replace_roots(envs, keys, children, latent_state)
            return
        paged.put_roots(envs, keys, children)
        for env, key, kept in zip(envs, keys, tokens):
            by_key = self.past_token_context_init_infer_envs[env]
            roots = self.past_kv_cache_init_infer_envs[env]
            by_key[key] = kept
            # those of evicted roots, now and then: it takes a walk over all
            if len(by_key) > 2 * len(roots):
                for stale in [key for key in by_key if key not in roots]:
                    del by_key[stale]

    def _store_nodes(self, latent_state: torch.Tensor) -> None:
        paged = self.paged
        children, tokens = self._stored(latent_state, self.keys_values_wm_size_list_current)
        if paged.by_node(self):
            paged.nodes.add(children)
            return
        keys = _hashes(latent_state)
        paged.manager.set_recur_caches(keys, children)
        self.past_token_context_recurrent_infer.update(zip(keys, tokens))

    def _stored(
        self, latent_state: torch.Tensor, sizes: Sequence[int]
    ) -> tuple[list[int], list[torch.Tensor]]:
        """The new contexts, and where LightZero keeps the tokens of windows, those of each; full
        ones it rebuilds.
        """
        rebuilt = None
        if self.exact_kv_window_reset or self.rebuild_kv_window_from_tokens:
            rebuilt = self._prepare_exact_cache_resets(latent_state, sizes)
        children = self.paged.store(self, self.keys_values_wm, sizes, rebuilt)
        if rebuilt is None or not self.rebuild_kv_window_from_tokens:
            return children, []
        histories = enumerate(self.keys_values_wm_token_context_list)
        tokens = [
            rebuilt.retained_contexts.get(row, history).detach().clone()
            for row, history in histories
        ]
        return children, tokens


class PagedMainPPOWorldModel(PagedMainWorldModel, PPOWorldModel):  # type: ignore[misc]
    """The same for LightZero's PPO world model."""


PAGED = {WorldModel: PagedMainWorldModel, PPOWorldModel: PagedMainPPOWorldModel}
_ORIGINAL = {paged: original for original, paged in PAGED.items()}


def put_hooks() -> None:
    """Have LightZero's searches and policies tell models with node keys what they know."""
    announce_searches()
    name_phases()
    remember_exactly()


def swap_in(model: Any, choices: Choices, pool: dict[str, Any]) -> None:
    """Turn a world model into its paged kind, in place."""
    if choices.padding != "masked":
        raise BadCount("padding", choices.padding, "'masked': LightZero's main masks it itself")
    if choices.window != "cached":
        allowed = (
            "'cached': LightZero's main has exact windows of its own, see "
            "rebuild_kv_window_from_tokens"
        )
        raise BadCount("window", choices.window, allowed)
    kind = _ORIGINAL.get(type(model), type(model))
    if kind not in PAGED:
        allowed = (
            "a WorldModel or a PPOWorldModel, and no other subclass (LightZero cannot "
            "build its WorldModelMT)"
        )
        raise BadCount("target", kind.__name__, allowed)
    if model.context_length % 2:
        raise BadCount(
            "context_length",
            model.context_length,
            "an even number: an observation and an action a step",
        )
    # collection and evaluation share the model: the last root is not enough
    entries = model.shared_pool_size_init
    state = MainState(
        dict(
            layers=model.num_layers,
            heads=model.num_heads,
            head_size=model.embed_dim // model.num_heads,
            **pool,
        ),
        envs=model.env_num,
        init_entries=entries,
        choices=choices,
    )
    put_hooks()
    model.__class__ = PAGED[kind]
    model.paged = state
    _forget(model)
    inits = [Keys(state, env) for env in range(model.env_num)]
    recur = Keys(state)
    model.past_kv_cache_init_infer_envs = inits
    model.past_kv_cache_recurrent_infer = recur
    model.shared_pool_init_infer = [Pool(state) for _ in inits]
    model.shared_pool_recur_infer = Pool(state)
    # Nothing is overwritten in rings here; who writes a context by LightZero's old names finds its
    # own notes empty.
    model.pool_idx_to_key_map_init_envs = [[None] * entries for _ in inits]
    model.pool_idx_to_key_map_recur_infer = [None] * model.shared_pool_size_recur
    if model.use_new_cache_manager:
        model.kv_cache_manager = ManagerView(state, inits, recur, entries)
    if state.lean is not None:
        state.lean.begin(model, state)


def swap_out(model: Any) -> None:
    """LightZero's own stores, as its constructor leaves them."""
    if type(model) not in _ORIGINAL:
        return
    model.__class__ = _ORIGINAL[type(model)]
    for name in (
        "paged",
        "past_kv_cache_init_infer_envs",
        "past_kv_cache_recurrent_infer",
        "pool_idx_to_key_map_init_envs",
        "pool_idx_to_key_map_recur_infer",
    ):
        delattr(model, name)  # with its cache manager LightZero has none of these
    model._initialize_cache_structures()
    model.shared_pool_recur_infer = [None] * model.shared_pool_size_recur
    model.shared_pool_init_infer = [
        [None] * model.shared_pool_size_init for _ in range(model.env_num)
    ]
    _forget(model)


def _forget(model: Any) -> None:
    """No batch is in work, and no context known by its tokens."""
    model._initialize_transformer_keys_values()
    model.keys_values_wm_list = []
    model.keys_values_wm_size_list = []
    model.shared_pool_wm = [None] * model.shared_pool_size_wm
    model.shared_pool_index = model.shared_pool_index_wm = 0
    model.shared_pool_index_init_envs = [0] * model.env_num
    model.past_token_context_recurrent_infer = {}
    model.past_token_context_init_infer_envs = [{} for _ in range(model.env_num)]
    model.keys_values_wm_token_context_list = []
    model._reanalysis_seeded_root_keys = set()
    model.current_infer_env_ids = None


def _hashes(latent_state: torch.Tensor) -> list[str]:
    """LightZero's keys of latent states, one a row."""
    flat = latent_state.reshape(latent_state.size(0), -1).detach().cpu().numpy()
    return [hash_state(latent) for latent in flat]

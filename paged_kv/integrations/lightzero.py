"""LightZero's UniZero on paged key/value contexts: of release 0.2.0 and of main.

One call swaps the cache of a model or of a policy, one argument chooses which cache it is, and a context manager does
the same for a whole training run. Importing this file imports LightZero; importing `paged_kv` does not.

    >>> from paged_kv.integrations.lightzero import attach          # doctest: +SKIP
    >>> attach(policy)                                              # doctest: +SKIP
    >>> attach(policy, cache="lightzero")   # and back              # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any, TypeVar

import numpy as np
import torch

from paged_kv.errors import BadCount
from paged_kv.integrations.lightzero_versions import MAIN, find_lightzero

FOUND = find_lightzero()

from lzero.model.unizero_world_models.kv_caching import KeysValues  # noqa: E402
from lzero.model.unizero_world_models.utils import hash_state  # noqa: E402
from lzero.model.unizero_world_models.world_model import WorldModel  # noqa: E402

from paged_kv.integrations.lightzero_search import announce_searches  # noqa: E402
from paged_kv.integrations.lightzero_state import PagedState  # noqa: E402
from paged_kv.integrations.lightzero_stores import Entry, EnvKeys, Pool, SharedKeys  # noqa: E402

Target = TypeVar("Target")
CACHES = ("paged", "lightzero")
_MODELS = ("_model", "_learn_model", "_target_model", "_collect_model", "_eval_model")
# Where models are made: attributes of modules, or of classes in them, that name the class to build.
_BUILDERS: tuple[tuple[str, str, str], ...] = (
    ("lzero.model.unizero_model", "", "WorldModel"),
    ("lzero.model.sampled_unizero_model", "", "WorldModel"),
)
if FOUND == MAIN:
    from paged_kv.integrations import lightzero_main

    _BUILDERS = lightzero_main.BUILDERS


def attach(
    target: Target, cache: str = "paged", at: str = "read", page_size: int = 2, keys: str = "node", **pool: Any
) -> Target:
    """Make a world model, a UniZero model or a policy use paged contexts, or LightZero's own cache again.

    `cache` is "paged" or "lightzero". `at` says when learned positions are re-based after a slide: "read" (what is
    stored stays untouched and shared) or "write" (LightZero's arithmetic bit for bit; every slide rewrites its window).
    `keys` says how contexts are found again: "node" by environment and by the search tree's own names of its nodes
    (nothing is hashed, lost or mixed up; needs LightZero's C++ tree) or "latent" by a hash of the latent state, as
    LightZero does.
    `pool` goes to `PagedKVCache` (`num_pages`, `max_pages`, `max_bytes`, `grow`). All contexts held so far are dropped.
    Deep copies of an attached model have pools of their own. Returns `target`.
    Raises BadCount for unknown choices and where `target` holds no UniZero world model.
    """
    if cache not in CACHES:
        raise BadCount("cache", cache, " or ".join(map(repr, CACHES)))
    models = list(_world_models(target))
    if not models:
        raise BadCount("target", type(target).__name__, "a UniZero world model, or a model or policy that holds one")
    for model in models:
        if cache == "paged":
            swap_in(model, at, page_size, keys, pool)
        else:
            swap_out(model)
    return target


@contextlib.contextmanager
def installed(
    cache: str = "paged", at: str = "read", page_size: int = 2, keys: str = "node", **pool: Any
) -> Iterator[None]:
    """Within the block, every UniZero model that LightZero builds gets the chosen cache; arguments as for `attach`.

    For entry points that build the model themselves, such as `lzero.entry.train_unizero`.
    """
    def building(original: Any) -> Any:
        def build(*args: Any, **kwargs: Any) -> Any:
            return attach(original(*args, **kwargs), cache, at, page_size, keys, **pool)

        return staticmethod(build)  # some are attributes of classes, and no methods

    places: list[tuple[Any, str]] = []
    for module, owner, name in _BUILDERS:
        found = import_module(module)
        places.append((getattr(found, owner) if owner else found, name))
    before = [vars(place)[name] for place, name in places]
    for (place, name), original in zip(places, before):
        setattr(place, name, building(original))
    try:
        yield
    finally:
        for (place, name), original in zip(places, before):
            setattr(place, name, original)


class PagedWorldModel(WorldModel):  # type: ignore[misc]
    """The world model of LightZero 0.2.0 with contexts in pages; `attach` turns a `WorldModel` into one in place.

    `paged` holds the contexts. It is no module: parameters, buffers and state_dict are those of `WorldModel`.
    """

    paged: PagedState

    def reset_for_initial_inference(self, obs_act_dict: Any, start_pos: Any = 0) -> tuple[Any, torch.Tensor]:
        """The step of the roots: what an environment saw last continues the context it had before."""
        now = obs_act_dict["current_obs"]
        if self.paged.keys == "latent" or now is None:  # None: targets for training, which keep no contexts
            return super().reset_for_initial_inference(obs_act_dict, start_pos)  # type: ignore[no-any-return]
        self.latent_state = self.tokenizer.encode_to_obs_embeddings(now)
        return self._root_step(obs_act_dict, self.latent_state, start_pos), self.latent_state

    @torch.no_grad()
    def _root_step(self, obs_act_dict: Any, latent: torch.Tensor, start_pos: Any) -> Any:
        paged, rows, actions = self.paged, latent.shape[0], obs_act_dict["action"]
        if rows > self.env_num:
            raise BadCount("environments in one batch", rows, f"1 to the world model's env_num = {self.env_num}")
        if self._begins(actions):
            self.keys_values_wm = paged.open_empty(self, rows, latent.device, latent.dtype)
        else:
            roots = paged.roots_after(obs_act_dict["obs"], rows)
            self.root_total_query_cnt += rows
            self.root_hit_cnt += rows - roots.count(None)
            contexts: list[Any] = [None if root is None else paged.entry(root) for root in roots]
            if None in roots:
                before = self.tokenizer.encode_to_obs_embeddings(obs_act_dict["obs"])
                for row in [row for row, root in enumerate(roots) if root is None]:
                    contexts[row] = self._fresh(before[row].unsqueeze(0), start_pos[row].item())
            self.keys_values_wm = paged.open(self, contexts)
            start_pos = start_pos[:rows]
            tokens = torch.from_numpy(np.array(actions[:rows])).to(latent.device)
            self._forward({"act_tokens": tokens.unsqueeze(1)}, start_pos)
        outputs = self._forward({"obs_embeddings": latent}, start_pos)
        self.update_cache_context(latent, seen=obs_act_dict["current_obs"])
        return outputs

    def _begins(self, actions: Any) -> bool:
        """Whether this is the first step of an episode, as LightZero tells it."""
        return not isinstance(actions[0], np.ndarray) if self.continuous_action_space else max(actions) == -1

    def _forward(self, tokens: dict[str, torch.Tensor], start_pos: Any) -> Any:
        return self.forward(tokens, past_keys_values=self.keys_values_wm, is_init_infer=True, start_pos=start_pos)

    def retrieve_or_generate_kvcache(
        self, latent_state: Any, ready_env_num: int, simulation_index: int = 0, start_pos: Any = 0
    ) -> list[int]:
        """Find the contexts of a batch of search nodes; a node that has none gets a context of its own token."""
        if self.reanalyze_phase:  # LightZero keeps no contexts there
            return super().retrieve_or_generate_kvcache(  # type: ignore[no-any-return]
                latent_state, ready_env_num, simulation_index, start_pos
            )
        attributes = self.__dict__  # plain attributes, without the search of Module.__setattr__
        attributes["total_query_count"] += ready_env_num
        if self.paged.keys == "node" and self.context_length > 2:
            attributes["hit_count"] += ready_env_num
            found: list[Any] = self.paged.nodes.take(ready_env_num)
        else:
            found = self._by_latent(latent_state[:ready_env_num], start_pos)
        attributes["keys_values_wm_list"] = found
        return found  # trim_and_pad_kv_cache knows the sizes

    def _by_latent(self, latent_state: Any, start_pos: Any) -> list[Any]:
        found = self.paged.lookup([hash_state(state) for state in latent_state])
        missing = [row for row, entry in enumerate(found) if entry is None]
        self.hit_count += len(found) - len(missing)
        for row in missing:
            latent = torch.from_numpy(latent_state[row]).unsqueeze(0).to(self.device)
            found[row] = self._fresh(latent, int(start_pos[row].item()))
        return found

    def _fresh(self, latent: torch.Tensor, start_pos: int) -> KeysValues:
        """A context of one observation."""
        empty = self.transformer.generate_empty_keys_values(n=1, max_tokens=self.context_length)
        self.forward({"obs_embeddings": latent}, past_keys_values=empty, is_init_infer=True, start_pos=start_pos)
        return empty

    def trim_and_pad_kv_cache(self, is_init_infer: bool = True) -> list[int]:
        """Gather the contexts of the batch, all layers at once, left-padded to the longest."""
        contexts, paged = self.keys_values_wm_list, self.paged
        if self.reanalyze_phase:
            sizes: list[int] = self.keys_values_wm_size_list
            self.keys_values_wm = self.transformer.generate_empty_keys_values(len(sizes), self.context_length)
            super().trim_and_pad_kv_cache(is_init_infer)
            return sizes
        if is_init_infer:  # a new search begins: nothing looks the old nodes up again
            paged.forget_nodes()
        batch = paged.open_sequences(self, contexts) if type(contexts[0]) is int else paged.open(self, contexts)
        self.__dict__["keys_values_wm"] = batch
        return batch.lengths

    def update_cache_context(
        self, latent_state: torch.Tensor, is_init_infer: bool = True, simulation_index: int = 0,
        search_depth: Sequence[int] = (), valid_context_lengths: Any = None, *, seen: torch.Tensor | None = None,
    ) -> None:
        """Store what the step appended: new contexts of the batch, by node or under hashes of their latent states."""
        if self.reanalyze_phase:
            return
        paged = self.paged
        if self.context_length <= 2:  # no context is kept
            paged.close()
        elif paged.keys == "latent":
            self._store_by_latent(latent_state, is_init_infer)
        elif not is_init_infer:
            paged.nodes.add(paged.commit(self, self.keys_values_wm_size_list_current))
        else:
            paged.end_search()
            assert seen is not None
            paged.begin_search(paged.commit_roots(self, self.keys_values_wm.size), seen)

    def _store_by_latent(self, latent_state: torch.Tensor, is_init_infer: bool) -> None:
        rows = latent_state.size(0)
        latents = latent_state.reshape(rows, -1).cpu().numpy()
        keys = [hash_state(latent) for latent in latents]
        if not is_init_infer:
            self.paged.store_nodes(keys, self.paged.commit(self, self.keys_values_wm_size_list_current))
            return
        self.paged.forget_nodes()
        if isinstance(self.keys_values_wm, KeysValues):  # first step of an episode: LightZero made this batch itself
            children = self.paged.take_in(self, [self.keys_values_wm], rows, self.keys_values_wm.size)
        else:
            children = self.paged.commit_roots(self, self.keys_values_wm.size)
        self.paged.store_roots(keys, children)

    def custom_copy_kv_cache_to_shared_wm(self, src_kv: Any) -> Any:
        """Nothing to copy: a step never writes to what is stored."""
        return src_kv if isinstance(src_kv, Entry) else super().custom_copy_kv_cache_to_shared_wm(src_kv)

    def custom_copy_kv_cache_to_shared_init_envs(self, src_kv: Any, env_id: int) -> int:
        """A sequence with the same contents, to be assigned to a key of `past_kv_cache_init_infer_envs[env_id]`."""
        return self.paged.adopt(self, src_kv)

    def custom_copy_kv_cache_to_shared_recur(self, src_kv: Any) -> int:
        """A sequence with the same contents, to be assigned to a key of `past_kv_cache_recurrent_infer`."""
        return self.paged.adopt(self, src_kv)


def _world_models(target: Any) -> Iterator[Any]:
    """Each distinct world model of a target, once."""
    seen: set[int] = set()
    models = [getattr(target, name, None) for name in _MODELS]
    for holder in (target, *models):
        world_model = holder if isinstance(holder, WorldModel) else getattr(holder, "world_model", None)
        if isinstance(world_model, WorldModel) and id(world_model) not in seen:
            seen.add(id(world_model))
            yield world_model


def _swap_in(model: Any, at: str, page_size: int, keys: str, pool: dict[str, Any]) -> None:
    if type(model) not in (WorldModel, PagedWorldModel):
        raise BadCount("target", type(model).__name__, "a WorldModel, and no subclass of one")
    state = PagedState(
        dict(layers=model.num_layers, heads=model.num_heads, head_size=model.embed_dim // model.num_heads,
             page_size=page_size, **pool),
        envs=model.env_num, context_length=model.context_length, at=at, keys=keys,
        rotary=bool(model.config.rotary_emb),
    )
    announce_searches()
    model.__class__ = PagedWorldModel
    model.paged = state
    model.past_kv_cache_init_infer_envs = [EnvKeys(state, env) for env in range(model.env_num)]
    model.shared_pool_init_infer = [Pool(state) for _ in range(model.env_num)]
    model.past_kv_cache_recurrent_infer = SharedKeys(state)
    model.shared_pool_recur_infer = Pool(state)
    model.shared_pool_wm = [None] * model.shared_pool_size_wm
    _forget_step(model)


def _swap_out(model: Any) -> None:
    """LightZero's own stores, as its constructor leaves them."""
    if type(model) is not PagedWorldModel:
        return
    model.__class__ = WorldModel
    del model.paged
    model._initialize_cache_structures()
    model.shared_pool_recur_infer = [None] * model.shared_pool_size
    model.shared_pool_init_infer = [[None] * model.shared_pool_size_init for _ in range(model.env_num)]
    model.shared_pool_index = model.shared_pool_index_wm = 0
    model.shared_pool_index_init_envs = [0] * model.env_num
    _forget_step(model)


def _forget_step(model: Any) -> None:
    model._initialize_transformer_keys_values()
    model.keys_values_wm_list, model.keys_values_wm_size_list = [], []


swap_in, swap_out = (lightzero_main.swap_in, lightzero_main.swap_out) if FOUND == MAIN else (_swap_in, _swap_out)

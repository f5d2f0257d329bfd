"""LightZero 0.2.0's UniZero, collecting with its own policy and C++ tree."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from paged_kv.cache import PagedKVCache
from paged_kv.tools.profile import client_parts
from paged_kv.tools.profile.counters import CACHE, LAYER, MODEL, Probe, storage_bytes
from paged_kv.tools.profile.presets import Preset
from paged_kv.tools.profile.side import TITLES, Held, Lookups, Outcome, Setting
from paged_kv.tools.profile.worlds import IMAGE_SHAPE, VECTOR_SHAPE, make_world

TEMPERATURE = 0.25  # what LightZero's collector passes with its default configuration


def lightzero_version() -> str | None:
    """The version of LightZero that is installed here, or None."""
    if importlib.util.find_spec("lzero") is None or importlib.util.find_spec("ding") is None:
        return None
    try:
        return version("LightZero")
    except PackageNotFoundError:
        return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Swallow what LightZero and its dependencies print and log while they are imported
    and built.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


def tree_file() -> str:
    """The file of LightZero's C++ tree, for `integrations.ties.fixed_ties`."""
    with quiet():
        from lzero.mcts.ctree.ctree_muzero import mz_tree
    return str(mz_tree.__file__)


def build_policy(preset: Preset, setting: Setting) -> Any:
    """A `UniZeroPolicy` in collect mode, with the checkpoint's weights for CartPole and random ones
    otherwise.
    """
    with quiet():
        from ding.utils import deep_merge_dicts
        from easydict import EasyDict
        from lzero.policy import InverseScalarTransform
        from lzero.policy.unizero import UniZeroPolicy

        overrides = (
            _cartpole_config() if preset.observation == "cartpole" else _sized_config(preset)
        )
        config = EasyDict(deep_merge_dicts(UniZeroPolicy.default_config(), overrides))
        device = setting.device.type
        config.cuda = device == "cuda"
        config.device = device
        config.num_simulations = setting.simulations
        config.collector_env_num = setting.envs
        # LightZero's ring of recurrent entries defaults to 50 simulations and overwrites live ones
        # beyond that.
        ring = max(50, setting.simulations)
        config.model.world_model_cfg.update(
            device=device, env_num=setting.envs, num_simulations=ring
        )
        torch.manual_seed(setting.seed)
        policy = UniZeroPolicy(config, enable_field=["collect"])
        # Only the learner makes this in 0.2.0, though collecting needs it.
        policy.inverse_scalar_transform_handle = InverseScalarTransform(
            config.model.support_scale, device, config.model.categorical_distribution
        )
        policy._collect_model.to(setting.device)
        _load_weights(preset, policy._collect_model)
    return policy


def weights_of(preset: Preset) -> str:
    """Where the weights come from: "trained" or "random"."""
    return "trained" if preset.observation == "cartpole" and _checkpoint() is not None else "random"


def _cartpole_config() -> dict[str, Any]:
    from zoo.classic_control.cartpole.config.cartpole_unizero_config import main_config

    return dict(copy.deepcopy(main_config.policy))


def _sized_config(preset: Preset) -> dict[str, Any]:
    image = preset.observation == "image"
    world_model = dict(
        max_blocks=preset.max_tokens // 2,
        max_tokens=preset.max_tokens,
        context_length=preset.context,
        num_layers=preset.layers,
        num_heads=preset.heads,
        embed_dim=preset.embed,
        action_space_size=preset.actions,
        obs_type=preset.observation,
        rotary_emb=preset.rotary,
        continuous_action_space=False,
    )
    return dict(
        model=dict(
            model_type="conv" if image else "mlp",
            observation_shape=IMAGE_SHAPE if image else VECTOR_SHAPE[0],
            action_space_size=preset.actions,
            norm_type="BN",
            world_model_cfg=world_model,
        )
    )


def _checkpoint() -> Any:
    from paged_kv.tools import data

    path = data.checkpoint_path()
    return path if path.exists() else None


def _load_weights(preset: Preset, model: Any) -> None:
    if weights_of(preset) == "trained":
        from safetensors.torch import load_file

        model.load_state_dict({**model.state_dict(), **load_file(_checkpoint())})
        return
    # A fresh model's last layers are zero, which gives every latent state the same cache key. Small
    # values and rewards keep their absolute differences readable; they pass through a quadratic
    # transform.
    wm = model.world_model
    spreads = {
        wm.head_observations: 0.2,
        wm.head_policy: 0.1,
        wm.head_value: 0.02,
        wm.head_rewards: 0.02,
    }
    for head, spread in spreads.items():
        last = [layer for layer in head.head_module if isinstance(layer, torch.nn.Linear)][-1]
        torch.nn.init.normal_(last.weight, std=spread)


class LightZeroSide:
    """One LightZero policy with one kind of cache, and its own environments."""

    def __init__(self, kind: str, preset: Preset, setting: Setting) -> None:
        self.kind = kind
        self.title = TITLES["lightzero"][kind]
        self.on_simulation: Callable[[], None] | None = None
        self._policy = build_policy(preset, setting)
        with quiet():
            if kind == "paged":
                from paged_kv.integrations.lightzero import attach

                attach(
                    self._policy,
                    cache="paged",
                    at=setting.at,
                    page_size=setting.page_size,
                    keys=setting.keys,
                    padding=setting.padding,
                    window=setting.window,
                    step=setting.step,
                    linears=setting.linears,
                    attention=setting.attention,
                    storage=setting.storage,
                    compile=setting.compile,
                )
            self._world = make_world(preset, setting.envs, setting.seed)
        self._model = self._policy._collect_model
        self._actions = preset.actions
        self._device = setting.device
        self.envs = setting.envs
        self.token_bytes = preset.layers * 2 * preset.embed * 4
        self._watch_simulations()

    @property
    def wm(self) -> Any:
        """The world model."""
        return self._model.world_model

    def step(self, simulations: int, seed: int) -> Outcome:
        """One root step: search from every environment's state, then act."""
        np.random.seed(seed % 2**32)
        self._policy._mcts_collect._cfg.num_simulations = simulations
        output = self._policy._forward_collect(
            torch.from_numpy(self._world.observations.copy()).to(self._device),
            action_mask=[np.ones(self._actions, np.int8)] * self.envs,
            temperature=TEMPERATURE,
            to_play=[-1] * self.envs,
            epsilon=0.0,
            timestep=[np.array(t) for t in self._world.timesteps],
        )
        ordered = [output[i] for i in range(self.envs)]
        outcome = Outcome(
            [int(o["action"]) for o in ordered],
            [list(o["visit_count_distributions"]) for o in ordered],
            [
                float(v)
                for o in ordered
                for v in (o["searched_value"], np.ravel(o["predicted_value"])[0])
            ],
        )
        ended = self._world.step(outcome.actions)
        if ended:
            self._policy._reset_collect(ended)
        return outcome

    def probes(self) -> list[Probe]:
        """The methods that are cache work or model work."""
        wm = self.wm
        from lzero.model.unizero_world_models.kv_caching import KVCache

        from paged_kv.attention.dense import DenseLayer

        # The paged side, too, has LightZero's own layers, for contexts that were not found.
        layers: set[type] = {KVCache, DenseLayer}
        names = [
            "retrieve_or_generate_kvcache",
            "trim_and_pad_kv_cache",
            "update_cache_context",
            "custom_copy_kv_cache_to_shared_wm",
        ]
        found = [Probe(wm, name, CACHE) for name in names]
        found.append(Probe(type(wm), "forward", MODEL))
        if self.kind == "paged":
            from paged_kv.integrations.lightzero.release.exact import ExactLayer

            layers.add(ExactLayer)
            found.append(Probe(type(wm.past_kv_cache_recurrent_infer), "clear", CACHE))
            names = ["heed_weights", "roots_after", "roots_at", "open_empty", "open", "end_search"]
            found += [Probe(type(wm.paged), name, CACHE) for name in names]
        return found + [Probe(layer, name, LAYER) for layer in layers for name in ("update", "get")]

    def parts(self) -> list[Probe]:
        """The methods that are work of the model, its heads, its transforms or the tree."""
        return client_parts.parts(self.wm, self._policy, paged=self.kind == "paged")

    def held(self) -> Held:
        """What the stores and the working buffers take now."""
        wm = self.wm
        if self.kind == "paged":
            cache = wm.paged.cache
            sharing = cache.logical_tokens / max(1, cache.stored_tokens)
            return Held(cache.bytes_in_use, cache.working_bytes, cache.bytes_reserved, sharing)
        stored = (
            [e for ring in wm.shared_pool_init_infer for e in ring]
            + wm.shared_pool_recur_infer
            + wm.shared_pool_wm
        )
        working = [
            wm.keys_values_wm,
            wm.keys_values_wm_single_env,
            wm.keys_values_wm_single_env_tmp,
        ]
        return Held(_entry_bytes(stored), _entry_bytes(working))

    def root_tokens(self) -> int:
        """Tokens in the root windows of all environments."""
        wm = self.wm
        rings = zip(wm.shared_pool_init_infer, wm.shared_pool_index_init_envs, strict=True)
        return sum(ring[at - 1].size for ring, at in rings if ring[at - 1] is not None)

    def lookups(self) -> Lookups:
        """Lookups since the side was made."""
        wm = self.wm
        return Lookups(
            asked=wm.root_total_query_cnt + wm.total_query_count,
            found=wm.root_hit_cnt + wm.hit_count,
        )

    def pages(self) -> PagedKVCache | None:
        """The paged cache, where this side has one."""
        return self.wm.paged.cache if self.kind == "paged" else None

    def totals(self) -> dict[str, int]:
        """Pages copied and entries evicted, for the paged cache."""
        if self.kind != "paged":
            return {}
        paged = self.wm.paged
        return {
            "copied_pages": paged.cache.stats.copied_pages,
            "evictions": paged.manager.stats.combined.evictions,
        }

    def _watch_simulations(self) -> None:
        inner = self._model.recurrent_inference

        def watched(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            if self.on_simulation is not None:
                self.on_simulation()
            return result

        self._model.recurrent_inference = watched


def _entry_bytes(entries: list[Any]) -> int:
    return storage_bytes(
        half._cache
        for entry in entries
        if entry is not None
        for layer in entry
        for half in (layer._k_cache, layer._v_cache)
    )

"""The world model of LightZero 0.2.0 on pages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lzero.model.unizero_world_models.world_model import WorldModel

from paged_kv.errors import BadCount
from paged_kv.integrations.lightzero.release.exact import ExactBatch, ExactState, token_shape
from paged_kv.integrations.lightzero.release.short_roots import root_outputs
from paged_kv.integrations.lightzero.shared.again import ComesBack
from paged_kv.integrations.lightzero.shared.attention import mask_padding
from paged_kv.integrations.lightzero.shared.batch import StepBatch
from paged_kv.integrations.lightzero.shared.choices import Choices
from paged_kv.integrations.lightzero.shared.copies import SharedCopies
from paged_kv.integrations.lightzero.shared.policy import BEGINS, follow_environments
from paged_kv.integrations.lightzero.shared.search import announce_searches
from paged_kv.integrations.lightzero.shared.state import PagedState, Roots
from paged_kv.integrations.lightzero.shared.stores import EnvKeys, Pool, SharedKeys

# Where models are made: modules, classes in them or "", and the attribute that names the class to
# build.
BUILDERS: tuple[tuple[str, str, str], ...] = (
    ("lzero.model.unizero_model", "", "WorldModel"),
    ("lzero.model.sampled_unizero_model", "", "WorldModel"),
)


class PagedWorldModel(ComesBack, SharedCopies, WorldModel):  # type: ignore[misc]
    """The world model of LightZero 0.2.0 with contexts in pages; `attach` turns a `WorldModel` into
    one in place.

    `paged` holds the contexts. It is no module: parameters, buffers and state_dict are those of
    `WorldModel`.
    """

    paged: PagedState
    _windows: ExactBatch | None = None  # of the pass that is running

    def reset_for_initial_inference(
        self, obs_act_dict: Any, start_pos: Any = 0
    ) -> tuple[Any, torch.Tensor]:
        """The step of the roots: what an environment saw last continues the context it
        had before.
        """
        now = obs_act_dict["current_obs"]
        if now is None:  # targets for training, which keep no contexts
            return super().reset_for_initial_inference(obs_act_dict, start_pos)  # type: ignore[no-any-return]
        self.paged.heed_weights(self)
        self.latent_state = self.tokenizer.encode_to_obs_embeddings(now)
        return self._root_step(obs_act_dict, self.latent_state, start_pos), self.latent_state

    @torch.no_grad()
    def _root_step(self, obs_act_dict: Any, latent: torch.Tensor, start_pos: Any) -> Any:
        paged = self.paged
        rows = latent.shape[0]
        if rows > self.env_num:
            raise BadCount(
                "environments in one batch",
                rows,
                f"1 to the world model's env_num = {self.env_num}",
            )
        envs = paged.environments_of(rows)
        begins = [self._begins(action) for action in obs_act_dict["action"][:rows]]
        # a policy that was reset for evaluation hands over fewer than collection has
        if all(begins):
            begins = [True] * rows
        elif len(begins) < rows:
            raise BadCount(
                "last actions", len(begins), f"one for each of the {rows} environments in the batch"
            )
        groups = [[row for row in range(rows) if begins[row] is new] for new in (True, False)]
        outputs = [
            self._roots(group, envs, obs_act_dict, latent, start_pos, begins[group[0]])
            for group in groups
            if group
        ]
        if not self.reanalyze_phase:
            paged.begin_search(envs)
        return outputs[0] if len(outputs) == 1 else _in_order(outputs, groups[0] + groups[1])

    def _roots(
        self,
        rows: list[int],
        envs: list[int],
        obs_act_dict: Any,
        latent: torch.Tensor,
        start_pos: Any,
        begins: bool,
    ) -> Any:
        """The roots of some rows of the batch, which all begin an episode or all go on with one."""
        paged = self.paged
        part = len(rows) < len(envs)
        latent, times = (
            (latent[rows], [start_pos[row] for row in rows]) if part else (latent, start_pos)
        )
        action = None
        if begins:
            self.keys_values_wm = paged.open_empty(self, len(rows), latent.device, latent.dtype)
        else:
            contexts = self._root_contexts(obs_act_dict["obs"], rows, envs, start_pos)
            self.keys_values_wm = paged.open(self, contexts)
            times = times[: len(rows)]
            action = torch.from_numpy(np.array([obs_act_dict["action"][row] for row in rows])).to(
                latent.device
            )
        outputs = self._root_outputs(action, latent, times)
        self.update_cache_context(
            latent, roots=Roots(rows, [envs[row] for row in rows], obs_act_dict["current_obs"])
        )
        return outputs

    def _root_outputs(self, action: torch.Tensor | None, latent: torch.Tensor, times: Any) -> Any:
        lean = self.paged.lean
        if lean is not None and lean.ready(self) and not self.keys_values_wm.whole_windows:
            return root_outputs(lean, self, action, latent, times)
        if action is not None:
            self._forward({"act_tokens": action.unsqueeze(1)}, times)
        return self._forward({"obs_embeddings": latent}, times)

    def _root_contexts(
        self, seen: torch.Tensor, rows: list[int], envs: list[int], start_pos: Any
    ) -> list[Any]:
        """The window of each row that ends with the observation `seen`; where it is not found, one
        of `seen` alone.
        """
        paged = self.paged
        which = Roots(rows, [envs[row] for row in rows], seen)
        before = self.tokenizer.encode_to_obs_embeddings(seen) if paged.keys == "latent" else None
        roots = (
            paged.roots_after(which)
            if before is None
            else paged.roots_at(which, latent_keys(before))
        )
        self.root_total_query_cnt += len(rows)
        self.root_hit_cnt += len(rows) - roots.count(None)
        contexts: list[Any] = [None if root is None else paged.entry(root) for root in roots]
        if None in roots:
            before = self.tokenizer.encode_to_obs_embeddings(seen) if before is None else before
            for place in [place for place, root in enumerate(roots) if root is None]:
                row = rows[place]
                contexts[place] = paged.fresh(self, before[row].unsqueeze(0), int(start_pos[row]))
        return contexts

    def _begins(self, action: Any) -> bool:
        """Whether an environment begins an episode, as LightZero tells it by the action before."""
        return (
            not isinstance(action, np.ndarray)
            if self.continuous_action_space
            else bool(action == BEGINS)
        )

    def _forward(self, tokens: dict[str, torch.Tensor], start_pos: Any) -> Any:
        batch = self.keys_values_wm
        # learned positions of each window, not of the longest
        own = batch.masked and not self.config.rotary_emb
        if own:  # where a step of the search finds its positions, too
            self.keys_values_wm_size_list_current = batch.sizes
        return self.forward(
            tokens, past_keys_values=batch, is_init_infer=not own, start_pos=start_pos
        )

    def forward(
        self,
        obs_embeddings_or_act_tokens: Any,
        past_keys_values: Any = None,
        *arguments: Any,
        **options: Any,
    ) -> Any:
        """LightZero's; windows that are computed anew place their tokens themselves."""
        if type(past_keys_values) is not ExactBatch:
            return super().forward(
                obs_embeddings_or_act_tokens, past_keys_values, *arguments, **options
            )
        self.__dict__["_windows"] = past_keys_values
        try:
            return super().forward(
                obs_embeddings_or_act_tokens, past_keys_values, *arguments, **options
            )
        finally:
            self.__dict__["_windows"] = None

    def _add_position_embeddings(self, embeddings: torch.Tensor, *arguments: Any) -> torch.Tensor:
        if self._windows is not None:
            return embeddings
        return super()._add_position_embeddings(embeddings, *arguments)  # type: ignore[no-any-return]

    def _transformer_pass(
        self,
        sequences: torch.Tensor,
        past_keys_values: Any,
        kvcache_independent: bool,
        valid_context_lengths: Any,
        start_pos: Any = 0,
    ) -> torch.Tensor:
        """LightZero's, with the mask of the padding where `MaskedAttention` looks for one."""
        if self._windows is not None:
            return self._windows.run(self, sequences)
        if type(past_keys_values) is StepBatch:
            valid_context_lengths = past_keys_values.mask(sequences.shape[1])
        return super()._transformer_pass(  # type: ignore[no-any-return]
            sequences, past_keys_values, kvcache_independent, valid_context_lengths, start_pos
        )

    def retrieve_or_generate_kvcache(
        self, latent_state: Any, ready_env_num: int, simulation_index: int = 0, start_pos: Any = 0
    ) -> list[int]:
        """Find the contexts of a batch of search nodes; a node that has none gets a context of its
        own token.
        """
        if self.reanalyze_phase:  # LightZero keeps no contexts there
            return super().retrieve_or_generate_kvcache(  # type: ignore[no-any-return]
                latent_state, ready_env_num, simulation_index, start_pos
            )
        paged = self.paged
        if paged.by_node(self):
            found = paged.nodes.take(ready_env_num)
        else:
            found = paged.lookup(latent_keys(latent_state[:ready_env_num]))
        return self._use(found, latent_state, start_pos)

    def trim_and_pad_kv_cache(self, is_init_infer: bool = True) -> list[int]:
        """Gather the contexts of the batch, all layers at once, left-padded to the longest."""
        contexts = self.keys_values_wm_list
        paged = self.paged
        if self.reanalyze_phase:
            sizes: list[int] = self.keys_values_wm_size_list
            self.keys_values_wm = self.transformer.generate_empty_keys_values(
                len(sizes), self.context_length
            )
            super().trim_and_pad_kv_cache(is_init_infer)
            return sizes
        if is_init_infer:  # a new search begins: nothing looks the old nodes up again
            paged.forget_nodes()
        stored = type(contexts[0]) is int  # as in all but a few steps
        batch = paged.open_sequences(self, contexts) if stored else paged.open(self, contexts)
        self.__dict__["keys_values_wm"] = batch
        return batch.lengths  # type: ignore[no-any-return]

    def update_cache_context(
        self,
        latent_state: torch.Tensor,
        is_init_infer: bool = True,
        simulation_index: int = 0,
        search_depth: Sequence[int] = (),
        valid_context_lengths: Any = None,
        *,
        roots: Roots | None = None,
    ) -> None:
        """Store what the step appended: new contexts of the batch, by node or under their latent
        states.
        """
        if self.reanalyze_phase:
            return
        paged = self.paged
        if self.context_length <= 2:  # no context is kept
            paged.close()
        elif not is_init_infer:
            children = paged.commit(self, self.keys_values_wm_size_list_current)
            if paged.keys == "node":
                paged.nodes.add(children)
            else:
                paged.store_nodes(latent_keys(latent_state), children)
        else:
            paged.forget_nodes()
            assert roots is not None
            keys = latent_keys(latent_state) if paged.keys == "latent" else None
            paged.store_roots(roots, paged.commit_roots(self), keys)


def latent_keys(latents: Any) -> list[bytes]:
    """The key of each latent state of a batch: all of its bytes, so that no two states ever share
    one by chance.
    """
    array = latents.cpu().numpy() if isinstance(latents, torch.Tensor) else latents
    return [latent.tobytes() for latent in array]


def _in_order(outputs: list[Any], rows: list[int]) -> Any:
    """One output of several, whose rows stand one after another, as `rows` of one batch."""
    order = torch.tensor(rows).argsort().to(outputs[0].output_sequence.device)
    fields = [
        [getattr(output, field.name) for output in outputs]
        for field in dataclasses.fields(outputs[0])
    ]
    return type(outputs[0])(
        *(None if parts[0] is None else torch.cat(parts)[order] for parts in fields)
    )


def put_hooks() -> None:
    """Have LightZero's searches and policies tell models with node keys what they know."""
    announce_searches()
    follow_environments()


def swap_in(model: Any, choices: Choices, pool: dict[str, Any]) -> None:
    """Turn a world model into its paged kind, in place."""
    if type(model) not in (WorldModel, PagedWorldModel):
        raise BadCount("target", type(model).__name__, "a WorldModel, and no subclass of one")
    kind = PagedState
    shape = dict(
        layers=model.num_layers,
        heads=model.num_heads,
        head_size=model.embed_dim // model.num_heads,
    )
    if choices.window == "exact":
        kind = ExactState
        shape = token_shape(model.embed_dim)
    state = kind(
        {**shape, **pool},
        envs=model.env_num,
        context_length=model.context_length,
        choices=choices,
        rotary=bool(model.config.rotary_emb),
    )
    put_hooks()
    mask_padding(model, choices.padding == "masked")
    model.__class__ = PagedWorldModel
    model.paged = state
    model.past_kv_cache_init_infer_envs = [EnvKeys(state, env) for env in range(model.env_num)]
    model.shared_pool_init_infer = [Pool(state) for _ in range(model.env_num)]
    model.past_kv_cache_recurrent_infer = SharedKeys(state)
    model.shared_pool_recur_infer = Pool(state)
    model.shared_pool_wm = [None] * model.shared_pool_size_wm
    _forget_step(model)
    if state.lean is not None:
        state.lean.begin(model, state)


def swap_out(model: Any) -> None:
    """LightZero's own stores, as its constructor leaves them."""
    if type(model) is not PagedWorldModel:
        return
    model.__class__ = WorldModel
    mask_padding(model, False)
    del model.paged
    model._initialize_cache_structures()
    model.shared_pool_recur_infer = [None] * model.shared_pool_size
    model.shared_pool_init_infer = [
        [None] * model.shared_pool_size_init for _ in range(model.env_num)
    ]
    model.shared_pool_index = model.shared_pool_index_wm = 0
    model.shared_pool_index_init_envs = [0] * model.env_num
    _forget_step(model)


def _forget_step(model: Any) -> None:
    model._initialize_transformer_keys_values()
    model.keys_values_wm_list = []
    model.keys_values_wm_size_list = []

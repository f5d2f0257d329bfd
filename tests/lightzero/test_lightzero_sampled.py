"""Sampled UniZero with continuous actions, in LightZero's own search: every answer is that of the
row's own tokens.

Runs on release 0.2.0, and on a checkout of main where that is on the path.
"""

from __future__ import annotations

import copy
import importlib
from typing import Any

import numpy as np
import pytest
import torch
from lightzero_oracle import Token, Window, heed_context, replay
from lightzero_trees import quiet

pytestmark = pytest.mark.lightzero
BITS = 1e-4
ENVS = 4
SIMULATIONS = 8
STEPS = 4


def build_policy(rotary: bool) -> Any:
    """LightZero's sampled policy for Pendulum, with windows that are never full here."""
    with quiet():
        from ding.utils import deep_merge_dicts
        from easydict import EasyDict
        from lzero.policy import InverseScalarTransform
        from lzero.policy.sampled_unizero import SampledUniZeroPolicy
        from zoo.classic_control.pendulum.config.pendulum_cont_sampled_unizero_config import (
            main_config,
        )

        config = EasyDict(
            deep_merge_dicts(
                SampledUniZeroPolicy.default_config(), copy.deepcopy(main_config.policy)
            )
        )
        config.update(cuda=False, device="cpu", num_simulations=SIMULATIONS, collector_env_num=ENVS)
        config.model.world_model_cfg.update(
            device="cpu",
            env_num=ENVS,
            context_length=40,
            max_blocks=20,
            max_tokens=40,
            embed_dim=32,
            num_heads=2,
            rotary_emb=rotary,
            max_seq_len=256,
        )
        torch.manual_seed(0)
        policy = SampledUniZeroPolicy(config, enable_field=["collect"])
        if "support_scale" in config.model:  # 0.2.0
            handle = InverseScalarTransform(
                config.model.support_scale, "cpu", config.model.categorical_distribution
            )
            policy.inverse_scalar_transform_handle = handle
        else:
            support = importlib.import_module("lzero.policy").DiscreteSupport(
                *config.model.value_support_range
            )
            handle = InverseScalarTransform(support, config.model.categorical_distribution)
            policy.value_inverse_scalar_transform_handle = handle
    with torch.no_grad():
        for weights in policy._collect_model.parameters():
            if not weights.abs().any():
                weights.normal_(0, 0.3)
    heed_context(policy._collect_model.world_model, 3)
    return policy


class Witness:
    """Stands between search and model, and compares every value with that of the node's window,
    replayed alone.
    """

    def __init__(self, model: Any) -> None:
        self.wm = model.world_model
        self._ask = model.recurrent_inference
        self.windows: dict[bytes, tuple[Window, int]] = {}  # by latent state: no two are alike here
        self.errors: list[float] = []
        model.recurrent_inference = self.recurrent_inference

    def root(self, window: Window, value: Any) -> None:
        """A root, and the value that was predicted for it."""
        self.windows[window[-1].embedding.numpy().tobytes()] = window, 0
        self._compare(window, value)

    def recurrent_inference(self, history: Any, index: int, depths: Any, times: Any) -> Any:
        answer = self._ask(history, index, depths, times)
        latents, actions = history[-1]
        for row, latent in enumerate(latents):
            window, _ = self.windows[latent.tobytes()]
            where = 2 * (depths[row] + int(times[row]))
            window = (*window, self.action(actions[row], where + 1))
            window = (*window, Token(answer.latent_state[row, 0].clone(), where + 2))
            self.windows[answer.latent_state[row].numpy().tobytes()] = window, depths[row]
            self._compare(window, answer.value[row])
        return answer

    @torch.no_grad()
    def action(self, action: Any, position: int) -> Token:
        embedded = self.wm.act_embedding_table(torch.as_tensor(action).float().reshape(1, 1, -1))
        return Token(embedded[0, 0], position)

    @torch.no_grad()
    def _compare(self, window: Window, value: Any) -> None:
        wanted = self.wm.head_value.head_module(replay(self.wm, window)[-1][None])[0]
        self.errors.append(float((torch.as_tensor(value).flatten() - wanted).abs().max()))


@pytest.mark.parametrize("rotary", [True, False], ids=["rotary", "learned"])
@pytest.mark.parametrize(
    "options",
    [{"keys": "node"}, {"keys": "latent"}, {"at": "write"}, {"num_pages": 8, "max_pages": 30}],
    ids=str,
)
def test_continuous_actions(rotary: bool, options: dict[str, str]) -> None:
    from paged_kv.integrations.lightzero import attach

    policy = attach(build_policy(rotary), **options)
    model = policy._collect_model
    witness = Witness(model)
    draw = np.random.default_rng(0)
    windows: list[Window] = [()] * ENVS
    begin = model.initial_inference
    answers: list[Any] = []
    model.initial_inference = lambda *given: answers.append(begin(*given)) or answers[-1]
    for time in range(STEPS):
        seen = torch.from_numpy(draw.normal(size=(ENVS, 3)).astype(np.float32))
        with torch.no_grad():
            latents = witness.wm.tokenizer.encode_to_obs_embeddings(seen)
        windows = [
            (*window, Token(latents[row, 0], 2 * time)) for row, window in enumerate(windows)
        ]
        for window in windows:
            witness.windows[window[-1].embedding.numpy().tobytes()] = window, 0
        output = policy._forward_collect(
            seen, None, 1.0, [-1] * ENVS, 0.0, None, [np.array(time)] * ENVS
        )
        for row, window in enumerate(windows):
            witness.root(window, answers[-1].value[row])
            windows[row] = (*window, witness.action(output[row]["action"], 2 * time + 1))
    assert len(witness.errors) == STEPS * ENVS * (SIMULATIONS + 1)
    assert max(witness.errors) < BITS
    wm = witness.wm
    assert wm.hit_count == wm.total_query_count == STEPS * ENVS * SIMULATIONS
    assert wm.root_hit_cnt == wm.root_total_query_cnt == (STEPS - 1) * ENVS
    if "max_pages" in options:
        assert wm.paged.manager.recur_pool.stats.evictions
    wm.paged.cache.check()

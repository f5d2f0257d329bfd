"""LightZero 0.2.0's policy when the ready environments change: on its own cache, and on pages that
know who is who.

The policy logits of every root are compared with those of the environment's own window, replayed
alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from lightzero_oracle import Token, Window, heed_context, replay

from paged_kv.errors import BadCount, UnknownEnv

pytestmark = pytest.mark.lightzero
BITS = 2e-5
WRONG = 1e-3
ENVS = 4
STEPS = pytest.mark.parametrize("step", ["collect", "eval"])


@pytest.fixture(scope="module")
def policy() -> Any:
    """LightZero's policy for CartPole with trained weights, for four environments."""
    from paged_kv.tools.profile.client import build_policy
    from paged_kv.tools.profile.presets import PRESETS
    from paged_kv.tools.profile.side import Setting

    made = build_policy(PRESETS["cartpole"], Setting(ENVS, 4, 0, torch.device("cpu"), 2, "read"))
    made._eval_model = made._collect_model
    made._mcts_eval = made._mcts_collect
    made._cfg.evaluator_env_num = ENVS
    heed_context(made._collect_model.world_model, 3)
    return made


class Feed:
    """Observations for some of the environments at a time, and how far their roots are from those
    alone.
    """

    def __init__(
        self, policy: Any, step: str = "collect", pages: bool = True, **options: Any
    ) -> None:
        from paged_kv.integrations.lightzero import attach

        self.policy = copy.deepcopy(policy)
        self.step = step
        self.windows: dict[int, Window] = {}
        self.actions: dict[int, int] = {}
        self.random = np.random.default_rng(0)
        if pages:
            attach(self.policy, **options)

    @property
    def wm(self) -> Any:
        return self.policy._collect_model.world_model

    def __call__(self, *envs: int) -> dict[int, float]:
        """One step of `envs`, in this order; environment -> error of its root."""
        seen = torch.from_numpy(self.random.normal(size=(len(envs), 4)).astype(np.float32))
        times = [(len(self.windows.get(env, ())) + 1) // 2 for env in envs]
        common = [np.ones(2, np.int8)] * len(envs), [-1] * len(envs)
        timestep = [np.array(time) for time in times]
        if self.step == "collect":
            answer = self.policy._forward_collect(
                seen, common[0], 0.25, common[1], 0.0, list(envs), timestep
            )
        else:
            answer = self.policy._forward_eval(
                seen, common[0], common[1], ready_env_id=set(envs), timestep=timestep
            )
        return {
            env: self._error(answer[env], env, seen[row], times[row])
            for row, env in enumerate(envs)
        }

    @torch.no_grad()
    def _error(self, answer: Any, env: int, seen: torch.Tensor, time: int) -> float:
        wm = self.wm
        window = self.windows.get(env, ())
        if window:
            action = wm.act_embedding_table(torch.tensor(self.actions[env]))
            window = (*window, Token(action, 2 * time - 1))
        self.windows[env] = (
            *window,
            Token(wm.tokenizer.encode_to_obs_embeddings(seen[None])[0, 0], 2 * time),
        )
        self.actions[env] = int(answer["action"])
        wanted = wm.head_policy.head_module(replay(wm, self.windows[env])[-1][None])[0]
        return float(
            (torch.tensor(answer["predicted_policy_logits"]).flatten() - wanted).abs().max()
        )


def worst(errors: dict[int, float], *envs: int) -> float:
    return max(errors[env] for env in envs or errors)


def best(errors: dict[int, float], *envs: int) -> float:
    return min(errors[env] for env in envs or errors)


def test_fewer_ready_environments_keep_their_contexts(policy: Any) -> None:
    """LightZero's rows move up: row 1 is environment 2 now, and goes on from what environment 1 saw
    and did.
    """
    own = Feed(policy, "eval", pages=False)
    ours = Feed(policy, "eval")
    for feed in (own, ours):
        assert worst(feed(0, 1, 2, 3)) < BITS
        assert worst(feed(0, 1, 2, 3)) < BITS
    errors = own(0, 2, 3)
    assert best(errors, 2, 3) > WRONG
    assert worst(ours(0, 2, 3)) < BITS
    assert worst(ours(0, 1, 2, 3)) < BITS, "environment 1 goes on where it was"
    assert ours.wm.root_hit_cnt == ours.wm.root_total_query_cnt == 4 + 3 + 4
    ours.wm.paged.cache.check()


def test_a_short_batch_does_not_end_all_episodes(policy: Any) -> None:
    """After collecting from fewer environments than it was made for, LightZero lets all of them
    begin anew.
    """
    own = Feed(policy, pages=False)
    ours = Feed(policy)
    for feed in (own, ours):
        feed(0, 1, 2, 3)
        feed(2, 0)
    assert best(own(0, 1, 2, 3), 0, 2) > WRONG
    assert worst(ours(3, 2, 1, 0)) < BITS
    assert ours.wm.root_hit_cnt == ours.wm.root_total_query_cnt == 6


def test_an_environment_that_joins_begins_beside_the_others(policy: Any) -> None:
    ours = Feed(policy)
    for envs in ((1, 0), (1, 0), (2, 1, 0), (0, 3, 1, 2)):
        assert worst(ours(*envs)) < BITS
    assert ours.wm.root_hit_cnt == ours.wm.root_total_query_cnt == 2 + 2 + 3
    ours.wm.paged.cache.check()
    ours.wm.paged.manager.check()


@STEPS
def test_a_reset_of_the_policy_begins_all_episodes(policy: Any, step: str) -> None:
    """As in LightZero: where one episode ends, its collector resets the policy, and all
    environments begin anew.
    """
    own = Feed(policy, step, pages=False)
    ours = Feed(policy, step)
    for feed in (own, ours):
        feed(0, 1, 2, 3)
        getattr(feed.policy, f"_reset_{step}")([1])
        feed.windows.clear()
        assert worst(feed(0, 1, 2, 3)) < BITS
        assert worst(feed(0, 1, 2, 3)) < BITS


def test_bits_of_the_encoder(policy: Any) -> None:
    """A root is looked up by its latent state, encoded again: one other bit, and LightZero loses
    every context.
    """
    own = Feed(policy, "eval", pages=False)
    ours = Feed(policy, "eval")
    for feed in (own, ours):
        encode = feed.wm.tokenizer.encode_to_obs_embeddings
        # What a matrix product may do for batches of other sizes, here on every machine.
        feed.wm.tokenizer.encode_to_obs_embeddings = lambda x, encode=encode: (
            encode(x) + 3e-7 * (len(x) % 4)
        )
        feed(0, 1, 2, 3)
        feed(0, 1, 2, 3)
    own.policy.last_batch_obs = own.policy.last_batch_obs[:3]
    own.policy.last_batch_action = [0] * 3
    own(0, 1, 2)
    ours(0, 1, 2)
    assert own.wm.root_hit_cnt == 4
    assert own.wm.root_total_query_cnt == ours.wm.root_total_query_cnt == ours.wm.root_hit_cnt == 7


def test_latent_keys_leave_rows_to_the_policy(policy: Any) -> None:
    """For comparisons: as with LightZero's cache, all begin anew after a short batch."""
    ours = Feed(policy, keys="latent")
    for envs in ((0, 1, 2, 3), (2, 0), (0, 1, 2, 3)):
        ours.windows.clear()
        assert worst(ours(*envs)) < BITS or envs == (2, 0)
    assert "_paged_last_steps" not in vars(ours.policy)


def test_an_environment_the_model_does_not_know_is_named(policy: Any) -> None:
    ours = Feed(policy)
    ours(0, 1)
    with pytest.raises(UnknownEnv, match=r"environment id is 9, allowed is an integer from 0 to 3"):
        ours(0, 9)
    assert worst(ours(1, 0)) < BITS, "nothing was lost"


def test_ids_that_do_not_fit_the_rows_are_named(policy: Any) -> None:
    ours = Feed(policy)
    with pytest.raises(
        BadCount, match=r"ready environments is \[0, 1, 2\], allowed is one for each of the 2 rows"
    ):
        ours.policy._forward_collect(torch.zeros(2, 4), [np.ones(2)] * 2, ready_env_id=[0, 1, 2])


def test_more_rows_than_last_actions_are_named(policy: Any) -> None:
    """Without a policy, rows are environments: a batch cannot go on with one that was not there
    before.
    """
    wm = Feed(policy).policy._collect_model
    wm.initial_inference(torch.zeros(2, 4), [-1] * 2, torch.ones(2, 4), [np.array(0)] * 2)
    with pytest.raises(
        BadCount, match=r"last actions is 2, allowed is one for each of the 3 environments"
    ):
        wm.initial_inference(torch.ones(2, 4), [0] * 2, torch.ones(3, 4), [np.array(1)] * 3)


def test_models_on_lightzeros_cache_are_left_alone(policy: Any) -> None:
    from lzero.policy.unizero import UniZeroPolicy

    ours = Feed(policy)
    own = Feed(policy, pages=False)
    own(0, 1)
    assert hasattr(UniZeroPolicy._forward_collect, "__wrapped__")
    assert "_paged_last_steps" not in vars(own.policy)
    ours(0, 1)
    assert "_paged_last_steps" in vars(ours.policy)


def test_copies_of_a_policy_remember_for_themselves(policy: Any) -> None:
    ours = Feed(policy)
    ours(0, 1, 2, 3)
    ours(3, 1)
    again = copy.deepcopy(ours)
    steps: Sequence[Feed] = (ours, again)
    for feed in steps:
        feed.policy._reset_collect([0])
        feed.windows.clear()
        assert worst(feed(2, 1)) < BITS
        assert worst(feed(1, 2)) < BITS


def test_a_reset_for_fewer_environments_begins_all(policy: Any) -> None:
    """Collecting after a reset for evaluation: LightZero hands over one blank observation an
    evaluated environment.
    """
    for pages in (False, True):
        feed = Feed(policy, pages=pages)
        feed(0, 1, 2, 3)
        feed.policy._cfg.evaluator_env_num = 2
        feed.policy._reset_eval([0])
        feed.windows.clear()
        assert worst(feed(0, 1, 2, 3)) < BITS
        assert worst(feed(0, 1, 2, 3)) < BITS

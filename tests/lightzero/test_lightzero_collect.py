"""LightZero 0.2.0 playing CartPole: whole runs on its own cache and on ours."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightzero_trees import quiet

pytestmark = pytest.mark.lightzero
ROUNDS = 40  # in which each of the eight environments of a trained agent takes a step
CUT = 5  # rounds after which the next of them begins another episode, wherever it is


@pytest.fixture
def fixed_tree() -> Iterator[None]:
    """The search tree draws from a generator that the test seeds; it would seed it from
    the clock.
    """
    from paged_kv.integrations.ties import fixed_ties

    with quiet():
        from lzero.mcts.ctree.ctree_muzero import mz_tree
    with fixed_ties(mz_tree.__file__) as possible:
        if not possible:
            pytest.skip("tie-breaking of the search tree can be fixed on 64-bit Linux only")
        yield


@pytest.fixture
def seeded_cartpole(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """LightZero never seeds gymnasium: here every reset takes the next seed."""
    with quiet():
        from zoo.classic_control.cartpole.envs.cartpole_lightzero_env import CartPoleEnv
    seeds = {"next": 0}
    reset = CartPoleEnv.reset

    def seeded(self: Any) -> Any:
        start = reset(self)
        start["observation"], _ = self._env.reset(seed=seeds["next"])
        seeds["next"] += 1
        return start

    monkeypatch.setattr(CartPoleEnv, "reset", seeded)
    return seeds


def cartpole_config(updates: int) -> tuple[Any, Any]:
    """LightZero's own CartPole configuration, on one CPU, with small batches."""
    from zoo.classic_control.cartpole.config.cartpole_unizero_config import (
        create_config,
        main_config,
    )

    main = copy.deepcopy(main_config)
    create = copy.deepcopy(create_config)
    main.exp_name = "run"
    main.policy.update(cuda=False, device="cpu", batch_size=32, update_per_collect=updates)
    main.policy.model.world_model_cfg.device = "cpu"
    create.env_manager.type = "base"
    return main, create


def unsaved(patch: pytest.MonkeyPatch) -> None:
    """LightZero shall not write down its configuration: laying out the text takes longer than
    learning.
    """
    from ding.config import config

    patch.setattr(config, "save_config", lambda *_, **__: None)


def train(
    kind: str, folder: Path, seeds: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> tuple[str, int]:
    """Collect, learn and collect again; the hash of all searches, and their number."""
    from lzero.entry import train_unizero
    from lzero.policy.unizero import UniZeroPolicy

    from paged_kv.integrations.lightzero import installed
    from paged_kv.integrations.lightzero.release import world_model

    digest = hashlib.sha256()
    searches = []
    folder.mkdir()
    monkeypatch.chdir(folder)
    with monkeypatch.context() as patch:
        for name in ("_forward_collect", "_forward_eval"):
            # Without the names of the environments: on pages a policy would keep contexts that
            # LightZero's loses.
            bare = inspect.unwrap(getattr(UniZeroPolicy, name))
            patch.setattr(UniZeroPolicy, name, noted(bare, digest, searches))
        patch.setattr(world_model, "follow_environments", lambda: None)
        unsaved(patch)
        seeds["next"] = 0
        options = (
            {"cache": "lightzero"}
            if kind == "own"
            else {"at": "write", "padding": "attended", "keys": kind}
        )
        main, create = cartpole_config(updates=6)
        main.policy.update(num_simulations=8)
        with installed(**options), quiet():
            policy = train_unizero([main, create], seed=0, max_env_step=250)
    played = policy._collect_model.world_model
    assert hasattr(played, "paged") == (kind != "own")
    assert played.root_hit_cnt > 20
    return digest.hexdigest(), len(searches)


def noted(forward: Any, digest: Any, searches: list[int]) -> Any:
    """LightZero's forward, with the actions, visit counts and values of every search hashed."""

    @wraps(forward)
    def forward_and_note(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        for env in sorted(output):
            one = output[env]
            visits = [float(count) for count in one["visit_count_distributions"]]
            digest.update(
                repr((env, int(one["action"]), visits, float(one["searched_value"]))).encode()
            )
            searches.append(env)
        return output

    return forward_and_note


def test_training_is_the_same_bit_for_bit(
    fixed_tree: None,
    seeded_cartpole: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seeds and tie-breaking fixed: actions, visit counts and values of a collection, before and
    after learning.
    """
    runs = [
        train(kind, tmp_path / name, seeded_cartpole, monkeypatch)
        for kind, name in (("own", "dense"), ("node", "paged"), ("latent", "paged-by-latent"))
    ]
    assert runs[0][1] > 300
    assert runs[0] == runs[1] == runs[2]


class Player:
    """The trained agent, acting greedily in eight environments."""

    def __init__(self, kind: str) -> None:
        from ding.config import compile_config
        from ding.policy import create_policy
        from lzero.model.unizero_model import UniZeroModel
        from safetensors.torch import load_file

        from paged_kv.integrations.lightzero import attach
        from paged_kv.tools.data import checkpoint_path

        main, create = cartpole_config(updates=1)
        main.policy.evaluator_env_num = main.policy.model.world_model_cfg.evaluator_env_num = 8
        config = compile_config(
            main, seed=0, env=None, auto=True, create_cfg=create, save_cfg=False
        )
        model = UniZeroModel(**config.policy.model)
        model.load_state_dict({**model.state_dict(), **load_file(checkpoint_path())})
        if kind != "own":
            attach(model, at=kind, padding="attended")
        self.policy = create_policy(config.policy, model=model, enable_field=["learn", "eval"])

    def play(self, rounds: int, seeds: dict[str, int]) -> tuple[list[int], list[float]]:
        """Actions and values of so many steps of each environment."""
        from easydict import EasyDict
        from zoo.classic_control.cartpole.envs.cartpole_lightzero_env import CartPoleEnv

        seeds["next"] = 0
        envs = [CartPoleEnv(EasyDict(env_id="CartPole-v0")) for _ in range(8)]
        states = [env.reset() for env in envs]
        actions = []
        values = []
        for turn in range(rounds):
            cut = turn // CUT % 8 if turn % CUT == CUT - 1 else None
            observations = torch.from_numpy(
                np.stack([state["observation"] for state in states]).astype(np.float32)
            )
            times = [np.array(state["timestep"]) for state in states]
            output = self.policy._forward_eval(
                observations, [np.ones(2)] * 8, [-1] * 8, timestep=times
            )
            done = []
            for row, env in enumerate(envs):
                actions.append(int(output[row]["action"]))
                values.append(float(output[row]["searched_value"]))
                result = env.step(output[row]["action"])
                if result.done or row == cut:
                    done.append(row)
                states[row] = env.reset() if row in done else result.obs
            if done:
                self.policy._reset_eval(done)
        return actions, values


def test_a_trained_agent_acts_the_same(fixed_tree: None, seeded_cartpole: dict[str, int]) -> None:
    """Re-based at reading, through windows that slide and episodes that end: the same actions,
    values within 1e-5.
    """
    played = []
    for kind in ("own", "read"):
        with quiet():
            played.append(Player(kind).play(ROUNDS, seeded_cartpole))
    (own_actions, own_values), (read_actions, read_values) = played
    assert len(own_actions) == 8 * ROUNDS
    assert len(set(own_actions)) == 2
    assert own_actions == read_actions
    assert np.abs(np.array(own_values) - np.array(read_values)).max() < 1e-5

"""UniZero policies with collectors of short CartPole episodes, which a seed determines.

Nothing here names other files of the tests: actors do not find these.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import logging
import os
from typing import Any

ENVS = 2
LENGTH = 12  # steps of an episode at most


def make_collector(folder: str) -> tuple[Any, Any]:
    """A policy, and LightZero's collector of whole episodes, which writes its logs there."""
    return _made("MuZeroCollector", folder)


def make_segment_collector(folder: str) -> tuple[Any, Any]:
    """A policy, and LightZero's collector of segments, which stops within episodes."""
    return _made("MuZeroSegmentCollector", folder)


def _made(kind: str, folder: str) -> tuple[Any, Any]:
    logging.disable(logging.INFO)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from functools import partial

        import lzero.worker
        from ding.envs import create_env_manager
        from ding.policy import create_policy
        from lzero.model.unizero_model import UniZeroModel

        config = _config()
        model = UniZeroModel(**config.policy.model)
        policy = create_policy(config.policy, model=model, enable_field=["learn", "collect"])
        env = partial(_env_class(), config.env)
        envs = create_env_manager(config.env.manager, [env] * ENVS)
        collector = getattr(lzero.worker, kind)(
            env=envs,
            policy=policy.collect_mode,
            exp_name=os.path.relpath(folder),
            policy_config=config.policy,
        )
    return policy, collector


def _config() -> Any:
    from ding.config import compile_config
    from zoo.classic_control.cartpole.config.cartpole_unizero_config import (
        create_config,
        main_config,
    )

    main = copy.deepcopy(main_config)
    create = copy.deepcopy(create_config)
    main.policy.update(cuda=False, device="cpu", num_simulations=5, n_episode=ENVS)
    main.policy.update(collector_env_num=ENVS, num_segments=ENVS, game_segment_length=3)
    main.policy.model.world_model_cfg.update(device="cpu", env_num=ENVS)
    create.env_manager.type = "base"
    return compile_config(main, seed=0, env=None, auto=True, create_cfg=create, save_cfg=False)


def _env_class() -> Any:
    from zoo.classic_control.cartpole.envs.cartpole_lightzero_env import CartPoleEnv

    class ShortCartPole(CartPoleEnv):
        """LightZero's CartPole draws from gymnasium, which it never seeds."""

        seeded = False

        def seed(self, seed: int, dynamic_seed: bool = True) -> None:
            super().seed(seed, dynamic_seed)
            self.seeded = True

        def reset(self) -> Any:
            start = super().reset()
            if self.seeded:
                start["observation"], _ = self._env.reset(seed=self._seed)
                self.seeded = False
            return start

        def step(self, action: Any) -> Any:
            result = super().step(action)
            if self._timestep < LENGTH or result.done:
                return result
            result.info["eval_episode_return"] = self._eval_episode_return
            return result._replace(done=True)

    return ShortCartPole


def digest(data: Any) -> str:
    """A hash of what was seen, done, found by searches and got."""
    found = hashlib.sha256()
    for segment in data[0]:
        for name in ("obs", "action", "child_visit", "root_value", "reward"):
            found.update(repr([_plain(x) for x in getattr(segment, f"{name}_segment")]).encode())
    return f"{len(data[0])} segments {found.hexdigest()[:16]}"


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def other_weights(model: Any, factor: float) -> dict[str, Any]:
    """Weights of a model of this kind, none of them 0."""
    import torch

    made = torch.Generator().manual_seed(7)
    return {
        name: value + factor * torch.randn(value.shape, generator=made)
        if value.is_floating_point() and "running_var" not in name
        else value
        for name, value in model.state_dict().items()
    }

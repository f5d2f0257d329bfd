"""An environment of random pictures and short episodes for LightZero."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from ding.envs import BaseEnv, BaseEnvTimestep
from ding.utils import ENV_REGISTRY
from easydict import EasyDict

LENGTH = 40  # steps of an episode
ACTIONS = 6


@ENV_REGISTRY.register("pictures")
class Pictures(BaseEnv):  # type: ignore[misc]
    """Nothing that is done changes what comes."""

    @classmethod
    def default_config(cls) -> Any:
        return EasyDict(stop_value=int(1e6), cfg_type=cls.__name__ + "Dict")

    def __init__(self, cfg: Any) -> None:
        self.observation_space = gymnasium.spaces.Box(0, 1, (3, 64, 64), np.float32)
        self.action_space = gymnasium.spaces.Discrete(ACTIONS)
        self.reward_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
        self._chance = np.random.default_rng(0)
        self._steps = 0

    def seed(self, seed: int, dynamic_seed: bool = True) -> None:
        self._chance = np.random.default_rng(seed)

    def reset(self) -> dict[str, Any]:
        self._steps = 0
        return self._seen()

    def step(self, action: Any) -> Any:
        self._steps += 1
        done = self._steps == LENGTH
        info = {"eval_episode_return": np.array(1.0, np.float32)} if done else {}
        return BaseEnvTimestep(self._seen(), np.array(1.0, np.float32), done, info)

    def close(self) -> None:
        """Nothing is open."""

    def __repr__(self) -> str:
        return "Pictures"

    @staticmethod
    def create_collector_env_cfg(cfg: Any) -> list[Any]:
        return [cfg] * cfg.pop("collector_env_num")

    @staticmethod
    def create_evaluator_env_cfg(cfg: Any) -> list[Any]:
        return [cfg] * cfg.pop("evaluator_env_num")

    def _seen(self) -> dict[str, Any]:
        return {
            "observation": self._chance.random((3, 64, 64), np.float32),
            "action_mask": np.ones(ACTIONS, np.int8),
            "to_play": np.array(-1),
            "timestep": np.array(self._steps),
        }

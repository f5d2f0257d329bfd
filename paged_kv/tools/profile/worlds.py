"""Where the observations come from: the real CartPole, or random frames. Each side plays its own
seeded copy.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from paged_kv.tools.profile.presets import Preset

Observations = npt.NDArray[np.float32]


class World(Protocol):
    """A batch of environments."""

    observations: Observations
    timesteps: list[int]

    def step(self, actions: list[int]) -> list[int]:
        """Advance every environment; returns those whose episode ended and began anew."""


class CartPoles:
    """LightZero's CartPole environments, with the seeding that its own `seed` leaves out."""

    def __init__(self, envs: int, seed: int) -> None:
        from easydict import EasyDict
        from zoo.classic_control.cartpole.envs.cartpole_lightzero_env import CartPoleEnv

        self._envs = [CartPoleEnv(EasyDict(env_id="CartPole-v0")) for _ in range(envs)]
        self._seeds = [np.random.default_rng([seed, i]) for i in range(envs)]
        self.observations = np.zeros((envs, 4), np.float32)
        self.timesteps = [0] * envs
        for i in range(envs):
            self._reset(i)

    def step(self, actions: list[int]) -> list[int]:
        """Advance every environment; returns those whose episode ended and began anew."""
        ended = []
        for i, (env, action) in enumerate(zip(self._envs, actions, strict=True)):
            result = env.step(action)
            self.timesteps[i] += 1
            self.observations[i] = result.obs["observation"]
            if result.done:
                ended.append(i)
                self._reset(i)
        return ended

    def _reset(self, i: int) -> None:
        env: Any = self._envs[i]
        # the inner environment is made by the first reset, which it leaves unseeded
        if not env._init_flag:
            env.reset()
        observation, _ = env._env.reset(seed=int(self._seeds[i].integers(2**31)))
        env._eval_episode_return = 0
        env._timestep = self.timesteps[i] = 0
        self.observations[i] = observation


class RandomFrames:
    """Uniform random observations; the episode never ends."""

    def __init__(self, envs: int, shape: tuple[int, ...], seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._shape = (envs, *shape)
        self.timesteps = [0] * envs
        self.observations = self._frames()

    def step(self, actions: list[int]) -> list[int]:
        """Draw new frames, whatever the actions."""
        self.timesteps = [t + 1 for t in self.timesteps]
        self.observations = self._frames()
        return []

    def _frames(self) -> Observations:
        return self._random.random(self._shape, dtype=np.float32)


IMAGE_SHAPE = (3, 64, 64)
VECTOR_SHAPE = (75,)


def make_world(preset: Preset, envs: int, seed: int) -> World:
    """The environments that a preset plays."""
    if preset.observation == "cartpole":
        return CartPoles(envs, seed)
    return RandomFrames(envs, IMAGE_SHAPE if preset.observation == "image" else VECTOR_SHAPE, seed)

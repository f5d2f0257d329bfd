"""Which row of a batch is which environment: LightZero's policy knows, and tells the world model
here.

A policy is told which environments are ready. LightZero 0.2.0 drops their names: it hands over what
the rows of the call before saw and did, in the order of that call. Here a policy whose model is on
pages with node keys hands over what each environment saw and did last, wherever its row was then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
from lzero.policy.sampled_unizero import SampledUniZeroPolicy
from lzero.policy.unizero import UniZeroPolicy

from paged_kv.integrations.lightzero.shared.hooks import put_around
from paged_kv.integrations.lightzero.shared.wrappers import state_by_node

POLICIES = (UniZeroPolicy, SampledUniZeroPolicy)
# The model that a step runs, and the place of `ready_env_id` among the arguments after the
# observations.
STEPS = {"_forward_collect": ("_collect_model", 4), "_forward_eval": ("_eval_model", 2)}
BEGINS = -1  # LightZero's "action" of an environment that begins an episode


def follow_environments() -> None:
    """Have LightZero's UniZero policies name the environments of every batch to models with node
    keys.
    """
    for policy in POLICIES:
        for name, (model, place) in STEPS.items():
            put_around(policy, name, partial(_following, model=model, place=place))


class LastSteps:
    """What each environment of one policy saw and did last, until the policy is reset."""

    def __init__(self) -> None:
        # environment -> batch it was in, its row, action
        self._known: dict[int, tuple[torch.Tensor, int, Any]] = {}
        self._handed: Any = None  # the observations that the policy holds, unless somebody reset it
        self._envs: list[int] = []

    def hand_over(self, policy: Any, envs: list[int]) -> None:
        """Give the policy the last observation and action of each of `envs`, in this order.

        An environment that was never seen begins an episode; after a reset of the policy all of
        them do.
        """
        if policy.last_batch_obs is not self._handed:
            self._known.clear()
        elif envs != self._envs:
            steps = [self._known.get(env) for env in envs]
            blank = torch.zeros_like(self._handed[0])
            policy.last_batch_obs = torch.stack(
                [blank if step is None else step[0][step[1]] for step in steps]
            )
            policy.last_batch_action = [BEGINS if step is None else step[2] for step in steps]
            self._handed = policy.last_batch_obs
            self._envs = envs

    def note(
        self, policy: Any, envs: list[int], observations: torch.Tensor, actions: Sequence[Any]
    ) -> None:
        """Keep what the environments saw and did. Undoes the reset that LightZero does after a
        short batch.
        """
        for row, (env, action) in enumerate(zip(envs, actions)):
            self._known[env] = observations, row, action
        policy.last_batch_obs = observations
        policy.last_batch_action = list(actions)
        self._handed = observations
        self._envs = envs


def _following(step: Callable[..., Any], model: str, place: int) -> Callable[..., Any]:
    """`step`, for policies whose `model` has node keys with the rows named and in order."""

    @wraps(step)
    def followed(policy: Any, data: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        paged = state_by_node(getattr(policy, model))
        if paged is None:
            return step(policy, data, *arguments, **options)
        ready = arguments[place] if len(arguments) > place else options.get("ready_env_id")
        envs = list(range(len(data))) if ready is None else [int(env) for env in ready]
        last: LastSteps = vars(policy).setdefault("_paged_last_steps", LastSteps())
        last.hand_over(policy, envs)
        paged.environments = envs
        try:
            output = step(policy, data, *arguments, **options)
        finally:
            paged.environments = None
        last.note(policy, envs, data, [output[env]["action"] for env in envs])
        return output

    return followed

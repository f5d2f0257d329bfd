"""LightZero world models of test size, and a tree search that drives them without
LightZero's tree.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """LightZero prints while it builds models and clears caches."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def build_model(
    *,
    rotary: bool,
    context: int = 8,
    envs: int = 4,
    layers: int = 2,
    heads: int = 2,
    embed: int = 32,
    seed: int = 0,
) -> Any:
    """A UniZeroModel for vectors of 4 numbers and 2 actions, random in all its weights, in eval
    mode.
    """
    with quiet():
        from easydict import EasyDict
        from lzero.model.unizero_model import UniZeroModel
        from lzero.policy.unizero import UniZeroPolicy

        config = EasyDict(copy.deepcopy(UniZeroPolicy.config["model"]["world_model_cfg"]))
        config.update(
            context_length=context,
            max_blocks=max(10, context),
            max_tokens=2 * max(10, context),
            num_layers=layers,
            num_heads=heads,
            embed_dim=embed,
            env_num=envs,
            action_space_size=2,
            obs_type="vector",
            rotary_emb=rotary,
            device="cpu",
            max_seq_len=256,
        )
        torch.manual_seed(seed)
        model = UniZeroModel(
            observation_shape=4, action_space_size=2, norm_type="BN", world_model_cfg=config
        )
        with torch.no_grad():
            # zero last layers would give every latent state one key
            for weights in model.parameters():
                if not weights.abs().any():
                    weights.normal_(0, 0.3)
        if not rotary:
            model.world_model.precompute_pos_emb_diff_kv()
    return model.eval()


class Searcher:
    """Plays root steps with one model, and notes everything the model answers."""

    def __init__(self, model: Any, envs: int = 4, seed: int = 0) -> None:
        self.model = model
        self.envs = envs
        self.random = np.random.default_rng(seed)
        self.answers: list[torch.Tensor] = []
        self.reset()

    @property
    def wm(self) -> Any:
        return self.model.world_model

    def reset(self) -> None:
        """Begin new episodes in all environments, as the policy does when one of them ends."""
        self.observations = torch.zeros(self.envs, 4)
        self.actions = [-1] * self.envs
        self.time = 0

    def root(self, ready: int | None = None) -> np.ndarray[Any, Any]:
        """The next root of every environment; latent states [ready, 1, embed]."""
        ready = self.envs if ready is None else ready
        now = torch.from_numpy(self.random.normal(size=(ready, 4)).astype(np.float32))
        times = [np.array(self.time)] * self.envs
        answer = self.model.initial_inference(
            self.observations, self.actions, now, times[: max(ready, 1)]
        )
        self._note(answer)
        self.observations = now
        self.time = self.time + 1
        self.actions = [int(a) for a in self.random.integers(2, size=ready)]
        return answer.latent_state.numpy()

    def search(self, simulations: int, ready: int | None = None) -> None:
        """A root and `simulations` nodes below it, each under a random earlier one."""
        roots = self.root(ready)
        nodes = [[(latent, 0)] for latent in roots]
        times = [np.array(self.time - 1)] * len(nodes)
        paged = getattr(self.wm, "paged", None)
        for simulation in range(simulations):
            places = [int(self.random.integers(len(tree))) for tree in nodes]
            # as LightZero's search does once a model is attached
            if paged is not None and paged.keys == "node":
                paged.nodes.choose(places, range(len(nodes)))
            chosen = [tree[place] for tree, place in zip(nodes, places)]
            latents = np.asarray([latent for latent, _ in chosen])
            actions = torch.from_numpy(self.random.integers(2, size=len(nodes)))
            depths = [depth + 1 for _, depth in chosen]
            answer = self.model.recurrent_inference([(latents, actions)], simulation, depths, times)
            self._note(answer)
            for tree, latent, depth in zip(nodes, answer.latent_state.numpy(), depths):
                tree.append((latent.copy(), depth))

    def _note(self, answer: Any) -> None:
        parts = [answer.latent_state, answer.policy_logits, answer.value]
        if isinstance(answer.reward, torch.Tensor):
            parts.append(answer.reward)
        self.answers += [part.clone() for part in parts]


def same(one: Searcher, other: Searcher) -> bool:
    """Every answer equal bit for bit."""
    return len(one.answers) == len(other.answers) and all(
        map(torch.equal, one.answers, other.answers)
    )


def difference(one: Searcher, other: Searcher) -> float:
    """The largest difference between answers."""
    assert len(one.answers) == len(other.answers)
    return max(float((a - b).abs().max()) for a, b in zip(one.answers, other.answers))


def play(searcher: Searcher, seed: int = 3) -> Searcher:
    """Episodes that fill the windows, end and begin anew, with partial batches."""
    random = np.random.default_rng(seed)
    for step in range(9):
        searcher.search(4, ready=None if step < 6 else int(random.integers(1, searcher.envs + 1)))
        if step == 4:
            searcher.reset()
    return searcher

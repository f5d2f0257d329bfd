"""World models of LightZero 0.2.0 with random weights, and root steps of one on pages: what
window_exactness.py compares and times.
"""

from __future__ import annotations

import contextlib
import io
import json
from typing import Any

import numpy as np
import torch
from easydict import EasyDict
from lzero.model.unizero_model import UniZeroModel
from lzero.policy.unizero import UniZeroPolicy

ENVS = 8
LAYERS = 2
HEADS = 2
EMBED = 32


def build_model(rotary: bool, context: int, slides: int, seed: int) -> Any:
    """A UniZeroModel for vectors of 4 numbers and 2 actions, with no weights left at zero."""
    config = EasyDict(json.loads(json.dumps(UniZeroPolicy.config["model"]["world_model_cfg"])))
    blocks = max(10, context)
    config.update(
        context_length=context,
        max_blocks=blocks,
        max_tokens=2 * blocks,
        num_layers=LAYERS,
        num_heads=HEADS,
        embed_dim=EMBED,
        env_num=ENVS,
        action_space_size=2,
        obs_type="vector",
        rotary_emb=rotary,
        device="cpu",
        max_seq_len=2 * (slides + context),  # beyond it rotations would start over
    )
    torch.manual_seed(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        model = UniZeroModel(
            observation_shape=4, action_space_size=2, norm_type="BN", world_model_cfg=config
        )
    with torch.no_grad():
        for weights in model.parameters():
            if not weights.abs().any():
                weights.normal_(0, 0.3)
    if not rotary:
        model.world_model.precompute_pos_emb_diff_kv()
    return model.eval()


class Play:
    """Root steps of one attached model, and the embeddings of all tokens it was given."""

    def __init__(self, model: Any, seed: int) -> None:
        self.model = model
        self.wm = model.world_model
        self.random = np.random.default_rng(seed)
        self.seen = torch.zeros(ENVS, 4)
        self.actions = [-1] * ENVS
        self.time = -1
        # [B, 1, E] each: observation, action, observation, ...
        self.tokens: list[torch.Tensor] = []
        self.slides = 0

    def step(self) -> None:
        """The next root of every environment."""
        self.time += 1
        now = torch.from_numpy(self.random.normal(size=(ENVS, 4)).astype(np.float32))
        if self.time:
            self.tokens.append(self.wm.act_embedding_table(torch.tensor(self.actions)[:, None]))
        answer = self.model.initial_inference(
            self.seen, self.actions, now, [np.array(self.time)] * ENVS
        )
        self.tokens.append(answer.latent_state)
        self.slides += len(self.tokens) >= self.wm.context_length - 1
        self.seen = now
        self.actions = [int(action) for action in self.random.integers(2, size=ENVS)]

    def cached(self) -> Any:
        """The root windows, as the next step gathers them."""
        return self.wm.paged.open_sequences(self.wm, self.roots())

    def roots(self) -> list[int]:
        """The stored windows."""
        return [pool.handles()[0] for pool in self.wm.paged.manager.init_pools]

    def exact(self, size: int, first: int) -> Any:
        """The newest `size` tokens in one forward pass, with nothing before them; rotary positions
        from `first` on.
        """
        wm = self.wm
        window = torch.cat(self.tokens[-size:], dim=1)
        empty = wm.transformer.generate_empty_keys_values(ENVS, wm.context_length)
        if wm.config.rotary_emb:
            wm.transformer(window, empty, start_pos=first)
        else:
            wm.transformer(window + wm.pos_emb(torch.arange(size)), empty)
        return empty

    def outputs(self, window: Any) -> dict[str, torch.Tensor]:
        """What the model says of an action after a window, and of the latent state that follows."""
        place: dict[str, Any] = {
            "past_keys_values": window,
            "start_pos": [np.array(self.time + 1)] * ENVS,
        }
        action = torch.tensor(self.actions)[:, None]
        latent = self.wm.forward({"act_tokens": action}, **place).logits_observations
        after = self.wm.forward({"obs_embeddings": latent}, **place)
        return {"next latent": latent, "policy": after.logits_policy, "value": after.logits_value}

"""The short step of roots, as LightZero 0.2.0 hands its answers on."""

from __future__ import annotations

from typing import Any

import torch
from lzero.model.unizero_world_models.utils import WorldModelOutput

from paged_kv.integrations.lightzero.shared.lean.running import Lean


def root_outputs(
    lean: Lean, model: Any, action: torch.Tensor | None, latent: torch.Tensor, times: Any
) -> WorldModelOutput:
    """The model's answer for roots that end with `latent`, after an action or as first ones.

    LightZero's heads say nothing of rewards and next states at an observation: none here.
    """
    last, value, policy = lean.root(model, model.keys_values_wm, action, latent, times)
    rows = len(latent)
    return WorldModelOutput(
        output_sequence=last.unsqueeze(1),
        logits_observations=latent.new_empty((rows, 0, model.embed_dim)),
        logits_rewards=latent.new_empty((rows, 0, model.support_size)),
        logits_ends=None,
        logits_policy=policy.unsqueeze(1),
        logits_value=value.unsqueeze(1),
    )

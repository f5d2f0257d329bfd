"""What a world model is made of, or the reason why its step has to stay LightZero's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lzero.model.common import SimNorm
from lzero.model.unizero_world_models.slicer import Head, PolicyHeadCont
from lzero.model.unizero_world_models.transformer import Block, SelfAttention, Transformer
from torch import nn
from torch.nn.modules import module as global_hooks

from paged_kv.integrations.lightzero.shared.attention import MaskedAttention
from paged_kv.integrations.lightzero.shared.lean.anatomy import (
    GLOBAL_HOOKS,
    HOOKS,
    METHODS,
    working_parts,
)
from paged_kv.integrations.lightzero.shared.lean.layers import (
    Both,
    Chain,
    Follows,
    Forked,
    Gelu,
    Joint,
    Multiply,
    Norm,
    Simplex,
    Single,
    Table,
    plain,
)

LAYERS: dict[type, type] = {
    nn.LayerNorm: Norm,
    nn.GELU: Gelu,
    SimNorm: Simplex,
}
KNOWN = {
    *LAYERS,
    nn.Linear,
    Transformer,
    Block,
    SelfAttention,
    MaskedAttention,
    Head,
    PolicyHeadCont,
    nn.Sequential,
    nn.ModuleList,
    nn.Dropout,
    nn.Embedding,
}


class NotLean(Exception):
    """Why a step stays LightZero's own."""


class Layers(NamedTuple):
    """One block of the transformer."""

    before: Norm
    project: Joint  # queries, keys and values side by side
    mix: Single
    between: Norm
    widen: Single
    activate: Gelu
    narrow: Single


class Parts(NamedTuple):
    """A world model as its step needs it."""

    blocks: list[Layers]
    after: Norm
    actions: Follows
    latent_and_reward: Forked | Both
    value_and_policy: Forked | Both
    positions: nn.Embedding | None  # None with rotary ones
    heads: int
    masked: bool  # whether attention is LightZero 0.2.0's with a mask of padding

    def forget(self) -> None:
        """Weights may have changed without a trace."""
        for block in self.blocks:
            block.project.forget()
        self.latent_and_reward.forget()
        self.value_and_policy.forget()

    def follow(self) -> None:
        """Go by the weights that the modules have now."""
        for block in self.blocks:
            for layer in block:
                layer.follow()
        self.after.follow()
        self.actions.follow()
        self.latent_and_reward.follow()
        self.value_and_policy.follow()


class Own:
    """A policy of continuous actions as LightZero's head makes it: means, then deviations."""

    __slots__ = ("_module",)

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def follow(self) -> None:
        """The module reads its weights itself."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Rows [B, inputs] as [B, 2 * actions]."""
        made = self._module(x)
        return torch.cat([made["mu"], made["sigma"]], dim=-1)


def read(model: Any, multiply: Multiply = plain) -> Parts:
    """The parts of a world model, whose linear layers `multiply` computes. Raises NotLean."""
    refuse_unknown(model)
    config = model.config
    continuous = bool(model.continuous_action_space)
    heads = [model.head_observations, model.head_rewards, model.head_value]
    latent, reward, value = (list(head.head_module) for head in heads)
    if [reward[-1].out_features] != [value[-1].out_features]:
        raise NotLean("values and rewards have supports of different sizes")
    policy = model.head_policy.head_module
    if continuous:
        value_and_policy: Forked | Both = Both(_chain(value, multiply), Own(policy))
    else:
        value_and_policy = _fork(value, list(policy), multiply)
    table = model.act_embedding_table
    return Parts(
        blocks=[_block(block, multiply) for block in model.transformer.blocks],
        after=Norm(model.transformer.ln_f),
        actions=_chain(list(table), multiply) if continuous else Table(table),
        latent_and_reward=_fork(latent, reward, multiply),
        value_and_policy=value_and_policy,
        positions=None if config.rotary_emb else model.pos_emb,
        heads=model.num_heads,
        masked=type(model.transformer.blocks[0].attn) is MaskedAttention,
    )


def refuse_unknown(model: Any) -> None:
    """Raise NotLean where a step of this model does anything that the short one does not.

    What it looks at is part of an `Anatomy`.
    """
    transformer = model.transformer
    _refuse_patches(model)
    if model.num_observations_tokens != 1:
        raise NotLean(f"an observation is {model.num_observations_tokens} tokens, and not one")
    if getattr(model, "use_policy_logits_clip", False):
        raise NotLean("the policy's logits are clipped (use_policy_logits_clip)")
    if getattr(transformer, "use_register_token", False):
        raise NotLean("the transformer has register tokens")
    if getattr(model, "rebuild_kv_window_from_tokens", False):
        raise NotLean("its own step collects the tokens that full windows are rebuilt from")
    for name, part in working_parts(model):
        _refuse_part(name, part)
        if part.training and not model.training and isinstance(part, nn.Dropout) and part.p:
            raise NotLean(f"{name} is active, though the model is not in training mode")
    for block in transformer.blocks:
        if block.gru_gating:
            raise NotLean("its blocks are gated (gru_gating)")
        _refuse_feed_forward(feed_forward(block))


def feed_forward(block: Any) -> Any:
    """The layers after the attention of a block, under the name of either version."""
    return block.mlp if hasattr(block, "mlp") else block.feed_forward


def _refuse_patches(model: Any) -> None:
    for name in METHODS:
        if name in vars(model):
            raise NotLean(f"the world model has a {name} of its own")
    for name in GLOBAL_HOOKS:
        if getattr(global_hooks, name):
            raise NotLean("there is a hook on all modules")


def _refuse_part(name: str, part: nn.Module) -> None:
    inside_policy = name.startswith("head_policy.head_module")
    if type(part) not in KNOWN and not inside_policy:
        raise NotLean(f"{name} is a {type(part).__name__}")
    if "forward" in vars(part):
        raise NotLean(f"{name} has a forward of its own")
    if any(vars(part)[hooks] for hooks in HOOKS):
        raise NotLean(f"{name} has a hook")
    if isinstance(part, nn.Embedding) and part.max_norm is not None:
        raise NotLean(f"{name} renormalises its rows (max_norm)")


def _refuse_feed_forward(layers: Any) -> None:
    kinds = [type(layer) for layer in layers]
    if kinds != [nn.Linear, nn.GELU, nn.Linear, nn.Dropout]:
        found = ", ".join(kind.__name__ for kind in kinds)
        raise NotLean(f"a feed-forward block is {found}")


def _block(block: Any, multiply: Multiply) -> Layers:
    attention = block.attn
    inputs = [attention.query, attention.key, attention.value]
    if len({layer.bias is None for layer in inputs}) > 1:
        raise NotLean("of queries, keys and values some have a bias, and some have none")
    wide, activation, narrow, _ = feed_forward(block)
    return Layers(
        before=Norm(block.ln1),
        project=Joint(inputs, multiply, groups=attention.num_heads),
        mix=Single(attention.proj, multiply),
        between=Norm(block.ln2),
        widen=Single(wide, multiply),
        activate=Gelu(activation),
        narrow=Single(narrow, multiply),
    )


def _chain(modules: Sequence[Any], multiply: Multiply) -> Chain:
    layers: list[Follows] = []
    for module in modules:
        kind = type(module)
        if kind is nn.Linear:
            layers.append(Single(module, multiply))
        elif kind in LAYERS:
            layers.append(LAYERS[kind](module))
        else:
            raise NotLean(f"a head has a {kind.__name__}")
    return Chain(layers)


def _fork(first: Sequence[Any], second: Sequence[Any], multiply: Multiply) -> Forked | Both:
    """Two heads; their first layers are one where both are a linear layer and a GELU."""
    starts = [first[0], second[0]]
    alike = [[type(layer) for layer in head[:2]] for head in (first, second)]
    joint = (
        alike == [[nn.Linear, nn.GELU]] * 2
        and first[1].approximate == second[1].approximate
        and (starts[0].bias is None) == (starts[1].bias is None)
    )
    if not joint:
        return Both(_chain(first, multiply), _chain(second, multiply))
    return Forked(
        Joint(starts, multiply),
        [start.out_features for start in starts],
        Gelu(first[1]),
        _chain(first[2:], multiply),
        _chain(second[2:], multiply),
    )

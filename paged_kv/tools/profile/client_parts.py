"""What of LightZero's UniZero belongs to which part of a search."""

from __future__ import annotations

from typing import Any

from paged_kv.tools.profile.counters import HEADS, MODEL, REST, TRANSFORMS, TREE, Probe


def parts(world_model: Any, policy: Any, *, paged: bool) -> list[Probe]:
    """The methods that are work of the model, its heads, its transforms or the tree."""
    from lzero.mcts.ctree.ctree_muzero import mz_tree

    wm = world_model
    heads = {type(head) for head in (wm.head_policy, wm.head_value, wm.head_rewards)}
    found = [
        # classes: a short step is not taken where a module has a `forward` of its own
        Probe(type(wm), "forward", REST),  # around the blocks and the heads
        Probe(type(wm.tokenizer.encoder), "forward", MODEL),
        Probe(type(wm.transformer), "forward", MODEL),
        *(Probe(head, "forward", HEADS) for head in heads),
        Probe(type(policy.inverse_scalar_transform_handle), "__call__", TRANSFORMS),
        Probe(mz_tree, "batch_traverse", TREE),
        Probe(mz_tree, "batch_backpropagate", TREE),
    ]
    return found + _lean_parts(wm.paged.choices.compile) if paged else found


def _lean_parts(compiled: bool) -> list[Probe]:
    """The same of steps that are one short function. Compiled it is one part: what is wrapped
    inside it would be compiled again.
    """
    from paged_kv.integrations.lightzero.shared.lean import layers, running, transforms
    from paged_kv.integrations.lightzero.shared.lean.compiled import Compiled

    transform = Probe(transforms.OneTransform, "__call__", TRANSFORMS)
    if compiled:
        return [Probe(Compiled, "run", MODEL), transform]
    return [
        Probe(running, "token", MODEL),
        Probe(layers.Forked, "__call__", HEADS),
        Probe(layers.Both, "__call__", HEADS),
        transform,
    ]

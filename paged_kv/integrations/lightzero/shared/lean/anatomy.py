"""Which modules a step of a world model runs through, and whether they are still what they were."""

from __future__ import annotations

from collections.abc import Iterator
from operator import is_
from typing import Any

from torch import nn
from torch.nn.modules import module as global_hooks

# What says that a step is not LightZero's own, or may do more than the short one.
METHODS = ("forward", "_transformer_pass", "_add_position_embeddings")
CHOICES = ("num_observations_tokens", "use_policy_logits_clip", "rebuild_kv_window_from_tokens")
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


class Anatomy:
    """The modules of a step and how they are set, as they were when this was made: all that says
    whether the short step does as they do.

    Numbers in weights are not looked at, only which modules have which: steps read weights
    themselves. Nor are modes, but that of a part which trains alone. Costs a microsecond for each
    module.
    """

    __slots__ = ("_seen",)

    def __init__(self, model: Any) -> None:
        self._seen = _seen(model)

    def matches(self, model: Any) -> bool:
        """Whether the model is made of the same modules, set in the same way."""
        now = _seen(model)
        return len(now) == len(self._seen) and all(map(is_, now, self._seen))


def working_parts(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a step runs through, by name."""
    for name in _names(model):
        for inner, part in getattr(model, name).named_modules():
            yield f"{name}.{inner}".rstrip("."), part


def _names(model: Any) -> list[str]:
    names = ["transformer", "act_embedding_table", "head_observations", "head_rewards"]
    names += ["head_value", "head_policy"]
    if not model.config.rotary_emb:
        names.append("pos_emb")
    return names


def _seen(model: Any) -> list[object]:
    """All objects that make the model what it is. Kept, so that none of them can be taken for a
    later one. It walks by itself, since it comes before every search, and torch's walk is slow.
    """
    own = vars(model)
    found: list[object] = [own.get(name) for name in (*METHODS, *CHOICES)]
    found += [bool(getattr(global_hooks, name)) for name in GLOBAL_HOOKS]
    waiting: list[Any] = [getattr(model, name) for name in _names(model)]
    while waiting:
        part = waiting.pop()
        if part is None:
            continue
        settings = vars(part).copy()
        trains = settings.pop("training")
        found += (part, type(part), trains and not model.training)
        found += settings.values()
        found += [bool(settings[hooks]) for hooks in HOOKS]
        parameters = settings["_parameters"]
        if parameters:
            found += [parameter is None for parameter in parameters.values()]
        waiting += settings["_modules"].values()
    return found

"""Which modules a step of a world model runs through, and whether they are still what they were."""

from __future__ import annotations

from collections.abc import Iterator
from operator import is_
from typing import Any

from torch import nn


class Anatomy:
    """The modules of a step and how they are set, as they were when this was made.

    Numbers in weights are not looked at, only which modules have which: steps read weights
    themselves. Nor are modes looked at. Costs some microseconds for each module.
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
    names = ["transformer", "act_embedding_table", "head_observations", "head_rewards"]
    names += ["head_value", "head_policy"]
    if not model.config.rotary_emb:
        names.append("pos_emb")
    for name in names:
        for inner, part in getattr(model, name).named_modules():
            yield f"{name}.{inner}".rstrip("."), part


def _seen(model: Any) -> list[object]:
    """All objects that make the model what it is. Kept, so that none of them can be taken for a
    later one.
    """
    found: list[object] = []
    for _, part in working_parts(model):
        found.append(part)
        found += [setting for name, setting in vars(part).items() if name != "training"]
        found += [parameter is None for parameter in part._parameters.values()]
    return found

"""The layers of a world model as plain functions that read the weights which their modules have
now.

Calling a module costs more than what it does where rows are few. These keep the modules' own tables
of parameters, so a weight that was replaced, moved or trained is the one that is read next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.functional import gelu, linear

# The product of rows with a weight: weight [M, N], bias [M] or None, x [B, N] as [B, M].
Multiply = Callable[[Any, Any, torch.Tensor], torch.Tensor]


def plain(weight: Any, bias: Any, x: torch.Tensor) -> torch.Tensor:
    """torch's own product."""
    return linear(x, weight, bias)


class Follows(Protocol):
    """What looks at its modules before a step."""

    def follow(self) -> None:
        """Go by the weights that the modules have now."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The output for rows [B, inputs]."""


class Single:
    """One linear layer."""

    __slots__ = ("_multiply", "_own", "bias", "weight")

    def __init__(self, module: nn.Linear, multiply: Multiply = plain) -> None:
        self._multiply = multiply
        self._own = module._parameters
        self.follow()

    def follow(self) -> None:
        """Go by the weights that the module has now."""
        own = self._own
        self.weight: Any = own["weight"]
        self.bias = own["bias"]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Rows [B, inputs] as [B, outputs]."""
        return self._multiply(self.weight, self.bias, x)


class Joint:
    """Linear layers of one input as one, whose outputs stand side by side, in `groups` alternating
    parts of each.

    It has a copy of their weights, made again when one of them was written to or replaced: a third
    of the calls where queries, keys and values are made, and one wide product in place of three
    narrow ones.
    """

    __slots__ = ("_groups", "_made_of", "_multiply", "_own", "bias", "weight")

    def __init__(
        self, modules: Sequence[nn.Linear], multiply: Multiply = plain, groups: int = 1
    ) -> None:
        self._multiply = multiply
        self._groups = groups
        self._own = [module._parameters for module in modules]
        self._made_of: list[Look] = []
        self.weight: Any = None
        self.bias: Any = None
        self.follow()

    def forget(self) -> None:
        """Copy the weights at the next look: they may have changed without a trace."""
        self._made_of = []

    def follow(self) -> None:
        """Go by the weights that the modules have now."""
        tensors: list[Any] = [own[name] for own in self._own for name in ("weight", "bias")]
        seen = [look(tensor) for tensor in tensors]
        if all(map(same, seen, self._made_of)) and self._made_of:
            return
        self.weight = self._side_by_side(tensors[0::2])
        self.bias = None if tensors[1] is None else self._side_by_side(tensors[1::2])
        self._made_of = seen

    def _side_by_side(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        split = [tensor.detach().reshape(self._groups, -1, *tensor.shape[1:]) for tensor in tensors]
        return torch.cat(split, dim=1).flatten(0, 1)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Rows [B, inputs] as [B, sum of outputs]."""
        return self._multiply(self.weight, self.bias, x)


class Table:
    """An embedding of whole numbers."""

    __slots__ = ("_own", "weight")

    def __init__(self, module: nn.Embedding) -> None:
        self._own = module._parameters
        self.follow()

    def follow(self) -> None:
        """Go by the weights that the module has now."""
        self.weight: Any = self._own["weight"]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of the table at the numbers [B]."""
        return torch.embedding(self.weight, x)


class Norm:
    """A layer norm."""

    __slots__ = ("_eps", "_own", "_shape", "bias", "weight")

    def __init__(self, module: nn.LayerNorm) -> None:
        self._own = module._parameters
        self._shape = tuple(module.normalized_shape)
        self._eps = module.eps
        self.follow()

    def follow(self) -> None:
        """Go by the weights that the module has now."""
        own = self._own
        self.weight: Any = own["weight"]
        self.bias = own["bias"]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Rows [B, n], normalised."""
        return torch.layer_norm(x, self._shape, self.weight, self.bias, self._eps)


class Gelu:
    """GELU, exact or by tanh."""

    __slots__ = ("approximate",)

    def __init__(self, module: nn.GELU) -> None:
        self.approximate = module.approximate

    def follow(self) -> None:
        """It has no weights."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The same of each number."""
        return gelu(x, approximate=self.approximate)


class Simplex:
    """LightZero's SimNorm: a softmax over each group of features."""

    __slots__ = ("_group",)

    def __init__(self, module: Any) -> None:
        self._group = module.dim

    def follow(self) -> None:
        """It has no weights."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Rows [B, n], normalised by groups."""
        return torch.softmax(x.view(x.shape[0], -1, self._group), -1).view(x.shape)


class Forked:
    """Two heads on one input, whose first layers are one; the activation comes next."""

    __slots__ = ("_activation", "_first", "_second", "_sizes", "_start")

    def __init__(
        self, start: Joint, sizes: list[int], activation: Gelu, first: Chain, second: Chain
    ) -> None:
        self._start = start
        self._sizes = sizes
        self._activation = activation
        self._first = first
        self._second = second

    def follow(self) -> None:
        """Go by the weights that the modules have now."""
        for layer in (self._start, self._first, self._second):
            layer.follow()

    def forget(self) -> None:
        """Copy the weights at the next look: they may have changed without a trace."""
        self._start.forget()

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs of both for rows [B, inputs]."""
        first, second = self._activation(self._start(x)).split_with_sizes(self._sizes, -1)
        return self._first(first), self._second(second)


class Both:
    """Two heads on one input."""

    __slots__ = ("_first", "_second")

    def __init__(self, first: Follows, second: Follows) -> None:
        self._first = first
        self._second = second

    def follow(self) -> None:
        """Go by the weights that the modules have now."""
        self._first.follow()
        self._second.follow()

    def forget(self) -> None:
        """Nothing is copied."""

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs of both for rows [B, inputs]."""
        return self._first(x), self._second(x)


class Chain:
    """Layers one after another."""

    __slots__ = ("_layers",)

    def __init__(self, layers: Sequence[Follows]) -> None:
        self._layers = list(layers)

    def follow(self) -> None:
        """Go by the weights that the modules have now."""
        for layer in self._layers:
            layer.follow()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Rows [B, inputs] through all of them."""
        for layer in self._layers:
            x = layer(x)
        return x


Look = tuple[Any, int, int]  # a weight, how often it was written in place, and where it lies


def look(weight: Any) -> Look:
    """What tells whether a weight is what it was; -1 writes of one made in inference mode, which
    keeps no count.
    """
    if weight is None:
        return None, 0, 0
    return weight, -1 if weight.is_inference() else weight._version, weight.data_ptr()


def same(now: Look, before: Look) -> bool:
    """Whether a weight was neither written nor replaced in between, as far as can be seen."""
    return now[0] is before[0] and now[1] == before[1] >= 0 and now[2] == before[2]

"""Whether a model still has the weights that it computed with: told without reading them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from itertools import chain
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

# What switches the adapters of a layer, under the names of peft.
_SWITCHES = ("active_adapters", "disable_adapters", "merged_adapters")
_NO_VERSION = -1  # of tensors that were made in inference mode


class _Steps:
    """Steps of all optimizers: `total`, and those that changed each parameter.

    Fused optimizers, and those that write through `.data`, leave the version of a parameter alone.
    """

    def __init__(self) -> None:
        self.total = 0
        self._by_parameter: Any = WeakIdKeyDictionary()

    def count(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """One more step of an optimizer."""
        steps = self._by_parameter
        self.total += 1
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    steps[parameter] = steps.get(parameter, 0) + 1

    def of(self, parameter: torch.Tensor) -> int:
        """Those that changed a parameter."""
        return int(self._by_parameter.get(parameter, 0))

    def of_each(self, module: torch.nn.Module) -> list[int]:
        """Those that changed each parameter of a module."""
        return [self.of(parameter) for parameter in module.parameters()]


_steps = _Steps()
register_optimizer_step_post_hook(_steps.count)


class StepsSeen:
    """How many steps of optimizers had changed a parameter when this was made."""

    __slots__ = ("_steps", "_total")

    def __init__(self, parameter: torch.Tensor) -> None:
        self._total = _steps.total
        self._steps = _steps.of(parameter)

    def match(self, parameter: torch.Tensor) -> bool:
        """Whether none changed it since. 0.1 us as long as no optimizer made a step."""
        total = _steps.total
        if total != self._total and self._steps == _steps.of(parameter):
            self._total = total  # they changed others
        return total == self._total


class WeightStamp:
    """What a module computes with: its weights, in which mode, with which adapters.

    Of every parameter and buffer it notes the version, the steps of optimizers and the storage; of
    every module whether it trains, and its adapters (`active_adapters`, `disable_adapters`,
    `merged_adapters`, where it has them). Weights are neither read nor kept alive. What writes
    through `.data`, through a detached alias or by a kernel of its own leaves no trace, unless an
    optimizer does it; nor does what is written to tensors that were made in inference mode.

    Cost: about a microsecond for each module and each tensor.

    >>> import torch
    >>> layer = torch.nn.Linear(2, 2)
    >>> stamp = WeightStamp(layer)
    >>> stamp.matches(layer)
    True
    >>> layer.load_state_dict(layer.state_dict())
    <All keys matched successfully>
    >>> stamp.matches(layer)
    False
    """

    __slots__ = ("_seen", "_steps", "_steps_seen", "_storages")

    def __init__(self, module: torch.nn.Module) -> None:
        self._seen = _seen(module)
        self._steps = _steps.of_each(module)
        self._steps_seen = _steps.total
        # An address tells nothing once its storage is gone: another one may lie there by now.
        self._storages = [
            StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            for tensor in chain(module.parameters(), module.buffers())
        ]

    def matches(self, module: torch.nn.Module) -> bool:
        """Whether the module computes as it did when the stamp was made, as far as can be seen."""
        return (
            self._seen == _seen(module)
            and not any(storage.expired() for storage in self._storages)  # type: ignore[no-untyped-call]
            and self._steps_match(module)
        )

    def _steps_match(self, module: torch.nn.Module) -> bool:
        """Whether no optimizer changed a parameter; looks at them only where one made a step."""
        total = _steps.total
        if total != self._steps_seen and self._steps == _steps.of_each(module):
            self._steps_seen = total  # they changed others
        return total == self._steps_seen


def digest(module: torch.nn.Module) -> str:
    """What a module computes with, as text: equal in every process that has the same weights.

    It covers names, kinds and bytes of all parameters and buffers, and adapters. Cost: all weights
    are read, about a second for each gigabyte.

    >>> layer = torch.nn.Linear(2, 2)
    >>> digest(layer) == digest(layer), digest(layer) == digest(torch.nn.Linear(2, 2))
    (True, False)
    """
    found = sha256()
    for name, part in module.named_modules():
        for switch in _SWITCHES:
            value = getattr(part, switch, None)
            if value is not None and not callable(value):
                found.update(f"{name}.{switch}={value!r};".encode())
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        found.update(f"{name}:{tensor.dtype}{list(tensor.shape)};".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _seen(module: torch.nn.Module) -> list[object]:
    """All that can be seen of a module and its parts without reading weights: whether each trains,
    its adapters, and the version and address of each tensor.

    It walks by itself: the walks of torch take four times as long.
    """
    found: list[object] = []
    waiting: list[torch.nn.Module | None] = [module]
    while waiting:
        part = waiting.pop()
        if part is None:
            continue
        own = part.__dict__
        found.append(part.training)
        names = _properties(type(part))  # type: ignore[arg-type]  # hashable it is
        if not own.keys().isdisjoint(_SWITCHES):
            names = [*names, *(name for name in _SWITCHES if name in own)]
        for name in names:
            found.append(repr(getattr(part, name)))
        for tensor in chain(part._parameters.values(), part._buffers.values()):
            if tensor is not None:
                found.append(_version(tensor))
                found.append(tensor.data_ptr())
        waiting += part._modules.values()
    return found


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor was written in place."""
    try:
        return tensor._version
    except RuntimeError:  # made in inference mode
        return _NO_VERSION


@cache
def _properties(kind: type) -> Sequence[str]:
    """The switches that a class has as properties; a method of such a name tells nothing."""
    return [name for name in _SWITCHES if isinstance(getattr(kind, name, None), property)]

"""What a stamp of weights sees, and what it does not."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from paged_kv.weights import WeightStamp


class Adapted(nn.Linear):
    """A layer with adapters, in the manner of peft."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self._active = ["first"]
        self.merged_adapters: list[str] = []

    @property
    def active_adapters(self) -> list[str]:
        return self._active

    def disable_adapters(self) -> None:
        """A method of this name, as some classes have, says nothing."""
        raise AssertionError


def build() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Adapted(), nn.Dropout(0.5)).eval()


class DataWriter(torch.optim.Optimizer):
    """An optimizer that writes through `.data`, as many did."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(parameter.grad.data)


def step(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[Any], None]:
    def learn(model: nn.Module) -> None:
        optimizer = kind(model.parameters(), **options)
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()

    return learn


@torch.no_grad()
def in_place(model: Any) -> None:
    model[0].weight[1].add_(1)


def replaced(model: Any) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def other_storage(model: Any) -> None:
    model[2].bias.data = model[2].bias.data * 0.5


def assigned(model: nn.Module) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def batch_statistics(model: Any) -> None:
    model[1].train()
    model(torch.randn(3, 4))
    model[1].eval()


def is_fused_anywhere() -> bool:
    """Whether this torch has fused optimizers beyond CUDA."""
    try:
        torch.optim.AdamW([torch.zeros(1, requires_grad=True)], fused=True)
    except RuntimeError:
        return False
    return True


CHANGES: dict[str, Callable[[Any], Any]] = {
    "load_state_dict": lambda model: model.load_state_dict(build().state_dict()),
    "load_state_dict, assigned": assigned,
    "SGD": step(torch.optim.SGD, lr=0.1),
    "AdamW": step(torch.optim.AdamW),
    "AdamW, one by one": step(torch.optim.AdamW, foreach=False),
    **({"AdamW, fused": step(torch.optim.AdamW, fused=True)} if is_fused_anywhere() else {}),
    "an optimizer that writes data": step(DataWriter, defaults={}),
    "in place": in_place,
    "another parameter": replaced,
    "another storage": other_storage,
    "another dtype": lambda model: model.double(),
    "batch statistics": batch_statistics,
    "training": lambda model: model.train(),
    "one module is training": lambda model: model[3].train(),
    "another adapter": lambda model: model[2].active_adapters.append("second"),
    "a merged adapter": lambda model: model[2].merged_adapters.append("first"),
    "another module": lambda model: model.append(nn.Linear(4, 4)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_is_seen(change: Callable[[Any], Any]) -> None:
    model = build()
    stamp = WeightStamp(model)
    assert stamp.matches(model)
    change(model)
    assert not stamp.matches(model)
    assert WeightStamp(model).matches(model)


def test_what_changes_nothing_is_no_change() -> None:
    model = build()
    other = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stamp = WeightStamp(model)
    model(torch.ones(2, 4)).sum().backward()
    model.train()
    model.eval()
    model.state_dict()
    step(torch.optim.SGD, lr=0.1)(other)
    optimizer.zero_grad()
    optimizer.step()  # without gradients
    assert stamp.matches(model)


def test_an_address_that_is_used_again_is_no_proof() -> None:
    """As a target network has it, whose update puts other storages in place of its own."""
    model = build()
    stamp = WeightStamp(model)
    for _ in range(200):
        for parameter in model.parameters():
            parameter.data = parameter.data * 1
        assert not stamp.matches(model)


def test_weights_are_not_kept_alive() -> None:
    model = build()
    stamp = WeightStamp(model)
    weight = weakref.ref(model[0].weight)
    del model
    assert weight() is None
    assert not stamp.matches(build())


def test_what_leaves_no_trace() -> None:
    """The limits that the docstring names."""
    model = build()
    stamp = WeightStamp(model)
    model[0].weight.data.mul_(2)
    assert stamp.matches(model)
    with torch.inference_mode():
        made_there = build()
        stamp = WeightStamp(made_there)
        made_there[0].weight.mul_(2)
    assert stamp.matches(made_there)
    made_there.train()
    assert not stamp.matches(made_there)

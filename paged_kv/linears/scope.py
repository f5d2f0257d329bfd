"""Modules that compute otherwise as long as a block of code runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import RLock
from weakref import WeakKeyDictionary, ref

import torch

Forward = Callable[[torch.nn.Linear, torch.Tensor], torch.Tensor]


class Patches:
    """Puts a function in place of the `forward` of linear layers, model by model."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._models: WeakKeyDictionary[torch.nn.Module, _Model] = WeakKeyDictionary()

    def scope(self, model: torch.nn.Module) -> LinearScope:
        """A context manager for one use of a model."""
        found = self._models.get(model)
        if found is None:
            found = self._models.setdefault(model, _Model(model, self._forward))
        return LinearScope(found)


class _Model:
    """The linear layers of a model, and who uses them patched.

    Users are numbers in a dict: one that joins or leaves twice counts once.
    """

    def __init__(self, model: torch.nn.Module, forward: Forward) -> None:
        self._forward = forward
        # Weak: a model that is a linear layer itself would be kept alive by its own entry.
        self._linears = [ref(part) for part in model.modules() if type(part) is torch.nn.Linear]
        self._patched: list[tuple[torch.nn.Module, object]] = []
        self._users: dict[int, None] = {}
        # A scope may be left by the collector, while its thread is in here.
        self._lock = RLock()

    def join(self, user: int) -> None:
        """One more user; the first one patches."""
        with self._lock:
            self._users[user] = None
            if not self._patched:
                self._patch()

    def leave(self, user: int) -> None:
        """One user less; the last one puts everything back."""
        with self._lock:
            self._users.pop(user, None)
            if not self._users:
                self._restore()

    def _patch(self) -> None:
        for linear in self._linears:
            module = linear()
            if module is None or type(module) is not torch.nn.Linear:
                continue  # gone, or parametrized by now
            if "forward" in module.__dict__ or "weight" not in module._parameters:
                continue
            forward = partial(self._forward, module)  # in a deep copy it finds the module's copy
            self._patched.append((module, forward))
            module.__dict__["forward"] = forward

    def _restore(self) -> None:
        while self._patched:
            module, forward = self._patched[-1]
            if module.__dict__.get("forward") is forward:
                del module.__dict__["forward"]
            self._patched.pop()


class LinearScope:
    """One use of a model with patched layers. Left at the latest when it is dropped: an interrupt
    may come before the first line of `__exit__`.
    """

    _model: _Model | None = None

    def __init__(self, model: _Model) -> None:
        self._model = model

    def __enter__(self) -> LinearScope:
        try:
            if self._model is not None:
                self._model.join(id(self))
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._leave()
        except BaseException:  # an interrupt: once more, and then on with it
            self._leave()
            raise

    def __del__(self) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._model is not None:
            self._model.leave(id(self))

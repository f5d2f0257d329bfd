"""What is kept of a path beside its K/V, and who is told when its node is dropped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol
from weakref import ref

import torch

from paged_kv.integrations.huggingface.token_tree import Tokens


class Watched(Protocol):
    """A node, as far as it is known here."""

    basis: object | None  # what it holds until it has K/V of its own


class Watch(ref[Watched]):
    """A node that may be dropped. Whoever is told of that gets the watch, by a function of C: no
    interrupt comes between.
    """

    number = 0  # which no path has, until it is said


class Kept:
    """What is kept of one node beside its K/V: its path as far as it was fed, and the last hidden
    state, where it was fed to its end.
    """

    __slots__ = ("hidden", "path")

    def __init__(self, path: Tokens, hidden: torch.Tensor | None) -> None:
        self.path = path
        self.hidden = hidden


class States:
    """Bytes of hidden states, each counted once however many paths share it."""

    def __init__(self, kept: Iterable[Kept] = ()) -> None:
        self.nbytes = 0
        self._holders: dict[int, int] = {}  # by identity of the tensor
        for each in kept:
            self.add(each.hidden)

    def add(self, state: torch.Tensor | None) -> None:
        """One more path holds it."""
        if state is None:
            return
        holders = self._holders.get(id(state), 0)
        self._holders[id(state)] = holders + 1
        if not holders:
            self.nbytes += state.numel() * state.element_size()

    def drop(self, state: torch.Tensor | None) -> None:
        """One path less holds it."""
        if state is None:
            return
        self._holders[id(state)] -= 1
        if not self._holders[id(state)]:
            del self._holders[id(state)]
            self.nbytes -= state.numel() * state.element_size()

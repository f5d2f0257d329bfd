"""Contexts that were made with other weights than the model has now."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from paged_kv.weights import WeightStamp


class OldContexts:
    """Which roots of a world model hold keys and values of weights that changed since, and how
    often one was used.

    What goes on from such a root is as old as it.
    """

    def __init__(self) -> None:
        self.used = 0
        self._handles: set[int] = set()
        self._left = 0  # when those that are gone were last forgotten
        self._stamp: WeightStamp | None = None

    def changed(self, model: Any) -> bool:
        """Whether the weights changed since `follow`, or may have: it never was called, or
        `distrust` was.
        """
        return self._stamp is None or not self._stamp.matches(model)

    def follow(self, model: Any, old: Collection[int]) -> None:
        """Go by the weights that the model has now; these roots are of others."""
        self._stamp = WeightStamp(model)
        self._handles = set(old)
        self._left = len(old)

    def distrust(self) -> None:
        """Take the weights for changed, whatever can be seen of them."""
        self._stamp = None

    def inherit(self, parents: Sequence[int], children: Sequence[int]) -> None:
        """A root step went on from `parents`."""
        old = [child for parent, child in zip(parents, children) if parent in self._handles]
        self.used += len(old)
        self._handles.update(old)

    @property
    def any(self) -> bool:
        """Whether there is an old root."""
        return bool(self._handles)

    @property
    def crowded(self) -> bool:
        """Whether many of them are gone by now, perhaps."""
        return len(self._handles) > 2 * self._left + 64

    def forget_all_but(self, handles: Collection[int]) -> None:
        """Forget old roots that are gone: these are left."""
        self._handles.intersection_update(handles)
        self._left = len(self._handles)

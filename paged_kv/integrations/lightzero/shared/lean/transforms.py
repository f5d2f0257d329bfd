"""Values and rewards of a step leave their supports in one go.

LightZero's search transforms the logits of values and of rewards one after the other, each in some
18 kernels on a few numbers. A short step has both in one tensor, so that one transform does for
both: the same function, row by row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from lzero.policy.scaling_transform import InverseScalarTransform

# Of a search: 0.2.0 has one for both, main one for each.
HANDLES = (
    ("inverse_scalar_transform_handle", "inverse_scalar_transform_handle"),
    ("value_inverse_scalar_transform_handle", "reward_inverse_scalar_transform_handle"),
)


class Scalars:
    """The logits of the values and the rewards of the last step, in one tensor."""

    def __init__(self) -> None:
        self._logits: torch.Tensor | None = None
        self._rewards: torch.Tensor | None = None

    def note(self, logits: torch.Tensor) -> None:
        """Those of a step [2 * B, support]: first the values, then the rewards."""
        self._logits = logits
        self._rewards = None

    def forget(self) -> None:
        """Hold nothing."""
        self._logits = None
        self._rewards = None

    def transformed(self, logits: torch.Tensor, own: Any) -> Any:
        """What `own` makes of logits; where they are the values of the last step, the rewards are
        done with them.
        """
        both = self._logits
        if both is None:
            return own(logits)
        rows = both.shape[0] // 2
        if _is(logits, both[:rows]):
            made = own(both)
            self._rewards = made[rows:]
            return made[:rows]
        if self._rewards is not None and _is(logits, both[rows:]):
            return self._rewards
        return own(logits)


class OneTransform:
    """LightZero's transform, of values and rewards at once."""

    def __init__(self, own: Any, scalars: Scalars) -> None:
        self._own = own
        self._scalars = scalars

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def __reduce__(self) -> Any:
        return _itself, (self._own,)  # a copy that is made in the middle of a search is LightZero's

    def __call__(self, logits: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        """Logits [B, support] as numbers [B, 1]."""
        if arguments or options:
            return self._own(logits, *arguments, **options)
        return self._scalars.transformed(logits, self._own)


@contextlib.contextmanager
def one_transform(search: Any, scalars: Scalars) -> Iterator[None]:
    """Within the block, a search of LightZero transforms values and rewards of a step at once."""
    names = next((pair for pair in HANDLES if hasattr(search, pair[0])), None)
    own = [] if names is None else [getattr(search, name) for name in names]
    if names is None or not _alike(*own):
        yield
        return
    try:
        for name in names:
            setattr(search, name, OneTransform(own[0], scalars))
        yield
    finally:
        scalars.forget()
        for name, handle in zip(names, own):
            setattr(search, name, handle)


def _itself(own: Any) -> Any:
    return own


def _alike(values: Any, rewards: Any) -> bool:
    """Whether one transform does for both."""
    if type(values) is not InverseScalarTransform or type(rewards) is not InverseScalarTransform:
        return False
    if values.categorical_distribution != rewards.categorical_distribution:
        return False
    return values is rewards or torch.equal(values.value_support, rewards.value_support)


def _is(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.data_ptr() == other.data_ptr()

"""Whether a world model's steps are the short ones, and how one is run on a batch of pages."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from paged_kv.integrations.lightzero.shared.lean.checking import Contexts, check
from paged_kv.integrations.lightzero.shared.lean.layers import Multiply, plain
from paged_kv.integrations.lightzero.shared.lean.places import TOKENS, Places
from paged_kv.integrations.lightzero.shared.lean.reading import (
    NotLean,
    Parts,
    read,
    refuse_unknown,
)
from paged_kv.integrations.lightzero.shared.lean.step import Answers, step, token
from paged_kv.integrations.lightzero.shared.lean.transforms import Scalars


class Lean:
    """The short step of one world model, as long as that model is what it was made for.

    `steps` counts short steps; `refused` says why steps are LightZero's own, or is None.
    """

    def __init__(self, multiply: Multiply | None = None) -> None:
        self.steps = 0
        self.refused: str | None = None
        self.scalars = Scalars()
        self._multiply = plain if multiply is None else multiply
        self._parts: Parts | None = None
        self._places = Places()

    def begin(self, model: Any, contexts: Contexts) -> None:
        """Between two searches: see whether the model is still what the step was made for."""
        try:
            if self._parts is None:
                self._parts = read(model, self._multiply)
                check(model, self._run, contexts)
            else:
                refuse_unknown(model)
            self.refused = None
        except NotLean as reason:
            self._parts = None
            self._tell(str(reason))

    def _tell(self, reason: str) -> None:
        if reason != self.refused:
            self.refused = reason
            warnings.warn(
                f'step="lean" is not used, since {reason}: steps are LightZero\'s own', stacklevel=2
            )

    def forget_weights(self) -> None:
        """They may have changed without a trace."""
        if self._parts is not None:
            self._parts.forget()

    def ready(self, model: Any) -> bool:
        """Whether the next step of a search is a short one."""
        return self._parts is not None and not model.training and not model.reanalyze_phase

    def run(self, model: Any, batch: Any, action: torch.Tensor, depths: Any, times: Any) -> Answers:
        """One step of all rows; K and V of its tokens are written to the batch."""
        answers = self._run(model, batch, action, depths, times)
        self.scalars.note(answers.scalars)
        self.steps += 1
        return answers

    @torch.no_grad()
    def _run(
        self, model: Any, batch: Any, action: torch.Tensor, depths: Any, times: Any
    ) -> Answers:
        parts = self._parts
        assert parts is not None
        parts.follow()
        if model.continuous_action_space:
            action = action.reshape(-1, model.action_space_size).float()
        else:
            action = action.reshape(-1)
        if batch.whole_windows:
            return step(parts, action, lambda _, x: batch.run(model, x.unsqueeze(1)).squeeze(1))
        places = self._places.of(model, parts, batch, depths, times)
        answers = step(parts, action, lambda index, x: token(parts, x, places[index]))
        batch.filled(TOKENS)
        return answers

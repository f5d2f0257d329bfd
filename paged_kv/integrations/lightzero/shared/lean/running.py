"""Whether a world model's steps are the short ones, and how one is run on a batch of pages."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch

from paged_kv.integrations.lightzero.shared.lean.anatomy import Anatomy
from paged_kv.integrations.lightzero.shared.lean.checking import Contexts, Run, check
from paged_kv.integrations.lightzero.shared.lean.compiled import (
    CannotCompile,
    Compiled,
    compiled,
)
from paged_kv.integrations.lightzero.shared.lean.layers import Multiply, plain
from paged_kv.integrations.lightzero.shared.lean.places import (
    TOKENS,
    Places,
    at_root,
    below_root,
)
from paged_kv.integrations.lightzero.shared.lean.reading import (
    NotLean,
    Parts,
    read,
)
from paged_kv.integrations.lightzero.shared.lean.step import (
    Answers,
    Predicted,
    predicted,
    step,
    token,
)
from paged_kv.integrations.lightzero.shared.lean.transforms import Scalars


class Lean:
    """The short step of one world model, as long as that model is what it was made for.

    `steps` counts short steps, `compiled_steps` those of them that were compiled. `refused` says
    why steps are LightZero's own, `not_compiled` why none are compiled; or they are None.
    """

    def __init__(self, multiply: Multiply | None = None, compile: bool = False) -> None:
        self.steps = 0
        self.compiled_steps = 0
        self.refused: str | None = None
        self.not_compiled: str | None = None
        self.scalars = Scalars()
        self._multiply = plain if multiply is None else multiply
        self._compile = compile
        self._parts: Parts | None = None  # of a model that was found to be right
        self._anatomy: Anatomy | None = None  # of the model that was tried last
        self._places = Places()
        self._compiled: Compiled | None = None

    def begin(self, model: Any, contexts: Contexts, searching: bool = False) -> None:
        """Where a model is attached, and between two searches (`searching`): see whether the model
        is what the step is made for.
        """
        known = self._anatomy
        self._anatomy = None
        try:
            if known is None or not known.matches(model):
                self._try(model, contexts)
            else:
                self._anatomy = known
                if self._parts is not None and self._multiply is plain:
                    # packed copies of these would be made again, too, which takes longer
                    self._parts.forget()
        except NotLean as reason:
            self._refuse(str(reason))
        except Exception as failure:  # of whatever kind: models are made of anything
            self._refuse(f"it could not be tried: {type(failure).__name__}: {failure}")
        if self._parts is None:
            return
        self.refused = None
        if searching and self._compile and self._compiled is None and self.not_compiled is None:
            self._start_compiled(model, contexts)

    def _try(self, model: Any, contexts: Contexts) -> None:
        """Make the step for a model. Raises NotLean; then, and where it is interrupted, there is
        none.
        """
        self._parts = None
        self._compiled = None
        parts = read(model, self._multiply)
        anatomy = Anatomy(model)
        try:
            check(model, self._plain(parts), contexts)
        except Exception:
            self._anatomy = anatomy  # not to be tried again as long as it is the same
            raise
        self._parts = parts
        self._anatomy = anatomy

    def _refuse(self, reason: str) -> None:
        self._parts = None
        self._compiled = None
        self._tell(reason)

    def _tell(self, reason: str) -> None:
        if reason != self.refused:
            self.refused = reason
            warnings.warn(
                f'step="lean" is not used, since {reason}: steps are LightZero\'s own', stacklevel=2
            )

    def _start_compiled(self, model: Any, contexts: Contexts) -> None:
        assert self._parts is not None
        try:
            short = self._plain(self._parts)
            self._compiled = compiled(model, self._parts, short, contexts)
        except CannotCompile as reason:
            self._give_up_compiled(str(reason))

    def _give_up_compiled(self, reason: str) -> None:
        self._compiled = None
        self.not_compiled = reason
        warnings.warn(f"compile=True is not used, since {reason}", stacklevel=2)

    def forget_weights(self) -> None:
        """They may have changed without a trace."""
        if self._parts is None:
            self._anatomy = None  # with other weights it may be right
        else:
            self._parts.forget()

    def ready(self, model: Any) -> bool:
        """Whether the next step of a search is a short one."""
        return self._parts is not None and not model.training and not model.reanalyze_phase

    def run(self, model: Any, batch: Any, action: torch.Tensor, depths: Any, times: Any) -> Answers:
        """One step of all rows; K and V of its tokens are written to the batch."""
        action = _rows(model, action)
        answers = None
        if self._compiled is not None and self._compiled.fits(batch):
            answers = self._run_compiled(model, batch, action, depths, times)
        if answers is None:
            assert self._parts is not None
            answers = self._run_plain(self._parts, model, batch, action, depths, times)
        self.scalars.note(answers.scalars)
        self.steps += 1
        return answers

    @torch.no_grad()
    def root(
        self, model: Any, batch: Any, action: torch.Tensor | None, latent: Any, times: Any
    ) -> Predicted:
        """The roots of all rows, which end with the latent state [B, 1, embed_dim]; `action` leads
        there, or None where an episode begins. K and V of their tokens are written to the batch.
        """
        parts = self._parts
        assert parts is not None
        parts.follow()
        stands = at_root(batch, parts.positions is None, times, action is None)
        places = self._places.of(model, parts, batch, stands)
        if action is not None:
            token(parts, parts.actions(_rows(model, action)), places[0])
        last = token(parts, latent.squeeze(1), places[-1])
        batch.filled(len(places))
        return predicted(parts, last)

    @torch.no_grad()
    def _run_compiled(
        self, model: Any, batch: Any, action: torch.Tensor, depths: Any, times: Any
    ) -> Answers | None:
        """The compiled step, or None where it failed: a model that changed is compiled again."""
        assert self._parts is not None
        assert self._compiled is not None
        self._parts.follow()
        try:
            answers = self._compiled.run(model, batch, action, depths, times)
        except Exception as failure:  # of whatever kind: compilers fail in many ways
            self._give_up_compiled(f"it failed: {type(failure).__name__}")
            return None
        self.compiled_steps += 1
        return answers

    def _plain(self, parts: Parts) -> Run:
        return partial(self._run_plain, parts)

    @torch.no_grad()
    def _run_plain(
        self,
        parts: Parts,
        model: Any,
        batch: Any,
        action: torch.Tensor,
        depths: Any,
        times: Any,
    ) -> Answers:
        parts.follow()
        if batch.whole_windows:
            return step(parts, action, lambda _, x: batch.run(model, x.unsqueeze(1)).squeeze(1))
        stands = below_root(batch, parts.positions is None, depths, times)
        places = self._places.of(model, parts, batch, stands)
        answers = step(parts, action, lambda index, x: token(parts, x, places[index]))
        batch.filled(TOKENS)
        return answers


def _rows(model: Any, action: torch.Tensor) -> torch.Tensor:
    """Actions as the step takes them: [B] or, of continuous ones, [B, size]."""
    if model.continuous_action_space:
        return action.reshape(-1, model.action_space_size).float()
    return action.reshape(-1)

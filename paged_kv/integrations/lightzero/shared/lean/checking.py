"""Whether the short step gives what LightZero's own does: both are run on one random batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from paged_kv.cache import PagedKVCache
from paged_kv.integrations.lightzero.shared.lean.reading import NotLean
from paged_kv.integrations.lightzero.shared.lean.step import Answers
from paged_kv.step import Step

Run = Callable[[Any, Any, torch.Tensor, list[int], list[int]], Answers]

ROWS = 3
LONGEST = 9  # tokens of a window at most: longer ones show nothing new
TIMES = [0, 3, 11]
DEPTHS = [1, 2, 5]
SPREAD = 0.1  # of weights that a fresh model leaves at zero, where every step would look right


class Contexts(Protocol):
    """Who keeps the contexts of a model: what they are made of, and how a step looks to it."""

    options: dict[str, Any]

    def as_batch(self, model: Any, step: Step) -> Any:
        """A step under LightZero's names."""


class Seen(NamedTuple):
    """What a step answered, and what it stored."""

    latent: torch.Tensor
    value: torch.Tensor
    reward: torch.Tensor
    policy: torch.Tensor
    stored: torch.Tensor


def check(model: Any, run: Run, contexts: Contexts) -> None:
    """Raise NotLean where a short step differs from LightZero's by more than rounding.

    The model is left as it is: its weights, its mode, its batch in work, and all random numbers.
    """
    comparing = _Comparing(model, run, contexts)
    zero = {
        f"model.{name}": torch.empty_like(weight).normal_(std=SPREAD, generator=_random(weight))
        for name, weight in model.named_parameters()
        if not weight.any()
    }
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _evaluating(model):
        torch.func.functional_call(comparing, zero, ())


class _Comparing(nn.Module):
    """A module, so that the model's zero weights can be others for the time of a call."""

    def __init__(self, model: Any, run: Run, contexts: Contexts) -> None:
        super().__init__()
        self.model = model
        self._run = run
        self._contexts = contexts

    def forward(self) -> None:
        """Compare a batch of equal windows, and one of different ones."""
        longest = max(1, min(self.model.context_length - 3, LONGEST))
        for lengths in ([longest] * ROWS, [longest, 1, max(1, longest - 2)]):
            self._compare(lengths)

    def _compare(self, lengths: list[int]) -> None:
        weight = self.model.transformer.ln_f.weight
        random = _random(weight)
        cache, windows = _windows(self._contexts.options, weight, lengths, random)
        action = _actions(self.model, random)
        seen = []
        for step in (_own_step, self._lean_step):
            with cache.open(windows, 2) as opened:
                batch = self._contexts.as_batch(self.model, opened)
                seen.append(step(self.model, batch, opened, action))
        rounding = torch.finfo(weight.dtype).eps ** 0.5
        for name, own, short in zip(Seen._fields, *seen):
            apart = (own - short).abs().max()
            if not apart <= rounding * own.abs().max().clamp(min=1):
                raise NotLean(f"its {name} differs from LightZero's by {float(apart):.1e}")

    def _lean_step(self, model: Any, batch: Any, opened: Step, action: torch.Tensor) -> Seen:
        answers = self._run(model, batch, action, DEPTHS, TIMES)
        value, reward = answers.scalars.chunk(2)
        return Seen(answers.latent, value, reward, answers.policy, opened.planes[0].clone())


def _own_step(model: Any, batch: Any, opened: Step, action: torch.Tensor) -> Seen:
    """LightZero's own two passes."""
    rewards: Any = None
    output: Any = None
    token = action.reshape(ROWS, -1)
    for name in ("act_tokens", "obs_embeddings"):
        sizes = [length + opened.size - opened.past for length in opened.lengths]
        model.__dict__["keys_values_wm_size_list_current"] = sizes
        options = {}
        if hasattr(model, "_variable_context_lengths"):  # as main asks for it
            options["valid_context_lengths"] = model._variable_context_lengths(sizes)
        output = model.forward(
            {name: token},
            past_keys_values=batch,
            is_init_infer=False,
            start_pos=TIMES,
            search_depth=DEPTHS,
            **options,
        )
        if rewards is None:
            rewards = output.logits_rewards
            token = output.logits_observations.view(ROWS, 1, -1)
    latent, value, reward, policy = (
        logits.reshape(ROWS, -1)
        for logits in (token, output.logits_value, rewards, output.logits_policy)
    )
    return Seen(latent, value, reward, policy, opened.planes[0].clone())


def _windows(
    options: dict[str, Any], like: torch.Tensor, lengths: list[int], random: torch.Generator
) -> tuple[PagedKVCache, list[int]]:
    """Random keys and values: a window of each length, in a cache of its own."""
    shape = {name: options[name] for name in ("layers", "heads", "head_size")}
    cache = PagedKVCache(**shape, page_size=2, device=like.device, dtype=like.dtype)
    windows = []
    for length in lengths:
        (window,) = cache.new(1, start=1)  # as contexts begin: with one observation
        size = shape["layers"], 1, shape["heads"], length, shape["head_size"]
        keys, values = (
            torch.empty(size, device=like.device, dtype=like.dtype).normal_(generator=random)
            for _ in range(2)
        )
        cache.append([window], keys, values)
        windows.append(window)
    return cache, windows


def _actions(model: Any, random: torch.Generator) -> torch.Tensor:
    size = model.action_space_size
    if model.continuous_action_space:
        return torch.rand((ROWS, size), generator=random, device=random.device)
    return torch.randint(size, (ROWS,), generator=random, device=random.device)


def _random(like: torch.Tensor) -> torch.Generator:
    return torch.Generator(device=like.device).manual_seed(0)


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """The model in the mode of a search, and as it was afterwards."""
    modes = [(part, part.training) for part in model.modules()]
    kept = ("keys_values_wm_size_list_current", "reanalyze_phase")
    before = {name: vars(model)[name] for name in kept if name in vars(model)}
    model.eval()
    model.__dict__["reanalyze_phase"] = False
    try:
        yield
    finally:
        for name in kept:
            model.__dict__.pop(name, None)
        model.__dict__.update(before)
        for part, training in modes:
            part.training = training

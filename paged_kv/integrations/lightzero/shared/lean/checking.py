"""Whether the short step gives what LightZero's own does: both are run on one random batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from paged_kv.cache import PagedKVCache
from paged_kv.integrations.lightzero.shared.lean.places import most_tokens
from paged_kv.integrations.lightzero.shared.lean.reading import NotLean
from paged_kv.integrations.lightzero.shared.lean.step import Answers
from paged_kv.step import Step

Run = Callable[[Any, Any, torch.Tensor, list[int], list[int]], Answers]

ROWS = 3
LONGEST = 9  # tokens of a window at most: an odd number, and longer ones show nothing new
TIMES = (0, 3, 11)
DEPTHS = (1, 2, 5)
SPREAD = 0.1  # of weights that a fresh model leaves at zero, where every step would look right


class Contexts(Protocol):
    """Who keeps the contexts of a model: what they are made of, and how a step looks to it."""

    options: dict[str, Any]
    window: str
    gather: str  # when windows are copied

    def as_batch(self, model: Any, step: Step) -> Any:
        """A step under LightZero's names."""


class Seen(NamedTuple):
    """What a step answered, and what it stored."""

    latent: torch.Tensor
    value: torch.Tensor
    reward: torch.Tensor
    policy: torch.Tensor
    stored: torch.Tensor


class Case(NamedTuple):
    """A batch to try steps on, again and again."""

    model: Any
    batch: Any
    opened: Step
    action: torch.Tensor
    depths: list[int]
    times: list[int]

    def take(self, run: Run) -> Answers:
        """One short step; the batch is as before, but for what was written to its new columns."""
        filled = self.opened.size
        answers = run(self.model, self.batch, self.action, self.depths, self.times)
        for layer in self.opened.layers:
            layer.size = filled
        return answers


def check(model: Any, run: Run, contexts: Contexts, rows: int = ROWS, filled: bool = True) -> None:
    """Raise NotLean where a short step differs from LightZero's by more than rounding.

    `filled`: with random numbers in place of weights that are zero.

    The model is left as it is: its weights, its mode, its batch in work, and all random numbers.
    """
    comparing = _Comparing(model, run, contexts, rows)
    zero = {
        f"model.{name}": torch.empty_like(weight).normal_(std=SPREAD, generator=_random(weight))
        for name, weight in model.named_parameters()
        if filled and not weight.any()
    }
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _evaluating(model):
        torch.func.functional_call(comparing, zero, ())


@contextlib.contextmanager
def practice(model: Any, contexts: Contexts, lengths: list[int]) -> Iterator[Case]:
    """Windows of these lengths with random contents, in a cache of their own, as a batch."""
    weight = model.transformer.ln_f.weight
    random = _random(weight)
    rows = len(lengths)
    with _evaluating(model), _windows(contexts, weight, lengths, random) as opened:
        yield Case(
            model,
            contexts.as_batch(model, opened),
            opened,
            _actions(model, rows, random),
            list(islice(cycle(DEPTHS), rows)),
            list(islice(cycle(TIMES), rows)),
        )


class _Comparing(nn.Module):
    """A module, so that the model's zero weights can be others for the time of a call."""

    def __init__(self, model: Any, run: Run, contexts: Contexts, rows: int) -> None:
        super().__init__()
        self.model = model
        self._run = run
        self._contexts = contexts
        self._rows = rows

    def forward(self) -> None:
        """Compare a batch of equal windows, and one of different ones."""
        longest = min(most_tokens(self.model.context_length), LONGEST)
        for lengths in ([longest], [longest, 1, max(1, longest - 2)]):
            self._compare(list(islice(cycle(lengths), self._rows)))

    def _compare(self, lengths: list[int]) -> None:
        with practice(self.model, self._contexts, lengths) as case:
            own = _own_step(case)
        with practice(self.model, self._contexts, lengths) as case:
            answers = case.take(self._run)
            value, reward = answers.scalars.chunk(2)
            stored = case.opened.planes[0].clone()
        short = Seen(answers.latent, value, reward, answers.policy, stored)
        rounding = torch.finfo(stored.dtype).eps ** 0.5
        for name, one, other in zip(Seen._fields, own, short):
            if one.shape != other.shape:
                shapes = f"{list(other.shape)}, and LightZero's is {list(one.shape)}"
                raise NotLean(f"its {name} is {shapes}")
            apart = (one - other).abs().max()
            if not apart <= rounding * one.abs().max().clamp(min=1):
                raise NotLean(f"its {name} differs from LightZero's by {float(apart):.1e}")


def _own_step(case: Case) -> Seen:
    """LightZero's own two passes."""
    model = case.model
    opened = case.opened
    rows = len(case.depths)
    rewards: Any = None
    output: Any = None
    token = case.action.reshape(rows, -1)
    for name in ("act_tokens", "obs_embeddings"):
        sizes = [length + opened.size - opened.past for length in opened.lengths]
        model.__dict__["keys_values_wm_size_list_current"] = sizes
        options = {}
        if hasattr(model, "_variable_context_lengths"):  # as main asks for it
            options["valid_context_lengths"] = model._variable_context_lengths(sizes)
        output = model.forward(
            {name: token},
            past_keys_values=case.batch,
            is_init_infer=False,
            start_pos=case.times,
            search_depth=case.depths,
            **options,
        )
        if rewards is None:
            rewards = output.logits_rewards
            token = output.logits_observations.view(rows, 1, -1)
    latent, value, reward, policy = (
        logits.reshape(rows, -1)
        for logits in (token, output.logits_value, rewards, output.logits_policy)
    )
    return Seen(latent, value, reward, policy, opened.planes[0].clone())


def _windows(
    contexts: Contexts, like: torch.Tensor, lengths: list[int], random: torch.Generator
) -> Step:
    """A step on windows of random keys and values."""
    shape = {name: contexts.options[name] for name in ("layers", "heads", "head_size")}
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
    return cache.open(windows, 2, gather=contexts.gather)


def _actions(model: Any, rows: int, random: torch.Generator) -> torch.Tensor:
    size = model.action_space_size
    if model.continuous_action_space:
        return torch.rand((rows, size), generator=random, device=random.device)
    return torch.randint(size, (rows,), generator=random, device=random.device)


def _random(like: torch.Tensor) -> torch.Generator:
    return torch.Generator(device=like.device).manual_seed(0)


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """The model in the mode of a search, and as it was afterwards."""
    modes = [(part, part.training) for part in model.modules()]
    kept = ("keys_values_wm_size_list_current", "reanalyze_phase")
    before = {name: vars(model)[name] for name in kept if name in vars(model)}
    try:
        model.eval()
        model.__dict__["reanalyze_phase"] = False
        yield
    finally:
        for name in kept:
            model.__dict__.pop(name, None)
        model.__dict__.update(before)
        for part, training in modes:
            part.training = training

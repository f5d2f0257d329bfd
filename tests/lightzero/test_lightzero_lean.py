"""`step="lean"`: the short step answers what LightZero's own does, and says why where it is not
used.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightzero_trees import Searcher, build_model, difference, play, same
from torch import nn

from paged_kv.errors import BadCount

pytestmark = pytest.mark.lightzero
ROUNDING = 2e-6
both_positions = pytest.mark.parametrize("rotary", [True, False], ids=["rotary", "learned"])


def attached(model: Any, **options: Any) -> Any:
    from paged_kv.integrations.lightzero import attach

    return attach(copy.deepcopy(model), **options)


def pair(model: Any, **options: Any) -> tuple[Searcher, Searcher]:
    """The same games by LightZero's own steps and by short ones, both on pages."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lean = attached(model, step="lean", **options)
    own = attached(model, step="lightzero", **options)
    return Searcher(own), Searcher(lean)


@both_positions
@pytest.mark.parametrize("padding", ["masked", "attended"])
@pytest.mark.parametrize("at", ["read", "write"])
def test_answers_are_those_of_lightzeros_step(rotary: bool, padding: str, at: str) -> None:
    own, lean = pair(build_model(rotary=rotary), padding=padding, at=at)
    assert difference(play(own), play(lean)) <= ROUNDING
    assert lean.wm.paged.lean.steps == 9 * 4
    assert own.wm.paged.lean is None
    lean.wm.paged.cache.check()


@both_positions
def test_latent_keys_find_the_same_nodes(rotary: bool) -> None:
    own, lean = pair(build_model(rotary=rotary), keys="latent")
    play(own)
    play(lean)
    assert same(own, lean) or difference(own, lean) <= ROUNDING
    assert own.wm.hit_count == lean.wm.hit_count


@both_positions
def test_exact_windows(rotary: bool) -> None:
    own, lean = pair(build_model(rotary=rotary), window="exact")
    assert difference(play(own), play(lean)) <= ROUNDING
    assert lean.wm.paged.lean.steps == 9 * 4


@both_positions
def test_contexts_of_one_token(rotary: bool) -> None:
    own, lean = pair(build_model(rotary=rotary, context=4))
    assert difference(play(own), play(lean)) <= ROUNDING


def rewrite(weight: torch.Tensor) -> None:
    weight.add_(0.1)


def replace(weight: torch.Tensor) -> None:
    weight.data = weight + 0.1


@both_positions
@pytest.mark.parametrize("change", [rewrite, replace])
def test_weights_are_those_of_now(rotary: bool, change: Callable[[torch.Tensor], None]) -> None:
    """Between two steps of one search, too: the model's weights are read at every step."""
    own, lean = pair(build_model(rotary=rotary))
    for searcher in (own, lean):
        searcher.search(3)
        before = len(searcher.answers)
        with torch.no_grad():
            for weight in searcher.wm.parameters():
                change(weight)
        searcher.search(3)
        assert len(searcher.answers) > before
    assert difference(own, lean) <= ROUNDING


def test_a_replaced_parameter_is_read() -> None:
    own, lean = pair(build_model(rotary=True))
    for searcher in (own, lean):
        searcher.search(3)
        for block in searcher.wm.transformer.blocks:
            block.attn.key.weight = nn.Parameter(block.attn.key.weight.detach() * 2)
            block.attn.proj.weight = nn.Parameter(block.attn.proj.weight.detach() * 2)
        searcher.search(3)
    assert difference(own, lean) <= ROUNDING


def test_what_is_written_without_a_trace_can_be_told() -> None:
    own, lean = pair(build_model(rotary=True))
    for searcher in (own, lean):
        searcher.search(3)
        for weight in searcher.wm.parameters():
            weight.data.mul_(1.1)
        searcher.wm.paged.weights_changed()
        searcher.search(3)
    assert difference(own, lean) <= ROUNDING


@both_positions
def test_copies_run_on_their_own_weights(rotary: bool) -> None:
    own, lean = pair(build_model(rotary=rotary))
    model = copy.deepcopy(lean.model)
    with torch.no_grad():
        for weight in lean.wm.parameters():
            weight.zero_()
    lean.model = model
    assert difference(play(own), play(lean)) <= ROUNDING
    assert lean.wm.paged.lean.steps == 9 * 4


# -- where it is not used


def refused(model: Any, reason: str) -> Searcher:
    """A search on a model that is refused for this reason, and answers nevertheless."""
    with pytest.warns(UserWarning, match=f"is not used, since .*{reason}"):
        searcher = Searcher(attached(model, step="lean"))
    lean = searcher.wm.paged.lean
    assert reason in lean.refused
    own = Searcher(attached(model, step="lightzero"))
    searcher.search(3)
    own.search(3)
    assert same(own, searcher)
    assert lean.steps == 0
    return searcher


class Doubled(nn.Linear):
    """A layer that computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_layer_of_another_class() -> None:
    model = build_model(rotary=True)
    model.world_model.transformer.blocks[1].mlp[0].__class__ = Doubled
    refused(model, r"transformer.blocks.1.mlp.0 is a Doubled")


def test_another_feed_forward() -> None:
    model = build_model(rotary=True)
    model.world_model.transformer.blocks[0].mlp.append(nn.GELU())
    refused(model, "a feed-forward block is Linear, GELU, Linear, Dropout, GELU")


def test_a_forward_of_its_own() -> None:
    model = build_model(rotary=False)
    head = model.world_model.head_value
    head.forward = torch.nn.Module.__call__.__get__(copy.deepcopy(head))
    refused(model, "head_value has a forward of its own")


def hooked(module: Any, inputs: Any, output: Any) -> Any:
    return output + 1


def test_a_hook() -> None:
    model = build_model(rotary=True)
    model.world_model.head_policy.head_module[1].register_forward_hook(hooked)
    refused(model, r"head_policy.head_module.1 has a hook")


def test_a_hook_that_comes_later_counts_from_the_next_search() -> None:
    own, lean = pair(build_model(rotary=True))
    for searcher in (own, lean):
        searcher.search(3)
        searcher.wm.head_policy.head_module.register_forward_hook(hooked)
    own.search(3)
    with pytest.warns(UserWarning, match="head_policy.head_module has a hook"):
        lean.search(3)
    assert difference(own, lean) <= ROUNDING
    assert lean.wm.paged.lean.steps == 3


def test_a_step_that_would_differ_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from paged_kv.integrations.lightzero.shared.lean import step

    right = step.rotate
    monkeypatch.setattr(step, "rotate", lambda tokens, turn: right(tokens, turn * 1j))
    refused(build_model(rotary=True), "differs from LightZero's by")


@both_positions
def test_fresh_models_are_checked_though_their_heads_are_zero(
    rotary: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paged_kv.integrations.lightzero.shared.lean import layers

    model = build_model(rotary=rotary)
    heads = ("head_value", "head_rewards", "head_policy", "head_observations")
    with torch.no_grad():
        for name in heads:
            for weight in getattr(model.world_model, name).head_module[2].parameters():
                weight.zero_()
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = attached(model, step="lean")
    assert made.world_model.paged.lean.refused is None
    assert all(torch.equal(made.state_dict()[name], before[name]) for name in before)
    monkeypatch.setattr(layers.Gelu, "__call__", lambda self, x: x)
    with pytest.warns(UserWarning, match="differs from LightZero's"):
        attached(model, step="lean")


def test_attaching_leaves_random_numbers_and_modes_alone() -> None:
    from paged_kv.integrations.lightzero import attach

    model = build_model(rotary=False)
    model.train()
    model.world_model.transformer.blocks[0].eval()
    modes = [part.training for part in model.modules()]
    weights = {name: weight._version for name, weight in model.named_parameters()}
    torch.manual_seed(5)
    np.random.seed(5)
    wanted = torch.rand(3), np.random.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)
    attach(model, step="lean")
    assert model.world_model.paged.lean.refused is None
    assert torch.equal(torch.rand(3), wanted[0])
    assert np.array_equal(np.random.rand(3), wanted[1])
    assert [part.training for part in model.modules()] == modes
    assert {name: weight._version for name, weight in model.named_parameters()} == weights
    assert model.world_model.paged.started is False


def test_training_mode_takes_lightzeros_steps() -> None:
    """Dropout is active there."""
    own, lean = pair(build_model(rotary=True))
    for searcher in (own, lean):
        searcher.root()
        searcher.wm.train()
        torch.manual_seed(1)
        searcher.wm.paged.nodes.choose([0] * 4, range(4))
        latents = np.zeros((4, 1, 32), np.float32)
        times = [np.array(0)] * 4
        actions = torch.zeros(4, dtype=torch.int64)
        answer = searcher.model.recurrent_inference([(latents, actions)], 0, [1] * 4, times)
        searcher.answers.append(answer.value)
    assert same(own, lean)
    assert lean.wm.paged.lean.steps == 0


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"step": "short"}, "step"),
        ({"compile": "yes"}, "compile"),
        ({"step": "lightzero", "compile": True}, "step"),
    ],
)
def test_choices_are_checked(options: dict[str, Any], name: str) -> None:
    with pytest.raises(BadCount, match=name):
        attached(build_model(rotary=True), **options)

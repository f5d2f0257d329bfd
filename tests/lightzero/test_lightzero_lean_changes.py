"""Short steps of models that are changed after they were attached, or that are made of anything."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightzero_trees import Searcher, build_model, difference, same
from torch import nn

pytestmark = pytest.mark.lightzero
ROUNDING = 2e-6
both_positions = pytest.mark.parametrize("rotary", [True, False], ids=["rotary", "learned"])
built = functools.cache(build_model)  # to be copied
quietly = pytest.mark.filterwarnings('ignore:step="lean" is not used')


def attached(model: Any, **options: Any) -> Any:
    from paged_kv.integrations.lightzero import attach

    return attach(copy.deepcopy(model), **options)


def pair(model: Any, **options: Any) -> tuple[Searcher, Searcher]:
    """The same games by LightZero's own steps and by short ones, both on pages."""
    return (
        Searcher(attached(model, step="lightzero", **options)),
        Searcher(attached(model, step="lean", **options)),
    )


# -- changes between two searches


def fresh(module: nn.Module) -> Any:
    """Another module of the same kind, with other weights."""
    made = copy.deepcopy(module)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(torch.randn(weight.shape, generator=random), alpha=0.1)
    return made


def keys_and_wide_layers(wm: Any) -> None:
    for block in wm.transformer.blocks:
        block.attn.key = fresh(block.attn.key)
        block.mlp[0] = fresh(block.mlp[0])


def a_head(wm: Any) -> None:
    wm.head_value = fresh(wm.head_value)


def layers_of_a_head(wm: Any) -> None:
    wm.head_rewards.head_module = fresh(wm.head_rewards.head_module)


def an_activation(wm: Any) -> None:
    wm.head_policy.head_module[1] = nn.ReLU()


def the_transformer(wm: Any) -> None:
    wm.transformer = fresh(wm.transformer)


def the_order_of_blocks(wm: Any) -> None:
    wm.transformer.blocks = nn.ModuleList(reversed(list(wm.transformer.blocks)))


def actions(wm: Any) -> None:
    wm.act_embedding_table = fresh(wm.act_embedding_table)


def positions(wm: Any) -> None:
    if not wm.config.rotary_emb:
        wm.pos_emb = fresh(wm.pos_emb)
        wm.precompute_pos_emb_diff_kv()


def all_biases_gone(wm: Any) -> None:
    for block in wm.transformer.blocks:
        for name in ("query", "key", "value"):
            getattr(block.attn, name).bias = None


def one_bias_gone(wm: Any) -> None:
    wm.transformer.blocks[1].attn.key.bias = None


def settings(wm: Any) -> None:
    for block in wm.transformer.blocks:
        block.ln1.eps = 0.5
        block.mlp[1].approximate = "none"


def averages(wm: Any) -> None:
    """As moving averages of weights are often written: without a trace."""
    random = torch.Generator().manual_seed(1)
    for weight in wm.parameters():
        weight.data.mul_(0.9).add_(torch.randn(weight.shape, generator=random), alpha=0.1)


def its_forward(wm: Any) -> None:
    own = wm.forward

    def more(*arguments: Any, **options: Any) -> Any:
        output = own(*arguments, **options)
        output.logits_value = output.logits_value + 1
        return output

    wm.forward = more


def its_pass(wm: Any) -> None:
    own = wm._transformer_pass
    wm._transformer_pass = lambda *arguments, **options: own(*arguments, **options) + 1


def a_parametrization(wm: Any) -> None:
    torch.manual_seed(0)
    for block in wm.transformer.blocks:
        torch.nn.utils.parametrizations.spectral_norm(block.attn.proj)
    wm.eval()


CHANGES = (
    keys_and_wide_layers,
    a_head,
    layers_of_a_head,
    an_activation,
    the_transformer,
    the_order_of_blocks,
    actions,
    positions,
    all_biases_gone,
    one_bias_gone,
    settings,
    averages,
    its_forward,
    its_pass,
    a_parametrization,
)


@quietly
@both_positions
@pytest.mark.parametrize("change", CHANGES)
def test_the_next_search_is_of_the_model_as_it_is_then(
    rotary: bool, change: Callable[[Any], None]
) -> None:
    own, lean = pair(built(rotary=rotary))
    for searcher in (own, lean):
        searcher.search(3)
        change(searcher.wm)
        for _ in range(3):
            searcher.search(3)
    assert difference(own, lean) <= ROUNDING


@quietly
def test_what_was_changed_back_is_taken_again() -> None:
    own, lean = pair(built(rotary=True))
    for searcher in (own, lean):
        head = searcher.wm.head_policy.head_module
        activation = head[1]
        hook = head.register_forward_hook(lambda module, inputs, output: output + 1)
        searcher.search(2)
        hook.remove()
        searcher.search(2)
        head[1] = nn.ReLU()
        searcher.search(2)
        head[1] = activation
        searcher.search(2)
    assert difference(own, lean) <= ROUNDING
    assert lean.wm.paged.lean.steps == 4
    assert lean.wm.paged.lean.refused is None


@quietly
def test_weights_that_are_no_numbers_for_a_while() -> None:
    model = copy.deepcopy(built(rotary=True))
    key = model.world_model.transformer.blocks[0].attn.key.weight
    weight = key[0, 0].item()
    with torch.no_grad():
        key[0, 0] = torch.nan
    own, lean = pair(model)
    for searcher in (own, lean):
        searcher.search(2)
        searcher.answers.clear()
        searcher.wm.clear_caches()
        searcher.reset()
        with torch.no_grad():
            searcher.wm.transformer.blocks[0].attn.key.weight[0, 0] = weight
        searcher.search(2)
    assert difference(own, lean) <= ROUNDING
    assert lean.wm.paged.lean.steps == 2


@both_positions
def test_a_model_that_stays_the_same_is_tried_once(
    rotary: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paged_kv.integrations.lightzero.shared.lean import running

    tried = []
    check = running.check
    monkeypatch.setattr(running, "check", lambda *all: (tried.append(1), check(*all)))
    lean = Searcher(attached(built(rotary=rotary), step="lean"))
    for _ in range(4):
        lean.search(2)
        lean.wm.train()
        with torch.no_grad():
            for weight in lean.wm.parameters():
                weight.mul_(1.01)
        lean.wm.eval()
    assert len(tried) == 1
    monkeypatch.setattr(running.Anatomy, "matches", lambda self, model: False)
    lean.search(2)
    assert len(tried) == 2


def a_hook_on_a_part(wm: Any) -> None:
    wm.transformer.ln_f.register_forward_pre_hook(lambda module, inputs: None)


def a_choice(wm: Any) -> None:
    wm.use_policy_logits_clip = True


def a_part_that_trains(wm: Any) -> None:
    wm.transformer.blocks[0].attn.attn_drop.train()


def another_class(wm: Any) -> None:
    norm = wm.transformer.ln_f
    norm.__class__ = type("Norm", (nn.LayerNorm,), {})


@pytest.mark.parametrize(
    "change",
    [
        *(change for change in CHANGES if change not in (positions, averages)),
        a_hook_on_a_part,
        a_choice,
        a_part_that_trains,
        another_class,
    ],
)
def test_an_anatomy_sees_what_a_step_may_be_refused_for(change: Callable[[Any], None]) -> None:
    from paged_kv.integrations.lightzero.shared.lean.anatomy import Anatomy

    wm = copy.deepcopy(built(rotary=True)).world_model
    wm.eval()
    anatomy = Anatomy(wm)
    assert anatomy.matches(wm)
    change(wm)
    assert not anatomy.matches(wm)


def test_an_anatomy_sees_hooks_on_all_modules() -> None:
    from paged_kv.integrations.lightzero.shared.lean.anatomy import Anatomy

    wm = copy.deepcopy(built(rotary=True)).world_model
    anatomy = Anatomy(wm)
    hook = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
    try:
        assert not anatomy.matches(wm)
    finally:
        hook.remove()
    assert anatomy.matches(wm)


# -- models made of anything


def outputs_of(wm: Any) -> int:
    return int(wm.head_value.head_module[-1].out_features)


def a_head_of_one_layer(wm: Any) -> None:
    wm.head_value.head_module = nn.Linear(wm.embed_dim, outputs_of(wm))


def a_head_that_ends_with_a_norm(wm: Any) -> None:
    wm.head_rewards.head_module.append(nn.LayerNorm(outputs_of(wm)))


def one_head_for_two(wm: Any) -> None:
    wm.head_value = wm.head_rewards


def not_a_number(wm: Any) -> None:
    with torch.no_grad():
        wm.transformer.ln_f.bias[0] = torch.nan


@pytest.mark.parametrize(
    "make",
    [
        a_head_of_one_layer,
        a_head_that_ends_with_a_norm,
        one_head_for_two,
        not_a_number,
        one_bias_gone,
        its_pass,
    ],
)
def test_any_model_can_be_attached(make: Callable[[Any], None]) -> None:
    model = copy.deepcopy(built(rotary=True))
    make(model.world_model)
    with pytest.warns(UserWarning, match='step="lean" is not used'):
        own, lean = pair(model)
    for searcher in (own, lean):
        searcher.search(3)
    assert lean.wm.paged.lean.steps == 0
    for one, other in zip(own.answers, lean.answers, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


@both_positions
@pytest.mark.parametrize(("context", "envs"), [(2, 4), (3, 1), (4, 1), (5, 4), (7, 1), (14, 1)])
def test_any_length_of_contexts(rotary: bool, context: int, envs: int) -> None:
    model = built(rotary=rotary, context=context, envs=envs)
    own = Searcher(attached(model, step="lightzero"), envs=envs)
    lean = Searcher(attached(model, step="lean"), envs=envs)
    for searcher in (own, lean):
        for _ in range(5):
            searcher.search(2)
    assert difference(own, lean) <= ROUNDING
    assert lean.wm.paged.lean.steps == 5 * 2


@both_positions
def test_one_time_for_all_roots(rotary: bool) -> None:
    """LightZero takes a number for the time step where all environments begin an episode."""
    own, lean = pair(built(rotary=rotary))
    for searcher in (own, lean):
        now = torch.linspace(-1, 1, 16).view(4, 4)
        answer = searcher.model.initial_inference(torch.zeros(4, 4), [-1] * 4, now, 3)
        searcher.answers += [answer.value, answer.policy_logits]
    assert same(own, lean)


# -- interrupts, copies, and what is left behind


def test_an_interrupted_check_is_made_before_the_next_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from paged_kv.integrations.lightzero import attach
    from paged_kv.integrations.lightzero.shared.lean import running, step

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    model = copy.deepcopy(built(rotary=True))
    own = Searcher(attached(model, step="lightzero"))
    with monkeypatch.context() as patched:
        patched.setattr(running, "check", interrupt)
        with pytest.raises(KeyboardInterrupt):
            attach(model, step="lean")
    right = step.rotate
    monkeypatch.setattr(step, "rotate", lambda tokens, turn: right(tokens, turn * 1j))
    lean = Searcher(model)
    with pytest.warns(UserWarning, match="differs from LightZero's"):
        lean.search(3)
    own.search(3)
    assert same(own, lean)


@both_positions
@pytest.mark.parametrize("after", range(0, 24, 3))
def test_a_search_goes_on_after_one_that_was_interrupted(
    rotary: bool, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first time step of a search, wherever the interrupt comes."""
    from paged_kv.integrations.lightzero.shared.lean import running

    own, lean = pair(built(rotary=rotary))
    own.search(3)
    token = running.token
    left = iter(range(after))

    def interrupted(*arguments: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return token(*arguments)

    random = copy.deepcopy(lean.random.bit_generator.state)
    with monkeypatch.context() as patched:
        patched.setattr(running, "token", interrupted)
        for _ in range(4):
            try:
                lean.search(3)
            except KeyboardInterrupt:
                break
        else:
            raise AssertionError("no search was interrupted")
    lean.random.bit_generator.state = random
    lean.answers.clear()
    lean.wm.paged.end_search()  # as the search of LightZero does, whatever is raised
    lean.wm.clear_caches()
    lean.reset()
    lean.search(3)
    assert difference(own, lean) <= ROUNDING
    lean.wm.paged.cache.check()


def test_a_search_can_be_copied_while_it_runs() -> None:
    from lzero.policy.scaling_transform import DiscreteSupport, InverseScalarTransform

    from paged_kv.integrations.lightzero.shared.lean.transforms import Scalars, one_transform

    class Search:
        inverse_scalar_transform_handle = None

    search = Search()
    search.inverse_scalar_transform_handle = own = transform_of(
        InverseScalarTransform, DiscreteSupport
    )
    logits = torch.randn(2, 101, generator=torch.Generator().manual_seed(0))
    with one_transform(search, Scalars()):
        assert search.inverse_scalar_transform_handle is not own
        copies = [
            copy.deepcopy(search.inverse_scalar_transform_handle),
            copy.copy(search.inverse_scalar_transform_handle),
            pickle.loads(pickle.dumps(search.inverse_scalar_transform_handle)),
        ]
    for made in copies:
        assert type(made) is InverseScalarTransform
        assert torch.equal(made(logits), own(logits))
    assert search.inverse_scalar_transform_handle is own


def transform_of(kind: Any, support: Any) -> Any:
    try:
        return kind(50, torch.device("cpu"), True)  # 0.2.0
    except TypeError:
        return kind(support(-50.0, 51.0, 1.0), True)


def test_nothing_is_left_of_models_that_were_attached_again_and_again() -> None:
    from paged_kv.integrations.lightzero import attach

    gone = []
    model = copy.deepcopy(built(rotary=True))
    for cache in ("paged", "lightzero", "paged", "paged"):
        attach(model, cache)
        if cache == "paged":
            searcher = Searcher(model)
            searcher.search(2)
            gone.append(weakref.ref(model.world_model.paged))
            gone.append(weakref.ref(model.world_model.paged.cache))
    gone.append(weakref.ref(model.world_model))
    del model, searcher
    gc.collect()
    assert [found() for found in gone] == [None] * len(gone)


def test_views_of_batches_that_are_gone_are_not_kept() -> None:
    from paged_kv.integrations.lightzero.shared.lean.step import Cell

    lean = Searcher(attached(built(rotary=True), step="lean"))
    for ready in (4, 3, 2):
        lean.search(3, ready=ready)
        lean.reset()
    gc.collect()
    assert any(isinstance(found, Cell) for found in gc.get_objects())
    lean.wm.paged.start("cpu", torch.float32)
    lean.wm.keys_values_wm = None
    gc.collect()
    assert not any(isinstance(found, Cell) for found in gc.get_objects())


def test_random_numbers_of_all_kinds_are_left_alone() -> None:
    import random

    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    model = built(rotary=False)
    torch.set_rng_state(before[0])
    np.random.seed(1)
    numbers = np.random.get_state()[1].copy()
    attached(model, step="lean")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], numbers)
    assert random.getstate() == before[2]

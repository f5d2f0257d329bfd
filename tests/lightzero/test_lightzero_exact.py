"""`window="exact"`: every answer is that of the window's tokens alone, however often the window
slid.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from lightzero_oracle import Player, heed_context
from lightzero_trees import build_model, quiet

from paged_kv.errors import BadCount

pytestmark = pytest.mark.lightzero
BITS = 2e-5
WRONG = 1e-3
both_positions = pytest.mark.parametrize("rotary", [True, False], ids=["rotary", "learned"])


def player(
    envs: int = 4, window: str = "exact", keys: str = "node", page_size: int = 2, **options: Any
) -> Player:
    from paged_kv.integrations.lightzero import attach

    model = build_model(envs=envs, **options)
    heed_context(model.world_model)
    attach(model, window=window, keys=keys, page_size=page_size)
    return Player(model, envs, gap=0 if window == "exact" else 2)


def check(playing: Player) -> None:
    playing.wm.paged.cache.check()
    playing.wm.paged.manager.check()


@both_positions
@pytest.mark.parametrize("context", [4, 6, 8, 14])
@pytest.mark.parametrize("keys", ["node", "latent"])
def test_windows_stay_exact_when_they_slide(rotary: bool, context: int, keys: str) -> None:
    exact, cached = (
        player(window=window, keys=keys, rotary=rotary, context=context)
        for window in ("exact", "cached")
    )
    for playing in (exact, cached):
        for _ in range(context):
            playing.search(6)
        check(playing)
    assert exact.worst() < BITS
    assert cached.worst() > WRONG, "stored keys and values saw tokens that have left the window"
    assert exact.wm.hit_count == exact.wm.total_query_count > 0


@both_positions
@pytest.mark.parametrize("page_size", [1, 2, 3, 16])
def test_any_page_size(rotary: bool, page_size: int) -> None:
    playing = player(page_size=page_size, rotary=rotary, layers=3)
    for _ in range(7):
        playing.search(5)
    assert playing.worst() < BITS
    check(playing)


@both_positions
def test_contexts_of_different_lengths(rotary: bool) -> None:
    """A root that was lost begins with what it saw last; the others go on, and neither sees the
    other's padding.
    """
    playing = player(rotary=rotary)
    for turn in range(9):
        playing.search(6)
        if turn % 3 == 1:
            row = turn % 4
            playing.wm.past_kv_cache_init_infer_envs[row].clear()
            playing.windows[row] = playing.windows[row][-1:]
    assert playing.worst() < BITS
    assert playing.wm.root_hit_cnt < playing.wm.root_total_query_cnt
    check(playing)


def test_no_context() -> None:
    playing = player(rotary=False, context=2)
    for _ in range(3):
        playing.search(4)
    assert playing.worst() < BITS


def test_tokens_take_less_than_keys_and_values() -> None:
    exact, cached = (
        player(window=window, rotary=False, layers=4) for window in ("exact", "cached")
    )
    for playing in (exact, cached):
        playing.search(5)
    assert exact.wm.paged.cache.pages_in_use == cached.wm.paged.cache.pages_in_use > 0
    assert exact.wm.paged.cache.bytes_in_use * 2 * 4 == cached.wm.paged.cache.bytes_in_use


@both_positions
def test_training_is_not_touched(rotary: bool) -> None:
    """Passes without a cache, or on LightZero's, place their tokens as ever, also with a batch left
    in work.
    """
    playing = player(rotary=rotary)
    plain = copy.deepcopy(playing.model)
    from paged_kv.integrations.lightzero import attach

    attach(plain, cache="lightzero")
    playing.search(2)
    latents = torch.randn(4, 1, 32)
    actions = torch.zeros(4, 1, dtype=torch.long)
    for tokens in ({"obs_embeddings": latents}, {"act_tokens": actions}):
        outputs = []
        for model in (playing.model, plain):
            past = model.world_model.transformer.generate_empty_keys_values(4, 8)
            outputs.append(
                model.world_model.forward(
                    tokens, past, is_init_infer=True, start_pos=[1] * 4
                ).logits_value
            )
        assert torch.equal(*outputs)


def test_copies_start_without_contexts() -> None:
    from paged_kv.integrations.lightzero.release.exact import ExactState

    playing = player(rotary=True)
    playing.search(3)
    copied = copy.deepcopy(playing.model)
    for state in (copied.world_model.paged, pickle.loads(pickle.dumps(playing.wm.paged))):
        assert type(state) is ExactState
        assert state.choices == playing.wm.paged.choices
        assert state.cache.live_sequences == 0
    again = Player(copied, gap=0)
    again.search(4)
    assert again.worst() < BITS


def test_lightzeros_own_search() -> None:
    """The C++ tree over exact windows, in a real policy: every context is found, and every page
    comes back.
    """
    from paged_kv.integrations.lightzero import attach
    from paged_kv.tools.profile.client import build_policy
    from paged_kv.tools.profile.presets import PRESETS
    from paged_kv.tools.profile.side import Setting

    policy = build_policy(PRESETS["cartpole"], Setting(4, 8, 0, torch.device("cpu"), 2, "read"))
    attach(policy, window="exact")
    wm = policy._collect_model.world_model
    draw = np.random.default_rng(0)
    for time in range(6):
        seen = torch.from_numpy(draw.normal(size=(4, 4)).astype(np.float32))
        masks = [np.ones(2, np.int8)] * 4
        timestep = [np.array(time)] * 4
        policy._forward_collect(seen, masks, 0.25, [-1] * 4, 0.0, list(range(4)), timestep)
    assert wm.hit_count == wm.total_query_count == 6 * 8 * 4
    assert wm.paged.cache.live_sequences == 4, "the roots"
    with quiet():
        wm.clear_caches()
    assert wm.paged.cache.pages_in_use == 0
    wm.paged.cache.check()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"window": "rebuilt"}, "'rebuilt'"),
        ({"window": "exact", "at": "write"}, "'write'"),
        ({"window": "exact", "padding": "attended"}, "'attended'"),
    ],
)
def test_choices_that_cannot_be(options: dict[str, str], named: str) -> None:
    from paged_kv.integrations.lightzero import attach

    model = build_model(rotary=True)
    with pytest.raises(BadCount, match=named):
        attach(model, **options)
    assert not hasattr(model.world_model, "paged")


def test_keys_and_values_are_refused() -> None:
    playing = player(rotary=True)
    playing.search(2)
    foreign = playing.wm.transformer.generate_empty_keys_values(1, 8)
    with pytest.raises(BadCount, match="KeysValues"):
        playing.wm.custom_copy_kv_cache_to_shared_recur(foreign)
    check(playing)

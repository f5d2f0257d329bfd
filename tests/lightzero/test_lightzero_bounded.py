"""Searches in a pool that is too small for all of their nodes: slower, and the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lightzero_oracle import Player, heed_context
from lightzero_trees import build_model, quiet

from paged_kv.errors import BadCount, OutOfPages
from paged_kv.integrations.lightzero import attach
from paged_kv.integrations.ties import fixed_ties
from paged_kv.tools.profile.client import LightZeroSide, tree_file
from paged_kv.tools.profile.presets import PRESETS
from paged_kv.tools.profile.side import Setting

pytestmark = pytest.mark.lightzero
BITS = 2e-4  # of float32, after a few layers that were made to heed their context
ENVS = 4
SIMULATIONS = 24
CARTPOLE = PRESETS["cartpole"]
SETTING = Setting(ENVS, SIMULATIONS, 0, torch.device("cpu"), 2, "read")


def player(rotary: bool, context: int = 8, **options: Any) -> Player:
    model = build_model(rotary=rotary, context=context, envs=ENVS)
    heed_context(model.world_model, 3)
    return Player(attach(model, **options), envs=ENVS, judged=False)


def quarter(play: Player | LightZeroSide) -> int:
    """Pages of the roots and a quarter of what a search adds to them."""
    paged = play.wm.paged
    peak = paged.cache.stats.peak_pages
    paged.end_search()
    roots = paged.cache.pages_in_use
    return int(roots + (peak - roots) // 4)


def searched(play: Player, times: int = 3) -> Player:
    """It played a few roots, with a search each."""
    for _ in range(times):
        play.search(SIMULATIONS)
    return play


@pytest.mark.parametrize("window", ["cached", "exact"])
@pytest.mark.parametrize("context", [8, 40], ids=["sliding", "growing"])
@pytest.mark.parametrize("rotary", [True, False], ids=["rotary", "learned"])
def test_a_quarter_of_the_pages_gives_the_same_answers(
    rotary: bool, context: int, window: str
) -> None:
    ample = searched(player(rotary, context, window=window))
    pages = quarter(ample)
    tight = searched(player(rotary, context, window=window, num_pages=8, max_pages=pages))
    for one, other in zip(ample.values, tight.values):
        assert torch.allclose(one, other, atol=BITS)
    paged = tight.wm.paged
    assert paged.nodes.recomputed > 10
    assert paged.manager.recur_pool.stats.evictions > 10
    assert paged.cache.stats.peak_pages <= pages
    assert tight.wm.hit_count == tight.wm.total_query_count == ample.wm.total_query_count
    paged.cache.check()
    paged.manager.check()
    paged.end_search()
    assert len(paged.nodes) == 0
    assert paged.cache.live_sequences == ENVS


@pytest.mark.parametrize("eviction", ["search", "lru", "fifo"])
def test_the_visits_of_whole_searches_are_the_same(eviction: str) -> None:
    ample = LightZeroSide("paged", CARTPOLE, SETTING)
    tight = LightZeroSide("paged", CARTPOLE, SETTING)
    with quiet():
        tree = tree_file()
    with fixed_ties(tree):
        wanted = [ample.step(SETTING.simulations, seed) for seed in range(4)]
        pages = quarter(ample)
        attach(tight.wm, padding=SETTING.padding, max_pages=pages, num_pages=8, eviction=eviction)
        found = [tight.step(SETTING.simulations, seed) for seed in range(4)]
    assert [each.visits for each in found] == [each.visits for each in wanted]
    assert [each.actions for each in found] == [each.actions for each in wanted]
    assert tight.wm.paged.nodes.recomputed > 50


def test_a_search_that_was_interrupted_while_it_made_a_node_again() -> None:
    play = searched(player(False, context=40, num_pages=8, max_pages=60), 1)
    paged = play.wm.paged
    prepare = paged.nodes.prepare
    forward = play.wm.transformer.forward
    steps = 0
    preparing = False

    def noted(*arguments: Any) -> None:
        nonlocal preparing
        preparing = True
        prepare(*arguments)
        preparing = False

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal steps
        steps += preparing
        if steps == 3:
            raise KeyboardInterrupt
        return forward(*arguments, **options)

    paged.nodes.prepare = noted
    play.wm.transformer.forward = failing
    with pytest.raises(KeyboardInterrupt):
        searched(play, 3)
    paged.nodes.prepare = prepare
    play.wm.transformer.forward = forward
    play.judged = True
    play.step([0] * ENVS)  # the search may go on: nothing of the step that failed is left
    play.step([len(play.tree) - 1] * ENVS)
    assert max(error.max() for error in play.errors) < BITS
    paged.end_search()
    paged.cache.check()
    assert paged.cache.live_sequences <= 2 * ENVS
    searched(play)
    paged.manager.check()


def test_contexts_that_are_cleared_amid_a_search() -> None:
    play = player(True, num_pages=8, max_pages=60)
    play.root()
    for places in ([0] * 4, [1] * 4, [2] * 4):
        play.step(places)
    with quiet():
        play.wm.clear_caches()
    play.step([3] * 4)
    play.step([1] * 4)
    play.wm.paged.cache.check()
    play.search(4)


def test_reanalysis_has_nothing_to_do_with_the_nodes_of_a_search() -> None:
    """Its searches are announced like all others, and are as wide as a batch of training."""
    play = searched(player(True, num_pages=8, max_pages=60), 1)
    wm = play.wm
    rows = 3 * ENVS
    times = np.arange(2 * ENVS).reshape(ENVS, 2)  # LightZero adds one to each row of them
    latents = np.zeros((rows, 1, wm.embed_dim), np.float32)
    wm.reanalyze_phase = True
    for simulation in range(2):
        wm.paged.nodes.choose([simulation] * rows, range(rows), [[0]] * rows)
        play.model.recurrent_inference(
            [(latents, torch.zeros(rows, dtype=torch.int64))], simulation, [1] * rows, times
        )
        wm.paged.nodes.learn([0.0] * rows, [0.0] * rows, [[0.0, 0.0]] * rows)
    wm.reanalyze_phase = False
    searched(play, 1)
    wm.paged.manager.check()


def test_a_pool_without_room_for_the_roots_says_so() -> None:
    play = player(True, context=40, num_pages=8, max_pages=16)
    with pytest.raises(OutOfPages, match="pinned"):
        searched(play, 20)
    play.wm.paged.cache.check()


def test_contexts_found_by_latent_state_are_lost_with_one_warning() -> None:
    with pytest.warns(UserWarning, match="begin anew without their context") as told:
        play = searched(player(True, keys="latent", num_pages=8, max_pages=40), 4)
    assert len(told) == 1
    stats = play.wm.paged.manager.stats
    assert stats.recur.evictions > 0 < stats.combined.misses
    play.wm.paged.cache.check()


def test_an_order_that_nobody_knows_is_refused() -> None:
    with pytest.raises(BadCount, match="eviction is 'mru', allowed is 'search' or 'lru' or 'fifo'"):
        player(True, eviction="mru")

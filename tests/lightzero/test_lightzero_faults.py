"""Faults of LightZero 0.2.0's own cache: each is shown on it, and shown to be absent on pages.

Every answer is compared with the same window replayed alone (`lightzero_oracle`): `BITS` is
rounding, `WRONG` is not.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from lightzero_oracle import Player, Window, heed_context
from lightzero_trees import build_model as small_model

pytestmark = pytest.mark.lightzero
BITS = 2e-5
WRONG = 1e-2
CONTEXT = 16  # no window slides: the correction of learned positions is approximate on both sides

both_positions = pytest.mark.parametrize("rotary", [True, False], ids=["rotary", "learned"])


def build_model(**options: Any) -> Any:
    """A model whose windows do not slide in these tests."""
    model = small_model(**{"context": CONTEXT, **options})
    heed_context(model.world_model)
    return model


def attached(model: Any, **options: Any) -> Any:
    """A copy of the model on pages."""
    from paged_kv.integrations.lightzero import attach

    return attach(copy.deepcopy(model), **options)


def pair(model: Any, envs: int = 4, **options: Any) -> tuple[Player, Player]:
    """The same model and the same random numbers on LightZero's cache and on pages."""
    return Player(copy.deepcopy(model), envs), Player(attached(model, **options), envs)


def check(player: Player) -> None:
    player.wm.paged.cache.check()
    player.wm.paged.manager.check()


def start_again(player: Player, row: int, node: tuple[Window, int]) -> tuple[Window, int]:
    """A node without its context: its own token, which LightZero then encodes at the time of the
    root.
    """
    window, depth = node
    return (window[-1]._replace(position=2 * player.times[row]),), depth


def collide(model: Any) -> Any:
    """As in a fresh model: the observation head is zero, so that it predicts one latent state for
    everything.
    """
    last = model.world_model.head_observations.head_module[2]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    return model


@both_positions
def test_colliding_latents(rotary: bool) -> None:
    """One key for all nodes: LightZero goes on from whichever node was stored last."""
    own, ours = pair(collide(build_model(rotary=rotary)))
    for player in (own, ours):
        player.root()
        player.step([0] * 4, [0, 1, 0, 1])
        player.step([1] * 4)
    assert own.errors[1].max() < BITS, "the first nodes start from the roots, whose keys differ"
    assert own.errors[2][[0, 2]].min() > WRONG, (
        "these rows continue the context of row 3, which acted otherwise"
    )
    assert ours.worst() < BITS
    for _ in range(3):
        ours.search(3)
    assert ours.worst() < BITS
    check(ours)


@both_positions
def test_more_simulations_than_the_ring_has_places(rotary: bool) -> None:
    """The ring has room for the world model's own number of simulations, and overwrites live nodes
    after that.
    """
    own, ours = pair(build_model(rotary=rotary, envs=2), envs=2)
    ring = own.wm.num_simulations
    for player in (own, ours):
        player.root()
        for made in range(ring + 5):  # a binary tree: every node another one
            player.step([made // 2] * 2, [made % 2] * 2)
        player.step([1, 1])
    assert max(error.max() for error in own.errors[:-1]) < BITS
    assert own.errors[-1].max() > WRONG, "the first node's place was taken by a later one"
    assert ours.worst() < BITS
    check(ours)


@both_positions
@pytest.mark.parametrize("keys", ["node", "latent"])
def test_a_node_that_is_not_found(rotary: bool, keys: str) -> None:
    """A miss among the search nodes is a TypeError on LightZero's list; on pages the node starts
    from its own token.
    """
    own, ours = pair(build_model(rotary=rotary), keys=keys)
    for player in (own, ours):
        player.search(3, level=True)
        player.wm.past_kv_cache_recurrent_infer.clear()
    with pytest.raises(TypeError, match="list indices must be integers"):
        own.step([1] * 4)
    assert ours.worst() < BITS
    ours.tree[1] = [start_again(ours, row, node) for row, node in enumerate(ours.tree[1])]
    hits = ours.wm.hit_count
    ours.step([1] * 4)
    assert ours.wm.hit_count == hits
    ours.step([4] * 4)  # the nodes that come after it keep their names
    ours.step([0] * 4)
    assert ours.wm.hit_count == hits + 8
    assert ours.worst() < BITS
    check(ours)


@pytest.mark.parametrize("keys", ["node", "latent"])
def test_a_root_released_during_the_search(keys: str) -> None:
    own, ours = pair(build_model(rotary=False), keys=keys)
    for player in (own, ours):
        player.search(2, level=True)
        player.wm.past_kv_cache_init_infer_envs[2].clear()
    with pytest.raises(TypeError, match="list indices must be integers"):
        own.step([0] * 4)
    window, depth = ours.tree[0][2]
    ours.tree[0][2] = (window[-1:], depth)
    ours.step([0] * 4)
    assert ours.worst() < BITS
    check(ours)


@both_positions
@pytest.mark.parametrize("keys", ["node", "latent"])
def test_no_context(rotary: bool, keys: str) -> None:
    """With a context length of 2 nothing is stored, and LightZero's first simulation raises."""
    own, ours = pair(build_model(rotary=rotary, context=2), keys=keys)
    for player in (own, ours):
        player.root()
    with pytest.raises(TypeError, match="list indices must be integers"):
        own.step([0] * 4)
    ours.step([0] * 4)
    ours.tree[1] = [start_again(ours, row, node) for row, node in enumerate(ours.tree[1])]
    ours.step([1, 0, 1, 0])
    assert ours.worst() < BITS
    assert ours.wm.paged.cache.pages_in_use == 0


@pytest.mark.parametrize("keys", ["node", "latent"])
def test_stale_entries_of_the_root_ring(keys: str) -> None:
    """LightZero never forgets a key, but its two places are taken in turn: an old key finds a newer
    context.
    """
    own, ours = pair(build_model(rotary=False), keys=keys)
    for player in (own, ours):
        player.root()
        first = player.observations
        window = dict(player.windows)
        player.root()
        player.root()
        # the next root continues the first one
        player.observations = first
        player.windows = window
        player.root()
    assert own.wm.root_hit_cnt == own.wm.root_total_query_cnt == 12
    assert own.errors[-1].min() > WRONG, "all four were found, with the context of the third root"
    assert ours.wm.root_hit_cnt == 8, (
        "a root is known until the next one: the last four were made anew"
    )
    assert ours.worst() < BITS
    check(ours)


def test_priority_eviction() -> None:
    """LightZero's later manager raises ValueError at the first eviction by priority; there is none
    in 0.2.0.
    """
    from paged_kv import KVCacheManager, PagedKVCache

    cache = PagedKVCache(layers=1, heads=1, head_size=2, page_size=2, num_pages=8)
    manager = KVCacheManager(cache, env_count=1, recur_entries=2, recur_policy="priority")
    for key, priority in (("low", 1.0), ("high", 3.0), ("middle", 2.0), ("higher", 4.0)):
        manager.set_recur_cache(key, cache.new(1)[0], priority)
    assert sorted(manager.recur_pool) == ["high", "higher"]
    assert manager.stats.recur.evictions == 2
    manager.check()
    cache.check()


def test_colliding_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightZero believes an equal hash; with keys="latent" the states themselves are compared."""
    from lzero.model.unizero_world_models import world_model

    monkeypatch.setattr(world_model, "hash_state", lambda state: "the same for all")
    own, ours = pair(build_model(rotary=True), keys="latent")
    for player in (own, ours):
        for _ in range(3):
            player.search(3, level=True)
    assert own.worst() > WRONG
    assert ours.worst() < BITS
    unknown = ours.wm.paged.lookup([b"a state that was never stored"] * 4)
    assert unknown == [None] * 4
    check(ours)


@both_positions
@pytest.mark.parametrize("keys", ["node", "latent"])
@pytest.mark.parametrize("at", ["read", "write"])
def test_unequal_contexts_in_one_batch(rotary: bool, keys: str, at: str) -> None:
    """LightZero attends to the zeros in front of shorter windows; here every row answers as it does
    alone.
    """
    own, ours = pair(build_model(rotary=rotary), keys=keys, at=at)
    for player in (own, ours):
        player.search(1)
        player.step([0, 1, 0, 1])
    assert own.errors[-1][[1, 3]].max() < BITS
    assert own.errors[-1][[0, 2]].min() > WRONG, "the two rows with zeros in front"
    for _ in range(3):
        ours.search(3)
    assert ours.worst() < BITS
    check(ours)


@both_positions
@pytest.mark.parametrize("at", ["read", "write"])
def test_unequal_roots_in_one_batch(rotary: bool, at: str) -> None:
    """A root that was lost starts anew beside older ones: LightZero gives it zeros as tokens, and
    their positions.
    """
    own, ours = pair(build_model(rotary=rotary), at=at)
    for player in (own, ours):
        for _ in range(3):
            player.search(2, level=True)
        player.wm.past_kv_cache_init_infer_envs[1].clear()
        lost = player.windows[1][-1]
        player.windows[1] = (lost._replace(position=lost.position + 2),)
        for _ in range(2):
            player.root(times=[time + 1 for time in player.times])
            player.step([0] * 4)
    assert own.errors[-1][1] > WRONG
    assert ours.worst() < BITS
    assert ours.wm.keys_values_wm.masked
    check(ours)


@both_positions
@pytest.mark.parametrize("at", ["read", "write"])
def test_rows_do_not_depend_on_each_other_after_slides(rotary: bool, at: str) -> None:
    """A window that slid is no longer what a replay gives; but it is the same in any company."""
    model = attached(build_model(rotary=rotary, context=8), at=at)
    draw = np.random.default_rng(1)
    script = [
        (
            draw.normal(size=(4, 4)).astype(np.float32),
            draw.integers(2, size=(6, 4)),
            [draw.integers(made + 1, size=4) for made in range(5)],
        )
        for _ in range(6)
    ]

    def play(rows: list[int]) -> list[torch.Tensor]:
        player = Player(copy.deepcopy(model), len(rows))
        for seen, actions, places in script:
            player.root(torch.from_numpy(seen[rows]))
            for place, action in zip(places, actions):
                player.step(place[rows].tolist(), action[rows].tolist())
            player.actions = actions[-1][rows].tolist()
        check(player)
        return player.values

    together = play([0, 1, 2, 3])
    for row in range(4):
        for value, alone in zip(together, play([row])):
            assert (value[row] - alone[0]).abs().max() < BITS


def test_padding_as_lightzero_sees_it() -> None:
    """`padding="attended"`: LightZero's numbers, for agents that are compared with it."""
    own, ours = pair(build_model(rotary=True), padding="attended")
    for player in (own, ours):
        player.search(5)
    assert all(np.array_equal(one, other) for one, other in zip(own.errors, ours.errors))
    assert ours.worst() > WRONG


def test_equal_contexts_need_no_mask() -> None:
    player = Player(attached(build_model(rotary=True)))
    for _ in range(2):
        player.search(3, level=True)
        assert not player.wm.keys_values_wm.masked
    player.step([0, 1, 0, 1])
    assert player.wm.keys_values_wm.masked

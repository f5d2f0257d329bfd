"""Contexts whose weights changed since: kept, dropped or refused. Release 0.2.0."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightzero_trees import Searcher, build_model, quiet, same

from paged_kv.errors import BadCount, WeightsChanged

pytestmark = pytest.mark.lightzero


def attached(model: Any, **options: Any) -> Searcher:
    """A copy of a model on pages, and what searches with it."""
    from paged_kv.integrations.lightzero import attach

    return Searcher(attach(copy.deepcopy(model), padding="attended", **options))


def load(model: Any) -> None:
    model.load_state_dict(build_model(rotary=True, seed=5).state_dict())


def learn(model: Any, **options: Any) -> None:
    """A step of an optimizer, as LightZero configures it on a GPU, or with other options."""
    optimizer = torch.optim.AdamW(model.world_model.parameters(), lr=0.1, **options)
    with torch.enable_grad():
        sum(weights.square().sum() for weights in model.world_model.parameters()).backward()
    optimizer.step()


def write_data(model: Any) -> None:
    """A change without a trace, and word of it."""
    for weights in model.world_model.transformer.parameters():
        weights.data.mul_(1.1)
    paged = getattr(model.world_model, "paged", None)
    if paged is not None:
        paged.weights_changed()


CHANGES: dict[str, Callable[[Any], None]] = {
    "load_state_dict": load,
    "optimizer": learn,
    "fused optimizer": lambda model: learn(model, fused=True),
    "data": write_data,
}
changes = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
both_keys = pytest.mark.parametrize("keys", ["node", "latent"])


@changes
def test_kept_as_lightzero_keeps_them(change: Callable[[Any], None]) -> None:
    """The same numbers as on LightZero's own cache, which loses its roots where the encoder
    changed: it finds them by latent state.
    """
    model = build_model(rotary=True)
    own = Searcher(copy.deepcopy(model))
    ours = attached(model, keys="latent")
    by_node = attached(model)
    for searcher in (own, ours, by_node):
        for _ in range(3):
            searcher.search(4)
        change(searcher.model)
        for _ in range(2):
            searcher.search(4)
    assert same(own, ours)
    encoder_stays = change is write_data
    assert ours.wm.root_hit_cnt == own.wm.root_hit_cnt == (16 if encoder_stays else 12)
    assert ours.wm.paged.old.used == (8 if encoder_stays else 0)
    assert same(own, by_node) == encoder_stays
    assert by_node.wm.root_hit_cnt == 16
    assert by_node.wm.paged.old.used == 8, "old windows are old, however far they went on"


@changes
@both_keys
def test_dropped_before_the_next_search(change: Callable[[Any], None], keys: str) -> None:
    """The same numbers as after `clear_caches`."""
    model = build_model(rotary=True)
    ours = attached(model, weights="drop", keys=keys)
    cleared = attached(model, keys=keys)
    for searcher in (ours, cleared):
        for _ in range(3):
            searcher.search(4)
        change(searcher.model)
        if searcher is cleared:
            with quiet():
                searcher.wm.clear_caches()
        for _ in range(2):
            searcher.search(4)
    assert same(ours, cleared)
    assert ours.wm.root_hit_cnt == cleared.wm.root_hit_cnt == 3 * 4
    assert ours.wm.paged.old.used == 0
    ours.wm.paged.cache.check()
    ours.wm.paged.manager.check()


@changes
@both_keys
def test_refused_at_the_next_search(change: Callable[[Any], None], keys: str) -> None:
    ours = attached(build_model(rotary=True), weights="refuse", keys=keys)
    for _ in range(3):
        ours.search(4)
    change(ours.model)
    for _ in range(2):
        with pytest.raises(WeightsChanged, match="4 contexts of the old ones are held: clear_ca"):
            ours.search(4)
        assert [len(pool) for pool in ours.wm.paged.manager.init_pools] == [1] * 4
    with quiet():
        ours.wm.clear_caches()
    ours.search(4)
    ours.search(4)
    ours.wm.paged.cache.check()


@pytest.mark.parametrize("weights", ["keep", "drop", "refuse"])
def test_nothing_happens_where_nothing_changed(weights: str) -> None:
    model = build_model(rotary=False)
    ours = attached(model, weights=weights)
    plain = attached(model)
    for searcher in (ours, plain):
        for _ in range(3):
            searcher.search(4)
            searcher.model.train()
            searcher.wm.precompute_pos_emb_diff_kv()
            searcher.model.eval()
    assert same(ours, plain)
    assert ours.wm.root_hit_cnt == 2 * 4
    assert ours.wm.paged.old.used == 0


@pytest.mark.parametrize("weights", ["drop", "refuse"])
def test_a_search_that_runs_ends_with_what_it_has(weights: str) -> None:
    ours = attached(build_model(rotary=True), weights=weights)
    inner = ours.model.recurrent_inference
    calls = iter(range(1000))

    def learning(*given: Any) -> Any:
        if next(calls) == 6:
            load(ours.model)
        return inner(*given)

    ours.model.recurrent_inference = learning
    ours.search(4)
    ours.search(4)
    assert ours.wm.hit_count == ours.wm.total_query_count == 8 * 4
    if weights == "drop":
        ours.search(4)
        assert ours.wm.root_hit_cnt == 4
    else:
        with pytest.raises(WeightsChanged):
            ours.search(4)


def test_train_mode_is_a_change() -> None:
    ours = attached(build_model(rotary=True), weights="refuse")
    ours.search(3)
    ours.model.train()
    with pytest.raises(WeightsChanged):
        ours.search(3)
    ours.model.eval()
    ours.search(3)


def test_a_target_network_follows_its_own_weights() -> None:
    """Its update puts other storages in place of its own; the model it is a copy of stays."""
    from ding.model import model_wrap

    online = attached(build_model(rotary=True), weights="refuse")
    target = copy.deepcopy(online.model)
    ours = Searcher(target)
    wrapped = model_wrap(
        target, wrapper_name="target", update_type="momentum", update_kwargs={"theta": 0.5}
    )
    for searcher in (online, ours):
        searcher.search(3)
    for _ in range(2):  # addresses may come back
        wrapped.update(build_model(rotary=True, seed=5).state_dict())
    online.search(3)
    with pytest.raises(WeightsChanged):
        ours.search(3)


def test_old_roots_that_are_gone_are_forgotten() -> None:
    """However long contexts of old weights go on, and whatever else they meet."""
    ours = attached(build_model(rotary=True))
    ours.search(2)
    load(ours.model)
    for _ in range(60):
        ours.search(1)
    assert ours.wm.paged.old.used == 60 * 4
    assert not ours.wm.paged.old.crowded
    with quiet():
        ours.wm.clear_caches()
    for _ in range(3):
        ours.search(2)
    assert ours.wm.paged.old.used == 60 * 4


def test_collect_learn_collect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LightZero's own training clears its caches once it learned: no context of old weights is
    left.
    """
    from test_lightzero_collect import cartpole_config, unsaved

    from paged_kv.integrations.lightzero import installed

    with quiet():
        from lzero.entry import train_unizero
        from lzero.policy.unizero import UniZeroPolicy

    def train() -> Any:
        main, create = cartpole_config(updates=2)
        few = {"collector_env_num": 2, "evaluator_env_num": 1}
        main.policy.update(num_simulations=3, n_episode=2, **few)
        main.env.update(n_evaluator_episode=1, **few)
        with installed(weights="refuse"), quiet():
            return train_unizero([main, create], seed=0, max_env_step=200)

    monkeypatch.chdir(tmp_path)
    unsaved(monkeypatch)
    assert train()._collect_model.world_model.root_hit_cnt > 20
    monkeypatch.setattr(UniZeroPolicy, "recompute_pos_emb_diff_and_clear_cache", lambda _: None)
    with pytest.raises(WeightsChanged):
        train()


def test_an_unknown_choice_is_named() -> None:
    with pytest.raises(BadCount, match="weights is 'ask', allowed is 'keep' or 'drop' or 'refuse'"):
        attached(build_model(rotary=True), weights="ask")

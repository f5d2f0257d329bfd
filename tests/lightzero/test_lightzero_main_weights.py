"""Contexts whose weights changed since, on LightZero's main.

Runs where PAGED_KV_LIGHTZERO_MAIN names a checkout of LightZero's main.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

if not os.environ.get("PAGED_KV_LIGHTZERO_MAIN"):
    pytest.skip(
        "not run: PAGED_KV_LIGHTZERO_MAIN names no checkout of LightZero's main",
        allow_module_level=True,
    )

from lightzero_main_drives import (
    Driver,
    build,
    build_policy,
    collect_and_evaluate,
    encode_alone,
    worst,
)
from lightzero_trees import quiet

from paged_kv.errors import WeightsChanged
from paged_kv.integrations.lightzero import attach


def load(wm: Any) -> None:
    wm.load_state_dict({name: weights * 1.1 for name, weights in wm.state_dict().items()})


def learn(wm: Any) -> None:
    optimizer = torch.optim.AdamW(wm.parameters(), lr=0.1)
    with torch.enable_grad():
        sum(weights.square().sum() for weights in wm.parameters()).backward()
    optimizer.step()


def write_data(wm: Any) -> None:
    for weights in wm.transformer.parameters():
        weights.data.mul_(1.1)
    if hasattr(wm, "paged"):
        wm.paged.weights_changed()


CHANGES: dict[str, Callable[[Any], None]] = {
    "load_state_dict": load,
    "optimizer": learn,
    "data": write_data,
}
changes = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
managers = pytest.mark.parametrize("manager", [False, True], ids=["dicts", "manager"])
both_keys = pytest.mark.parametrize("keys", ["node", "latent"])


class Roots:
    """Root steps of three environments, with a search below each."""

    def __init__(self, wm: Any) -> None:
        self.driver = Driver(wm)
        self.wm = wm
        self.last = torch.zeros(3, 1, wm.embed_dim)
        self.time = 0

    @torch.no_grad()
    def play(self, steps: int = 1) -> None:
        for _ in range(steps):
            now = torch.from_numpy(self.driver.latents(3))
            times = torch.full((3,), self.time).numpy()
            actions = [1 if self.time else -1] * 3
            out = self.wm.wm_forward_for_initial_infererence(
                self.last, actions, now, times, [0, 1, 2]
            )
            self.driver.note(out.logits_policy, out.logits_value)
            self.wm.latent_state = now
            self.driver.search(now.numpy(), 4, times)
            self.last = now
            self.time = self.time + 1


@changes
@managers
@both_keys
def test_kept_as_main_keeps_them(change: Callable[[Any], None], manager: bool, keys: str) -> None:
    own = Roots(build("rotary", manager).world_model)
    ours = Roots(attach(build("rotary", manager), keys=keys).world_model)
    for roots in (own, ours):
        roots.play(3)
        change(roots.wm)
        roots.play(2)
    assert worst(own.driver.answers, ours.driver.answers) == 0
    assert ours.wm.root_hit_cnt == own.wm.root_hit_cnt == 4 * 3
    assert ours.wm.paged.old.used == 2 * 3
    if manager:
        assert ours.wm.kv_cache_manager.get_stats_summary()["old_contexts_used"] == 6


@changes
@managers
@both_keys
def test_dropped_before_the_next_search(
    change: Callable[[Any], None], manager: bool, keys: str
) -> None:
    """The same numbers as on main's own cache after `clear_caches`."""
    own = Roots(build("rotary", manager).world_model)
    ours = Roots(attach(build("rotary", manager), keys=keys, weights="drop").world_model)
    for roots in (own, ours):
        roots.play(3)
        change(roots.wm)
        if roots is own:
            with quiet():
                own.wm.clear_caches()
        roots.play(2)
    assert worst(own.driver.answers, ours.driver.answers) == 0
    assert ours.wm.root_hit_cnt == own.wm.root_hit_cnt == 3 * 3
    assert ours.wm.paged.old.used == 0
    ours.wm.paged.cache.check()
    ours.wm.paged.manager.check()


@changes
@both_keys
def test_refused_at_the_next_search(change: Callable[[Any], None], keys: str) -> None:
    ours = Roots(attach(build("rotary"), keys=keys, weights="refuse").world_model)
    ours.play(3)
    held = 3 if keys == "node" else 9
    change(ours.wm)
    for _ in range(2):
        with pytest.raises(WeightsChanged, match=f"and {held} contexts of the old ones are held"):
            ours.play()
    with quiet():
        ours.wm.clear_caches()
    ours.play(2)
    ours.wm.paged.cache.check()


@pytest.mark.parametrize("mode", ["shift", "rotary", "exact", "rebuild"])
def test_nothing_happens_where_nothing_changed(mode: str) -> None:
    plain = Driver(build(mode).world_model)
    ours = Driver(attach(build(mode), at="write", weights="refuse").world_model)
    for driver in (plain, ours):
        driver.play(steps=8)
    assert worst(plain.answers, ours.answers) == 0


def test_a_policy_collects_learns_and_collects() -> None:
    """Main clears its caches once it learned; where it does not, contexts of old weights are found
    out.
    """
    policy = attach(build_policy(), weights="refuse")
    encode_alone(policy._model)
    with quiet():
        collect_and_evaluate(policy, steps=4)
        learn(policy._learn_model.world_model)
        policy.recompute_pos_emb_diff_and_clear_cache()
        collect_and_evaluate(policy, steps=4)
    assert policy._model.world_model.paged.old.used == 0
    learn(policy._learn_model.world_model)
    with quiet(), pytest.raises(WeightsChanged):
        collect_and_evaluate(policy, steps=1)

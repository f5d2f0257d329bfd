"""`paged-kv profile`: what it counts, what it compares, what it prints and writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from profile_format import check_keys

from paged_kv.tools.profile import client, profile
from paged_kv.tools.profile.counters import CACHE, HEADS, MODEL, TRANSFORMS, TREE
from paged_kv.tools.profile.parts import GLUE, PARTS, parted
from paged_kv.tools.profile.presets import PRESETS
from paged_kv.tools.profile.side import RootStep, Setting
from paged_kv.tools.profile.workload import count_ticks
from paged_kv.tools.reference.contexts import ROOT, DenseContexts, PagedContexts


def check_paged_side(result: dict[str, Any]) -> None:
    """What must hold for every workload."""
    paged = result["caches"]["paged"]
    dense = result["caches"]["dense"]
    assert result["fidelity"]["actions_equal"] == result["fidelity"]["actions_compared"] > 0
    assert result["fidelity"]["visit_counts_equal"]
    assert result["ratios"]["kv_bytes_over_unique"] <= 1.1
    assert paged["kv_bytes_peak"] < dense["kv_bytes_peak"]
    assert 0 < paged["tensor_kernels_per_simulation"] <= 6 < dense["tensor_kernels_per_simulation"]
    assert paged["host_copies_per_simulation"] <= 1.5
    assert paged["lookups"] == paged["hits"] + paged["misses"] == dense["lookups"] > 0
    for side in (paged, dense):
        assert side["cache_us_per_simulation"] > 0
        # by construction: both are of the same root steps
        assert 0 < side["cache_share_of_search"] < 1
        parts = side["search_parts_us_per_simulation"]
        assert sum(parts.values()) == pytest.approx(side["search_us_per_simulation"], abs=0.05)
        others = {MODEL, HEADS, TREE, CACHE, GLUE}
        if result["workload"]["client"] == "lightzero":
            others.add(TRANSFORMS)
        assert {part for part, time in parts.items() if time > 0} == others


# -- the reference world model


def test_both_reference_contexts_read_back_alike() -> None:
    torch.manual_seed(0)
    shape = (2, 2, 4, 8, 3)
    dense = DenseContexts(*shape)
    paged = PagedContexts(*shape)
    for step in range(9):
        batches = [
            contexts.open([ROOT if step < 5 else step - 6] * 3) for contexts in (dense, paged)
        ]
        new = torch.randn(2, 2, 3, 2, 1 if step == 0 else 2, 4)
        for layer in range(2):
            for batch in batches:
                batch.update(layer, *new[layer])
            for first, second in zip(*(batch.get(layer) for batch in batches), strict=True):
                assert torch.equal(first, second)
        for contexts in (dense, paged):
            contexts.store(ROOT if step < 5 else step - 5)
        assert dense.root_tokens() == paged.root_tokens()
    assert (dense.lookups, dense.hits) == (paged.lookups, paged.hits) == (27, 24)
    paged.forget_nodes()
    dense.forget_nodes()
    paged.cache.check()
    assert paged.cache.live_sequences == 3


def test_reference_profile(small: dict[str, Any]) -> None:
    check_keys(small)
    check_paged_side(small)
    assert small["fidelity"]["max_abs_value_difference"] == 0
    assert small["workload"]["client"] == "reference"


def test_reference_profile_repeats() -> None:
    first, second = (
        profile("cartpole", envs=2, simulations=3, roots=2, seed=5, reference=True)
        for _ in range(2)
    )
    assert first["fidelity"] == second["fidelity"]
    assert first["caches"]["paged"]["kv_bytes_peak"] == second["caches"]["paged"]["kv_bytes_peak"]


def test_every_root_step_ticks() -> None:
    seen: list[tuple[str, int, int]] = []
    profile(
        "cartpole",
        envs=2,
        simulations=2,
        roots=3,
        reference=True,
        on_tick=lambda *tick: seen.append(tick),
    )
    assert [done for _, done, _ in seen] == list(range(1, count_ticks(PRESETS["cartpole"], 3) + 1))
    assert {stage for stage, _, _ in seen} == {"timing", "counting"}


# -- LightZero


@pytest.mark.lightzero
def test_ties_are_fixed_and_freed_again() -> None:
    from paged_kv.integrations.ties import fixed_ties

    file = client.tree_file()
    from lzero.mcts.ctree.ctree_muzero import mz_tree

    def first_action() -> int:
        roots = mz_tree.Roots(1, [list(range(6))])
        roots.prepare_no_noise([0.0], [[0.0] * 6], [-1])
        bounds = mz_tree.MinMaxStatsList(1)
        results = mz_tree.ResultsWrapper(num=1)
        bounds.set_delta(0.01)
        return int(mz_tree.batch_traverse(roots, 19652, 1.25, 0.99, bounds, results, [-1])[2][0])

    with fixed_ties(file) as fixed:
        assert fixed
        assert len({first_action() for _ in range(40)}) == 1
    assert len({first_action() for _ in range(40)}) > 1


def test_ties_of_a_file_without_the_link_stay() -> None:
    from paged_kv.integrations.ties import fixed_ties

    with fixed_ties(__file__) as fixed:
        assert not fixed


@pytest.mark.lightzero
def test_cartpole_profile() -> None:
    result = profile("cartpole", simulations=10, roots=6)
    check_keys(result)
    check_paged_side(result)
    assert result["fidelity"]["max_abs_value_difference"] < 1e-5
    workload = result["workload"]
    assert (workload["client"], workload["client_version"]) == ("lightzero", "0.2.0")
    assert (workload["weights"], workload["tie_breaking"]) == ("trained", "fixed")
    assert (workload["layers"], workload["context_length"], workload["envs"]) == (2, 8, 8)


@pytest.mark.lightzero
def test_learned_positions_profile() -> None:
    result = profile("atari", envs=2, simulations=4, roots=2)
    check_keys(result)
    check_paged_side(result)
    assert result["workload"]["weights"] == "random"


@pytest.mark.lightzero
@pytest.mark.parametrize("how", ["lightzero", "lean"])
def test_every_part_of_a_step_is_found(how: str) -> None:
    from paged_kv.integrations.lightzero import attach

    setting = Setting(2, 4, 0, torch.device("cpu"), 2, "read")
    side = client.LightZeroSide("paged", PRESETS["cartpole"], setting)
    attach(side._policy, step=how)
    spent = dict.fromkeys(PARTS, 0.0)
    for number in range(2):
        outcome = parted(side, RootStep(number, 4, number), spent, overhead=0.0)
    assert sum(map(sum, outcome.visits)) == 2 * 4
    assert all(spent.values())
    if how == "lean":  # what is measured is what was chosen
        assert side.wm.paged.lean.refused is None
        assert side.wm.paged.lean.steps >= 2 * 4
    assert not any("forward" in part.__dict__ for part in side.wm.modules())

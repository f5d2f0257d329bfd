"""LightZero's main on both caches, and its own tests on pages.

Runs where PAGED_KV_LIGHTZERO_MAIN names a checkout of LightZero's main, with the Python that has it
on its path.
"""

from __future__ import annotations

import copy
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

CHECKOUT = os.environ.get("PAGED_KV_LIGHTZERO_MAIN", "")
if not CHECKOUT:
    pytest.skip(
        "not run: PAGED_KV_LIGHTZERO_MAIN names no checkout of LightZero's main",
        allow_module_level=True,
    )

import lzero  # noqa: E402
from lightzero_main_drives import (  # noqa: E402
    ENVS,
    MODES,
    Driver,
    build,
    build_cartpole_policy,
    build_policy,
    collect_and_evaluate,
    collect_cartpole,
    counters,
    encode_alone,
    forget_root,
    search_with_lightzero,
    worst,
)
from lightzero_trees import quiet  # noqa: E402

from paged_kv.errors import BadCount, UnannouncedNode, UnsupportedVersion  # noqa: E402
from paged_kv.integrations.lightzero import FOUND, attach, installed  # noqa: E402
from paged_kv.integrations.lightzero.main.world_model import (  # noqa: E402
    PagedMainPPOWorldModel,
    PagedMainWorldModel,
)
from paged_kv.integrations.lightzero.shared.versions import FEATURES, MAIN, judge  # noqa: E402

TESTS = (
    "lzero/model/unizero_world_models/tests",
    "lzero/policy/tests/test_unizero_eval_cache_isolation.py",
    "lzero/mcts/tests/test_unizero_reanalysis_context.py",
)
# `pytest.approx` of a tensor without dimensions: fails with pytest 9 whichever cache is used.
FAILS_BY_ITSELF = "test_compute_loss_exposes_cached_open_loop_diagnostics"
# Bit for bit, what was stored without its positions and read with them again: equal up to rounding.
NOT_AT_READ = "test_root_cache_storage_removes_batch_padding"

modes = pytest.mark.parametrize("mode", MODES)
managers = pytest.mark.parametrize("manager", [False, True], ids=["dicts", "manager"])
moments = pytest.mark.parametrize("at", ["read", "write"])
both_keys = pytest.mark.parametrize("keys", ["node", "latent"])


def test_this_is_the_checkout() -> None:
    assert Path(lzero.__file__).is_relative_to(Path(CHECKOUT).resolve())
    assert FOUND == MAIN


def assert_parity(own: Driver, paged: Driver, exact: bool) -> None:
    difference = worst(own.answers, paged.answers)
    assert len(own.answers) > 50
    assert difference == 0 if exact else difference < 1e-5
    assert counters(own.wm) == counters(paged.wm)
    state = paged.wm.paged
    state.cache.check()
    state.manager.check()
    with quiet():
        paged.wm.clear_caches()
    assert state.cache.pages_in_use == 0


def pair(
    mode: str, manager: bool, at: str, keys: str = "latent", misses: float = 0, **more: Any
) -> tuple[Driver, Driver]:
    """The same model and the same random numbers on both caches."""
    own, paged = (build(mode, manager, **more).world_model for _ in range(2))
    return Driver(own, misses=misses), Driver(attach(paged, at=at, keys=keys), misses=misses)


@modes
@managers
@moments
@both_keys
def test_random_play(mode: str, manager: bool, at: str, keys: str) -> None:
    own, paged = pair(mode, manager, at, keys)
    for driver in (own, paged):
        driver.play()
    assert own.wm.kv_padding_unequal_batches > 10
    assert mode in ("shift", "rotary") or own.wm.exact_kv_reset_samples > 50
    assert_parity(own, paged, exact=mode != "shift" or at == "write")


@modes
@managers
@moments
def test_misses(mode: str, manager: bool, at: str) -> None:
    own, paged = pair(mode, manager, at, misses=0.25)
    for driver in (own, paged):
        driver.play()
    assert own.wm.hit_count < own.wm.total_query_count
    assert own.wm.root_hit_cnt < own.wm.root_total_query_cnt
    assert_parity(own, paged, exact=mode != "shift" or at == "write")


@modes
@managers
@moments
@both_keys
def test_reanalysis(mode: str, manager: bool, at: str, keys: str) -> None:
    own, paged = pair(mode, manager, at, keys)
    for driver in (own, paged):
        driver.reanalyze()
    assert own.wm.reanalysis_root_seed_count == 8
    assert_parity(own, paged, exact=mode != "shift" or at == "write")


@modes
@managers
@moments
@both_keys
def test_lightzeros_search(mode: str, manager: bool, at: str, keys: str) -> None:
    own, paged = (encode_alone(build(mode, manager, context=8, envs=4)) for _ in range(2))
    attach(paged, at=at, keys=keys)
    expected = search_with_lightzero(own)
    found = search_with_lightzero(paged)
    assert [visits for visits, _ in found] == [visits for visits, _ in expected]
    values, wanted = (
        [np.array(values) for _, values in searches] for searches in (found, expected)
    )
    if mode != "shift" or at == "write":
        assert all(map(np.array_equal, values, wanted))
    else:
        assert (
            worst(
                *([torch.from_numpy(roots) for roots in searches] for searches in (values, wanted))
            )
            < 1e-4
        )
    assert counters(own.world_model) == counters(paged.world_model)
    assert own.world_model.hit_count == own.world_model.total_query_count > 500


@both_keys
def test_a_policy_collects_and_evaluates(keys: str) -> None:
    own = build_policy()
    paged = attach(build_policy(), at="write", keys=keys)
    for policy in (own, paged):
        encode_alone(policy._model)
    assert collect_and_evaluate(own) == collect_and_evaluate(paged)
    kinds = {
        type(model.world_model) for model in (paged._model, paged._target_model, paged._eval_model)
    }
    assert kinds == {PagedMainWorldModel}
    assert counters(own._model.world_model) == counters(paged._model.world_model)
    assert paged._model.world_model.root_hit_cnt > 5


@moments
@pytest.mark.parametrize("mode", ["shift", "rotary"])
def test_full_windows_that_lightzero_made_itself(at: str, mode: str) -> None:
    """A batch of `KeysValues`, one window of which is full, padding in front of the other; then a
    step from both.
    """
    own, paged = pair(mode, False, at)
    for driver in (own, paged):
        wm = driver.wm
        latents = torch.from_numpy(driver.latents(2))
        dense = wm.transformer.generate_empty_keys_values(n=2, max_tokens=10)
        for layer in dense._keys_values:
            halves = (
                torch.from_numpy(driver.random.randn(2, 2, 9, 32).astype("f4")) for _ in range(2)
            )
            layer.update(*halves)
        wm.keys_values_wm = dense
        wm.latent_state = latents
        wm.update_cache_context(latents, valid_context_lengths=[9, 5], env_ids=[2, 0])
        wm.current_infer_env_ids = [2, 0]
        with torch.no_grad():
            driver.search(latents.numpy(), 6, np.array([5, 6]))
    assert own.wm.hit_count == paged.wm.hit_count == 12
    difference = worst(own.answers, paged.answers)
    assert difference < 1e-5 if mode == "shift" and at == "read" else difference == 0


@moments
@pytest.mark.parametrize("page_size", [1, 2, 3, 16])
def test_any_page_size(at: str, page_size: int) -> None:
    own, paged = (build("shift").world_model for _ in range(2))
    own = Driver(own)
    paged = Driver(attach(paged, at=at, page_size=page_size))
    for driver in (own, paged):
        driver.play(steps=8)
    assert_parity(own, paged, exact=at == "write")


@pytest.mark.parametrize("mode", ["shift", "rotary"])
def test_register_tokens_before_the_window_is_full(mode: str) -> None:
    more = dict(task_embed_option="register_task_embed", register_token_num=4, context=16)
    own, paged = pair(mode, False, "write", **more)  # type: ignore[arg-type]
    for driver in (own, paged):
        driver.play(steps=3, simulations=3)
    assert worst(own.answers, paged.answers) == 0


@managers
def test_back_to_lightzero(manager: bool) -> None:
    from lzero.model.unizero_world_models.world_model import WorldModel

    own, switched = (build("rebuild", manager).world_model for _ in range(2))
    names = set(vars(switched))
    attach(switched, keys="latent")
    Driver(switched).play(steps=4)
    attach(switched, cache="lightzero")
    assert type(switched) is WorldModel
    assert set(vars(switched)) - names <= {
        "latent_state",
        "keys_values_wm_size_list_current",
        "current_infer_env_ids",
    }
    one = Driver(own)
    other = Driver(switched)
    for driver in (one, other):
        driver.play(steps=8)
    assert worst(one.answers, other.answers) == 0
    assert attach(switched, cache="lightzero") is switched


def test_installed_reaches_models_built_inside() -> None:
    from lzero.model.unizero_ppo_model import UniZeroPPOModel
    from lzero.model.unizero_world_models.ppo_world_model import PPOWorldModel
    from lzero.model.unizero_world_models.world_model import WorldModel

    with installed(at="write", keys="latent"):
        with installed(cache="lightzero"):
            pass
        inside = build("shift").world_model
        ppo = build("shift", ppo=True).world_model
    outside = build("shift").world_model
    ppo_outside = build("shift", ppo=True).world_model
    kinds = [type(model) for model in (inside, ppo, outside, ppo_outside)]
    assert kinds == [PagedMainWorldModel, PagedMainPPOWorldModel, WorldModel, PPOWorldModel]
    assert UniZeroPPOModel.world_model_cls is PPOWorldModel
    for one, other in ((outside, inside), (ppo_outside, ppo)):
        own = Driver(one)
        paged = Driver(other)
        for driver in (own, paged):
            driver.play(steps=6)
        assert_parity(own, paged, exact=True)


@managers
def test_deep_copies_share_nothing(manager: bool) -> None:
    online = attach(build("shift", manager), keys="latent").world_model
    driver = Driver(online)
    driver.play(steps=4)
    pages = online.paged.cache.pages_in_use
    target = copy.deepcopy(online)
    assert type(target) is PagedMainWorldModel
    assert target.paged is not online.paged
    assert target.paged.cache.pages_in_use == 0
    assert target.past_kv_cache_init_infer_envs[0].index is target.paged.manager.init_pools[0]
    own = Driver(build("shift", manager).world_model)
    copied = Driver(target)
    for each in (own, copied):
        each.play(steps=5)
    assert worst(own.answers, copied.answers) < 1e-5
    assert online.paged.cache.pages_in_use == pages
    again = pickle.loads(pickle.dumps(online.paged))
    assert (again.cache.pages_in_use, again.options, again.keys) == (
        0,
        online.paged.options,
        "latent",
    )
    assert list(online.state_dict()) == list(build("shift", manager).world_model.state_dict())


@managers
def test_stores_answer_as_lightzero_calls_them(manager: bool) -> None:
    own, paged = pair("shift", manager, "read")
    for driver in (own, paged):
        driver.play(steps=6)
    wm = paged.wm
    env = next(env for env in range(ENVS) if len(wm.past_kv_cache_init_infer_envs[env]))
    roots = wm.past_kv_cache_init_infer_envs[env]
    key = list(roots.keys())[-1]
    context = wm.shared_pool_init_infer[env][roots[key]]
    if manager:
        theirs = own.wm.kv_cache_manager.get_init_cache(env, key)
        assert wm.kv_cache_manager.hierarchical_get(env, key).handle == context.handle
        assert wm.kv_cache_manager.hierarchical_get(env, "nothing") is None
        assert wm.kv_cache_manager.get_stats_summary()["stats_enabled"]
        with pytest.raises(ValueError, match="environment id is 3, allowed is 0 to 2"):
            wm.kv_cache_manager.get_init_cache(3, key)
    else:
        theirs = own.wm.shared_pool_init_infer[env][own.wm.past_kv_cache_init_infer_envs[env][key]]
    assert context.size == theirs.size
    assert wm.custom_copy_kv_cache_to_shared_wm(context) is context is context.clone()
    for layer in range(2):  # what LightZero would hold, positions included
        for half in ("_k_cache", "_v_cache"):
            mine, other = (
                getattr(kv[layer], half)._cache[:, :, : context.size] for kv in (context, theirs)
            )
            torch.testing.assert_close(mine, other)
    roots["again"] = wm.custom_copy_kv_cache_to_shared_init_envs(theirs, env)
    torch.testing.assert_close(
        wm.shared_pool_init_infer[env][roots["again"]][1]._v_cache._cache,
        context[1]._v_cache._cache,
    )
    assert roots.pop("again", None) is not None
    with pytest.raises(KeyError):
        del roots["again"]
    assert roots.get("again") is None
    assert wm.shared_pool_recur_infer[None] is None
    wm.past_kv_cache_recurrent_infer["new"] = wm.custom_copy_kv_cache_to_shared_recur(context)
    assert "new" in wm.past_kv_cache_recurrent_infer
    forget_root(wm, env)
    assert (len(roots), key in roots) == (0, False)
    wm.paged.cache.check()


def test_another_mode_drops_what_is_held() -> None:
    paged = Driver(attach(build("shift"), keys="latent").world_model)
    paged.play(steps=4)
    paged.wm.exact_kv_window_reset = True
    paged.play(steps=6)
    paged.wm.paged.cache.check()
    assert paged.wm.exact_kv_reset_samples > 0


def test_roots_outlive_an_evaluation_in_between() -> None:
    wm = attach(build("rotary"), keys="latent").world_model
    one, other = (torch.from_numpy(Driver(wm, seed).latents(2)) for seed in range(2))
    with torch.no_grad():
        for latents in (one, other):  # collection, evaluation
            wm.wm_forward_for_initial_infererence(latents, [-1, -1], latents, [0, 0], [0, 2])
        wm.wm_forward_for_initial_infererence(one, [1, 2], other, [1, 1], [0, 2])
    assert (wm.root_hit_cnt, wm.root_total_query_cnt) == (2, 2)


@pytest.mark.parametrize("keys", ["node", "latent"])
def test_bits_of_the_encoder(keys: str) -> None:
    """A latent that is encoded again in another batch differs in its last bits: main loses the
    root, with any hash.
    """
    wm = attach(build("rotary"), keys=keys).world_model
    one, other, third = (torch.from_numpy(Driver(wm, seed).latents(2)) for seed in range(3))
    with torch.no_grad():
        wm.wm_forward_for_initial_infererence(one, [-1, -1], one, [0, 0], [0, 2])
        rounded = torch.nextafter(one, torch.full((), torch.inf))
        assert not torch.equal(rounded, one)
        wm.wm_forward_for_initial_infererence(rounded, [1, 2], other, [1, 1], [0, 2])
        assert wm.root_hit_cnt == (2 if keys == "node" else 0)
        hits = wm.root_hit_cnt
        wm.wm_forward_for_initial_infererence(other * 1.001, [1, 2], third, [2, 2], [0, 2])
        assert wm.root_hit_cnt == hits, "another observation, and no root that ends with it"


def test_roots_are_found_when_the_batch_changes() -> None:
    """LightZero's encoder in batches of 2 to 4 environments: roots that main loses, and pages do
    not.
    """
    own = build("rotary", context=8, envs=4)
    paged = attach(build("rotary", context=8, envs=4))
    for model in (own, paged):
        search_with_lightzero(model)
    asked = own.world_model.root_total_query_cnt
    assert own.world_model.root_hit_cnt < paged.world_model.root_hit_cnt == asked > 15


@pytest.mark.parametrize("pages", [False, True], ids=["own", "paged"])
def test_what_was_seen_is_remembered_exactly(pages: bool) -> None:
    """Main makes the memory of vector observations of whole numbers, which cuts off what is copied
    into it.

    It cannot build models for vectors, so that the memory is tested by itself.
    """
    policy = build_policy()
    if pages:
        attach(policy)
    policy.last_batch_obs_collect = torch.full((4, 3, 64, 64), 0)
    seen = torch.rand(2, 3, 64, 64)
    policy._update_last_infer_inputs(
        "last_batch_obs_collect", "last_batch_action_collect", seen, [1, 2], [0, 2], 4
    )
    kept = policy.last_batch_obs_collect
    assert policy.last_batch_action_collect == [1, -1, 2, -1]
    assert torch.equal(kept[[0, 2]], seen if pages else torch.zeros_like(seen).long())
    assert not kept[[1, 3]].any()


@pytest.mark.parametrize("pages", [False, True], ids=["own", "paged"])
def test_clearing_takes_no_later_context(pages: bool) -> None:
    """Main clears its nodes by key and not its notes of who is where: the ring throws out live
    nodes of one key.
    """
    wm = build("rotary", envs=1, num_simulations=20).world_model
    if pages:
        wm = attach(wm, keys="latent")
    driver = Driver(wm)
    root = torch.from_numpy(driver.latents(1))
    for _ in range(3):  # three times the same search: equal latents, equal keys
        driver.random = np.random.RandomState(1)
        with torch.no_grad():
            wm.wm_forward_for_initial_infererence(root, [-1], root, [0], [0])
            wm.latent_state = root
        driver.search(root.numpy(), 14, np.zeros(1, int))
    assert (wm.hit_count == wm.total_query_count) == pages


@pytest.mark.parametrize("pages", [False, True], ids=["own", "paged"])
def test_more_simulations_than_the_ring_has_places(pages: bool) -> None:
    """Main's ring of nodes has the length of the model's `num_simulations`: it overwrites those of
    longer searches.
    """
    wm = build("rotary", envs=1, num_simulations=10).world_model
    if pages:
        wm = attach(wm)
    driver = Driver(wm)
    driver.play(steps=2, simulations=30, envs=1)
    assert (wm.hit_count == wm.total_query_count == 60) == pages


@managers
def test_every_root_of_cartpole_is_found(manager: bool) -> None:
    """A real collection: main's own cache finds not one root again, pages find all of them."""
    found = []
    for pages in (False, True):
        policy = build_cartpole_policy(manager)
        if pages:
            attach(policy)
        with quiet():
            going_on = collect_cartpole(policy, steps=40)
        wm = policy._collect_model.world_model
        assert wm.root_total_query_cnt == going_on > 200
        found.append(wm.root_hit_cnt / going_on)
    assert found == [0, 1]


def test_no_context_stores_nothing() -> None:
    paged = Driver(attach(build("shift", context=2)).world_model)
    paged.play(steps=4)
    assert paged.wm.paged.cache.pages_in_use == 0
    assert all(answer.isfinite().all() for answer in paged.answers)


def test_what_cannot_work_is_named() -> None:
    from lzero.model.unizero_world_models.world_model import WorldModel
    from lzero.model.unizero_world_models.world_model_multitask import WorldModelMT

    multitask = WorldModelMT.__new__(WorldModelMT)
    torch.nn.Module.__init__(multitask)
    with pytest.raises(
        BadCount, match="target is 'WorldModelMT', allowed is a WorldModel or a PPOWorldModel"
    ):
        attach(multitask)
    with pytest.raises(BadCount, match="context_length is 9, allowed is an even number"):
        attach(build("rotary", context=9))
    wm = attach(build("rotary")).world_model
    latents = torch.zeros(2, 1, wm.embed_dim)
    with torch.no_grad():
        wm.wm_forward_for_initial_infererence(latents, [-1, -1], latents, [0, 0], [0, 2])
        wm.latent_state = latents
        with pytest.raises(UnannouncedNode, match="2 search nodes, of which 0 were announced"):
            wm.forward_recurrent_inference(
                [(latents.numpy(), torch.zeros(2, 1, dtype=torch.int64))], 0, [0, 0], [0, 0]
            )
    with pytest.raises(ValueError, match="env_ids has 1 entries, latent_state 2 rows"):
        wm.update_cache_context(latents, env_ids=[0])
    assert judge(None, WorldModel) == MAIN
    with pytest.raises(
        UnsupportedVersion, match="of unknown version without update_cache_context"
    ) as error:
        judge(None, type("Old", (), {"update_cache_context": lambda self: None}))
    assert all(name in str(error.value) for name in (*FEATURES, "0.2.0", MAIN))


@managers
@moments
def test_lightzeros_own_tests_on_pages(manager: bool, at: str) -> None:
    """All 82, each world model of which is attached by the plugin."""
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            *TESTS,
            "-q",
            "-rf",
            "-p",
            "no:cacheprovider",
            "--disable-warnings",
            "--tb=short",
            "-p",
            "lightzero_main_plugin",
        ],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PAGED_KV_AT": at,
            "PAGED_KV_MANAGER": str(int(manager)),
            "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests / "support")]),
        },
    )
    text = done.stdout + done.stderr
    failed = re.findall(r"^FAILED \S*::(\w+)", text, re.MULTILINE)
    passed = re.search(r"(\d+) passed", text)
    attached = re.search(r"^paged: (\d+) attached, (\d+) stored", text, re.MULTILINE)
    assert set(failed) <= {FAILS_BY_ITSELF, *([NOT_AT_READ] if at == "read" else [])}, text[-6000:]
    assert passed is not None, text[-6000:]
    assert int(passed[1]) + len(failed) == 82
    assert attached is not None
    assert int(attached[1]) > 30
    assert int(attached[2]) > 15
    assert done.returncode == (1 if failed else 0)

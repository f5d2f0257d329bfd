"""Roots on LightZero's main: one for each environment and phase, and what becomes of them.

Runs where PAGED_KV_LIGHTZERO_MAIN names a checkout of LightZero's main.
"""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if not os.environ.get("PAGED_KV_LIGHTZERO_MAIN"):
    pytest.skip(
        "not run: PAGED_KV_LIGHTZERO_MAIN names no checkout of LightZero's main",
        allow_module_level=True,
    )

import cloudpickle
from lightzero_main_drives import (
    Driver,
    build,
    build_policy,
    encode_alone,
    forget_root,
    search_with_lightzero,
    worst,
)
from lightzero_trees import quiet

from paged_kv.integrations.lightzero import attach

managers = pytest.mark.parametrize("manager", [False, True], ids=["dicts", "manager"])


def act(policy: Any, phase: str, envs: list[int], seen: torch.Tensor, time: int) -> dict[int, Any]:
    """One step of a policy; what it answers for each environment."""
    step = getattr(policy, f"_forward_{phase}")
    more = {"temperature": 1.0, "epsilon": 0.0} if phase == "collect" else {}
    return step(  # type: ignore[no-any-return]
        seen,
        [np.ones(6, "int8")] * len(envs),
        to_play=[-1] * len(envs),
        ready_env_id=envs,
        timestep=np.full(len(envs), time),
        **more,
    )


def images(seed: int, rows: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((rows, 3, 64, 64), np.float32))


@pytest.mark.parametrize("at", ["read", "write"])
def test_an_environment_keeps_one_root_in_each_phase(at: str) -> None:
    """As many tokens are held as the latest windows have, however long the episodes are."""
    policy = attach(build_policy(), at=at)
    paged = policy._model.world_model.paged
    for time in range(12):
        act(policy, "collect", [0, 1, 2, 3], images(time, 4), time)
        if time % 3 == 0:
            act(policy, "eval", [0, 1], images(100 + time, 2), time // 3)
    assert [len(pool) for pool in paged.manager.init_pools] == [2, 2, 1, 1]
    cache = paged.cache
    roots = [root for pool in paged.manager.init_pools for root in pool.handles()]
    assert cache.live_sequences == len(roots) == 6
    assert cache.lengths(roots) == [5] * 6
    assert cache.stored_tokens == 30
    wm = policy._model.world_model
    assert wm.root_hit_cnt == wm.root_total_query_cnt == 11 * 4 + 3 * 2
    paged.cache.check()
    paged.manager.check()


def test_latent_keys_keep_mains_own_number() -> None:
    policy = attach(build_policy(), keys="latent")
    encode_alone(policy._model)
    for time in range(12):
        act(policy, "collect", [0, 1], images(time, 2), time)
    paged = policy._model.world_model.paged
    assert [len(pool) for pool in paged.manager.init_pools] == [12, 12, 0, 0]
    assert paged.init_entries == 256


@managers
def test_clearing_the_caches_keeps_nothing(manager: bool) -> None:
    wm = attach(build("rotary", manager)).world_model
    latents = torch.from_numpy(Driver(wm).latents(2))
    with torch.no_grad():
        wm.wm_forward_for_initial_infererence(latents, [-1, -1], latents, [0, 0], [0, 2])
    held = [weakref.ref(root.latent) for root in wm.paged._roots.values()]
    assert len(held) == 2
    with quiet():
        wm.clear_caches()
    assert [latent() for latent in held] == [None, None]
    assert wm.paged.cache.pages_in_use == 0


def test_two_phases_come_by_one_state_in_different_ways() -> None:
    """Main finds a root by its state alone: evaluation would take collection's place."""
    values = []
    for evaluates in (False, True):
        policy = attach(build_policy())
        encode_alone(policy._model)
        np.random.seed(0)
        state = np.random.get_state()
        act(policy, "collect", [0], images(1, 1), 0)
        np.random.set_state(state)
        act(policy, "collect", [0], images(3, 1), 1)
        if evaluates:
            act(policy, "eval", [0], images(2, 1), 0)
            act(policy, "eval", [0], images(3, 1), 1)
            act(policy, "eval", [0], images(4, 1), 2)
        np.random.set_state(state)
        values.append(act(policy, "collect", [0], images(5, 1), 2)[0]["searched_value"])
        wm = policy._model.world_model
        assert wm.root_hit_cnt == wm.root_total_query_cnt
    assert values[0] == values[1]


def clear_after(wm: Any, steps: int, everything: bool) -> None:
    """Have a world model lose all contexts, or a root, after so many steps of a search."""
    inner = wm.forward_recurrent_inference
    left = iter(range(steps, 0, -1))

    def forgetful(*given: Any) -> Any:
        if next(left, 0) == 1:
            with quiet():
                wm.clear_caches() if everything else forget_root(wm, 1)
        return inner(*given)

    wm.forward_recurrent_inference = forgetful


@managers
@pytest.mark.parametrize("what", ["everything", "one root"])
def test_a_search_goes_on_after_its_contexts_were_cleared(manager: bool, what: str) -> None:
    """What is not found starts from its own token, as on main's own cache; later nodes are found
    again.
    """
    answers = []
    for pages in (False, True):
        wm = build("rotary", manager, envs=3).world_model
        driver = Driver(attach(wm) if pages else wm)
        clear_after(wm, 4, what == "everything")
        latents = torch.from_numpy(driver.latents(3))
        with torch.no_grad():
            wm.wm_forward_for_initial_infererence(latents, [-1] * 3, latents, [0] * 3, [0, 1, 2])
            wm.latent_state = latents
            driver.search(latents.numpy(), 12, np.zeros(3, int))
        answers.append(driver.answers)
        assert wm.hit_count < wm.total_query_count == 36
    assert worst(*answers) == 0
    wm.paged.cache.check()


def test_lightzeros_search_goes_on_after_its_contexts_were_cleared() -> None:
    model = attach(build("rotary", context=8, envs=4))
    inner = model.recurrent_inference
    calls = iter(range(10_000))

    def forgetful(*given: Any) -> Any:
        if next(calls) % 60 == 7:
            with quiet():
                model.world_model.clear_caches()
        return inner(*given)

    model.recurrent_inference = forgetful
    search_with_lightzero(model)
    wm = model.world_model
    assert 0.5 < wm.hit_count / wm.total_query_count < 1
    wm.paged.cache.check()


SEARCH = """
import numpy as np, torch
from functools import wraps
from lzero.mcts.tree_search.mcts_ctree import UniZeroMCTSCtree
from lzero.policy.unizero import UniZeroPolicy
from lightzero_main_drives import build, search_with_lightzero

def wrapped(method):
    @wraps(method)
    def around(*arguments, **options):
        return method(*arguments, **options)
    return around

def show(model):
    search_with_lightzero(model)
    wm = model.world_model
    print(wm.hit_count == wm.total_query_count > 99, wm.root_hit_cnt == wm.root_total_query_cnt > 5)
"""


def run(*code: str) -> str:
    """The last line that a process of its own prints."""
    support = str(Path(__file__).parents[1] / "support")
    path = os.pathsep.join([support, os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def test_methods_that_others_wrapped() -> None:
    wrap = "\n".join(
        f"{owner}.{name} = wrapped({owner}.{name})"
        for owner, name in (
            ("UniZeroMCTSCtree", "search"),
            ("UniZeroPolicy", "_forward_collect"),
            ("UniZeroPolicy", "_update_last_infer_inputs"),
        )
    )
    code = """
from paged_kv.integrations.lightzero import attach
show(attach(build("rotary", context=8, envs=4)))
"""
    assert run(SEARCH, wrap, code) == "True True"


def test_an_attached_model_arrives_pickled_in_another_process(tmp_path: Path) -> None:
    file = tmp_path / "model"
    file.write_bytes(cloudpickle.dumps(attach(build("rotary", context=8, envs=4))))
    code = f"""
import pickle
from pathlib import Path
show(pickle.loads(Path({str(file)!r}).read_bytes()))
"""
    assert run(SEARCH, code) == "True True"

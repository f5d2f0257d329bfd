"""LightZero 0.2.0's own world model on both caches, step by step: the same numbers."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from lightzero_trees import Searcher, build_model, difference, quiet, same

from paged_kv.errors import BadCount, OutOfPages, UnannouncedNode, UnsupportedVersion

pytestmark = pytest.mark.lightzero
KINDS = ("own", "write", "read")


class Forgiving(list):  # type: ignore[type-arg]
    """0.2.0 indexes this pool with None where a node is not found, which a list refuses."""

    def __getitem__(self, index: Any) -> Any:
        return None if index is None else super().__getitem__(index)


def attached(model: Any, kind: str, keys: str = "latent") -> Any:
    """A copy of the model with the cache under test."""
    from paged_kv.integrations.lightzero import attach

    model = copy.deepcopy(model)
    if kind == "own":
        pool = model.world_model.shared_pool_recur_infer
        model.world_model.shared_pool_recur_infer = Forgiving(pool)
        return model
    return attach(model, at=kind, keys=keys, padding="attended")


def trio(envs: int = 4, keys: str = "latent", **options: Any) -> list[Searcher]:
    """The same model and the same random numbers on the three caches."""
    model = build_model(envs=envs, **options)
    return [Searcher(attached(model, kind, keys), envs) for kind in KINDS]


def assert_parity(searchers: list[Searcher]) -> None:
    own, write, read = searchers
    assert len(own.answers) > 10
    assert same(own, write)
    assert difference(own, read) < 1e-5
    for searcher in (write, read):
        searcher.wm.paged.cache.check()
        searcher.wm.paged.manager.check()
        assert searcher.wm.hit_count == own.wm.hit_count
        assert searcher.wm.total_query_count == own.wm.total_query_count
        assert searcher.wm.root_hit_cnt == own.wm.root_hit_cnt


@pytest.mark.parametrize("rotary", [True, False], ids=["rotary", "learned"])
@pytest.mark.parametrize("context", [4, 6, 8, 14])
@pytest.mark.parametrize("keys", ["node", "latent"])
def test_searches_give_the_same_numbers(rotary: bool, context: int, keys: str) -> None:
    searchers = trio(rotary=rotary, context=context, keys=keys)
    for searcher in searchers:
        for _ in range(9):  # the window of 14 tokens slides in the eighth
            searcher.search(5)
        searcher.reset()
        for _ in range(2):
            searcher.search(4)
    assert_parity(searchers)


@pytest.mark.parametrize("page_size", [1, 2, 3, 4, 16])
def test_any_page_size(page_size: int) -> None:
    from paged_kv.integrations.lightzero import attach

    model = build_model(rotary=False)
    own = Searcher(copy.deepcopy(model))
    paged = Searcher(attach(model, at="write", page_size=page_size, padding="attended"))
    for searcher in (own, paged):
        for _ in range(6):
            searcher.search(6)
    assert same(own, paged)
    paged.wm.paged.cache.check()


@pytest.mark.parametrize("rotary", [True, False], ids=["rotary", "learned"])
@pytest.mark.parametrize("context", [6, 8])
@pytest.mark.parametrize("keys", ["node", "latent"])
def test_lost_roots_and_rows_of_different_lengths(rotary: bool, context: int, keys: str) -> None:
    searchers = trio(rotary=rotary, context=context, keys=keys)
    for searcher in searchers:
        for step in range(12):
            searcher.search(4)
            if step % 3 == 1:
                searcher.wm.past_kv_cache_init_infer_envs[step % 4].clear()
    assert_parity(searchers)
    assert searchers[0].wm.root_hit_cnt < searchers[0].wm.root_total_query_cnt


@pytest.mark.parametrize("rotary", [True, False], ids=["rotary", "learned"])
def test_lost_nodes_start_from_their_own_token(rotary: bool) -> None:
    searchers = trio(rotary=rotary)
    for searcher in searchers:
        forget_sometimes(searcher)
        for _ in range(6):
            searcher.search(8)
    assert_parity(searchers)
    assert searchers[0].wm.hit_count < searchers[0].wm.total_query_count


def forget_sometimes(searcher: Searcher) -> None:
    """Clear the search nodes every fifth simulation: those below the roots are then not found."""
    inner = searcher.model.recurrent_inference
    calls = iter(range(10_000))

    def forgetful(*arguments: Any) -> Any:
        if next(calls) % 5 == 4:
            searcher.wm.past_kv_cache_recurrent_infer.clear()
        return inner(*arguments)

    searcher.model.recurrent_inference = forgetful


@pytest.mark.parametrize("rotary", [True, False], ids=["rotary", "learned"])
def test_one_key_for_all_nodes(rotary: bool) -> None:
    """The observation head of a fresh model is zero: all predicted states are one, and the latest
    context answers.
    """
    searchers = trio(rotary=rotary)
    for searcher in searchers:
        last = searcher.wm.head_observations.head_module[2]
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.zeros_(last.bias)
        for _ in range(5):
            searcher.search(8)
    assert_parity(searchers)
    assert len(searchers[1].wm.paged.manager.recur_pool) == 1


@pytest.mark.parametrize("rotary", [True, False], ids=["rotary", "learned"])
def test_fewer_ready_environments(rotary: bool) -> None:
    searchers = trio(rotary=rotary)
    for searcher in searchers:
        for ready in (4, 4, 3, 3, 2, 2, 2, 1, 1):
            searcher.search(5, ready)
        searcher.reset()
        for _ in range(3):
            searcher.search(5)
    assert_parity(searchers)


def test_clear_caches_frees_every_page() -> None:
    searchers = trio(rotary=True)
    for searcher in searchers:
        searcher.search(6)
        with quiet():
            searcher.wm.clear_caches()
        assert not len(searcher.wm.past_kv_cache_recurrent_infer)
    assert [s.wm.paged.cache.pages_in_use for s in searchers[1:]] == [0, 0]
    for searcher in searchers:
        searcher.search(6)
        searcher.search(6)
    assert_parity(searchers)


def test_new_weights_bring_new_positions() -> None:
    searchers = trio(rotary=False)
    for searcher in searchers:
        for _ in range(5):
            searcher.search(4)
        with torch.no_grad():
            searcher.wm.pos_emb.weight.mul_(-1.5)
        searcher.wm.precompute_pos_emb_diff_kv()
        with quiet():
            searcher.wm.clear_caches()
        searcher.reset()
        for _ in range(5):
            searcher.search(4)
    assert_parity(searchers)


def test_deep_copies_share_nothing() -> None:
    model = build_model(rotary=False)
    reference = Searcher(copy.deepcopy(model))
    online = Searcher(attached(model, "write"))
    for searcher in (reference, online):
        for _ in range(4):
            searcher.search(4)
    pages = online.wm.paged.cache.pages_in_use
    target = copy.deepcopy(online.model)
    state = target.world_model.paged
    assert type(target.world_model) is type(online.wm)
    assert state is not online.wm.paged
    assert state.cache is not online.wm.paged.cache
    assert (state.cache.pages_in_use, state.options, state.at) == (
        0,
        online.wm.paged.options,
        "write",
    )
    own = Searcher(copy.deepcopy(model))
    copied = Searcher(target)
    for searcher in (own, copied):
        for _ in range(4):
            searcher.search(4)
    assert same(own, copied)
    assert online.wm.paged.cache.pages_in_use == pages
    for searcher in (reference, online):
        searcher.search(4)
    assert same(reference, online)


def test_state_dict_and_modes() -> None:
    plain = build_model(rotary=False, seed=1)
    paged = attached(build_model(rotary=False, seed=2), "write")
    assert list(plain.state_dict()) == list(paged.state_dict())
    Searcher(paged).search(3)
    paged.load_state_dict(plain.state_dict())
    plain.load_state_dict(paged.state_dict())
    own = Searcher(plain)
    other = Searcher(paged)
    for searcher in (own, other):
        searcher.wm.precompute_pos_emb_diff_kv()
        with quiet():
            searcher.wm.clear_caches()
        searcher.model.train()
        searcher.model.eval()
        for _ in range(5):
            searcher.search(4)
    assert same(own, other)


def test_a_pickled_model_starts_empty() -> None:
    online = Searcher(attached(build_model(rotary=True), "read"))
    online.search(3)
    again = pickle.loads(pickle.dumps(online.wm.paged))
    assert (again.cache.pages_in_use, again.options) == (0, online.wm.paged.options)


def test_back_to_lightzero() -> None:
    from lzero.model.unizero_world_models.world_model import WorldModel

    from paged_kv.integrations.lightzero import attach

    model = build_model(rotary=False)
    reference = Searcher(copy.deepcopy(model))
    switched = Searcher(attach(model))
    switched.search(3)
    attach(model, cache="lightzero")
    assert type(model.world_model) is WorldModel
    assert not hasattr(model.world_model, "paged")
    switched = Searcher(attach(model, cache="lightzero"))
    for searcher in (reference, switched):
        for _ in range(4):
            searcher.search(4)
    assert same(reference, switched)


def test_both_caches_side_by_side() -> None:
    model = build_model(rotary=True)
    alone = Searcher(attached(model, "write"))
    for _ in range(4):
        alone.search(4)
    own = Searcher(attached(model, "own"))
    paged = Searcher(attached(model, "write"))
    for _ in range(4):
        own.search(4)
        paged.search(4)
    assert same(own, paged)
    assert same(alone, paged)


def test_installed_reaches_models_built_inside() -> None:
    from lzero.model.unizero_world_models.world_model import WorldModel

    from paged_kv.integrations.lightzero import installed
    from paged_kv.integrations.lightzero.release.world_model import PagedWorldModel

    with installed(at="write", padding="attended"):
        inside = build_model(rotary=True)
    with installed(cache="lightzero"):
        plain = build_model(rotary=True)
    outside = build_model(rotary=True)
    kinds = [type(model.world_model) for model in (inside, plain, outside)]
    assert kinds == [PagedWorldModel, WorldModel, WorldModel]
    searchers = [Searcher(outside), Searcher(inside)]
    for searcher in searchers:
        searcher.search(6)
        searcher.search(6)
    assert same(*searchers)


def test_no_context_stores_nothing() -> None:
    searcher = Searcher(attached(build_model(rotary=False, context=2), "read"))
    for _ in range(4):
        searcher.search(3)
    assert searcher.wm.paged.cache.pages_in_use == 0
    assert searcher.wm.hit_count == 0
    assert all(answer.isfinite().all() for answer in searcher.answers)


@pytest.mark.parametrize("rotary", [True, False], ids=["rotary", "learned"])
def test_reanalysis_keeps_no_contexts(rotary: bool) -> None:
    searchers = trio(rotary=rotary)
    times = np.arange(6).reshape(3, 2)
    for searcher in searchers:
        searcher.search(3)
        held = searcher.wm.paged.cache.pages_in_use if searcher is not searchers[0] else 0
        searcher.wm.reanalyze_phase = True
        latents = np.asarray(searcher.random.normal(size=(9, 1, 32)), dtype=np.float32)
        for simulation in range(3):
            actions = torch.from_numpy(searcher.random.integers(2, size=9))
            answer = searcher.model.recurrent_inference(
                [(latents, actions)], simulation, [1] * 9, times
            )
            searcher.answers += [answer.value.clone(), answer.latent_state.clone()]
            latents = answer.latent_state.numpy().copy()
        searcher.wm.reanalyze_phase = False
        if searcher is not searchers[0]:
            assert searcher.wm.paged.cache.pages_in_use == held
        searcher.wm.past_kv_cache_recurrent_infer.clear()
        searcher.search(3)
    assert_parity(searchers)


def test_contexts_are_stored_once() -> None:
    """Page size 2: the pages in use are the unique tokens, and one dead slot a root."""
    searcher = Searcher(attached(build_model(rotary=True), "read"))
    for _ in range(6):
        searcher.search(10)
    cache = searcher.wm.paged.cache
    unique = 4 * 5 + 4 * 10 * 2  # a root window of 5 an environment, two tokens a node
    assert cache.pages_in_use * 2 <= unique + 4
    assert cache.stats.copied_pages == 0


def test_at_read_leaves_pages_shared() -> None:
    read, write = (
        Searcher(attached(build_model(rotary=False), kind)) for kind in ("read", "write")
    )
    for searcher in (read, write):
        for _ in range(6):
            searcher.search(10)
    assert read.wm.paged.cache.pages_in_use < 0.7 * write.wm.paged.cache.pages_in_use


def test_store_objects_answer_as_lightzero_calls_them() -> None:
    searcher = Searcher(attached(build_model(rotary=True), "read"))
    assert [len(keys) for keys in searcher.wm.past_kv_cache_init_infer_envs] == [0] * 4
    searcher.search(3)
    wm = searcher.wm
    assert wm.shared_pool_recur_infer[None] is None
    assert wm.past_kv_cache_recurrent_infer.get("nothing") is None
    env = wm.past_kv_cache_init_infer_envs[1]
    key = next(iter(wm.paged.manager.init_pools[1]))
    entry = wm.shared_pool_init_infer[1][env.get(key)]
    assert entry.size == 1
    assert len(env) == 1
    assert key in env
    assert wm.custom_copy_kv_cache_to_shared_wm(entry) is entry
    wm.past_kv_cache_recurrent_infer["new"] = wm.custom_copy_kv_cache_to_shared_recur(entry)
    # takes the place of the root before
    env["again"] = wm.custom_copy_kv_cache_to_shared_init_envs(entry, 1)
    assert "again" in env
    assert "new" in wm.past_kv_cache_recurrent_infer
    batch = wm.keys_values_wm
    assert (len(batch), batch[0].shape, batch.size) == (
        2,
        (4, 2, batch.size, 16),
        batch._keys_values[1]._k_cache._size,
    )
    assert batch._keys_values[1]._v_cache._cache.shape[:2] == (4, 2)
    wm.paged.cache.check()


def test_exhaustion_is_named() -> None:
    from paged_kv.integrations.lightzero import attach

    searcher = Searcher(attach(build_model(rotary=True), num_pages=6, grow=False))
    with pytest.raises(OutOfPages):
        for _ in range(6):
            searcher.search(10)
    searcher.wm.paged.cache.check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": "dense"}, r"cache is 'dense', allowed is 'paged' or 'lightzero'"),
        ({"at": "never"}, r"at is 'never', allowed is 'read' or 'write'"),
        ({"keys": "row"}, r"keys is 'row', allowed is 'node' or 'latent'"),
        ({"padding": "left"}, r"padding is 'left', allowed is 'masked' or 'attended'"),
    ],
)
def test_bad_choices_are_named(options: dict[str, Any], message: str) -> None:
    from paged_kv.integrations.lightzero import attach

    with pytest.raises(BadCount, match=message):
        attach(build_model(rotary=True), **options)


def test_a_step_outside_of_a_search_is_named() -> None:
    searcher = Searcher(attached(build_model(rotary=True), "read", "node"))
    latents = searcher.root()
    action = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(
        UnannouncedNode, match=r'4 search nodes, of which 0 were announced.*keys="latent"'
    ):
        searcher.model.recurrent_inference([(latents, action)], 0, [1] * 4, [np.array(0)] * 4)
    searcher.wm.paged.cache.check()
    searcher.search(3)


def test_more_environments_than_the_model_knows_are_named() -> None:
    searcher = Searcher(attached(build_model(rotary=True, envs=2), "read", "node"), envs=3)
    with pytest.raises(
        BadCount,
        match="environments in one batch is 3, allowed is 1 to the world model's env_num = 2",
    ):
        searcher.root()


def test_a_target_without_a_world_model_is_named() -> None:
    from paged_kv.integrations.lightzero import attach

    with pytest.raises(BadCount, match=r"target is 'Linear', allowed is a UniZero world model"):
        attach(torch.nn.Linear(1, 1))


def test_other_versions_are_refused() -> None:
    code = """
import importlib.metadata as m
m.version, real = (lambda name: "0.9.9" if name == "LightZero" else real(name)), m.version
import paged_kv.integrations.lightzero
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UnsupportedVersion: LightZero 0.9.9 is installed" in done.stderr
    assert "0.2.0" in done.stderr.splitlines()[-1]
    assert UnsupportedVersion("a", "2", ("1",)).tested == ("1",)


def test_features_tell_the_release_from_main() -> None:
    from lzero.model.unizero_world_models.world_model import WorldModel

    from paged_kv.integrations.lightzero.shared.versions import MAIN, RELEASE, judge

    assert judge("0.2.0", WorldModel) == RELEASE
    with pytest.raises(
        UnsupportedVersion, match="of unknown version without update_cache_context"
    ) as error:
        judge(None, WorldModel)
    assert MAIN in str(error.value)

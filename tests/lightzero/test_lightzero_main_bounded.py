"""Searches of LightZero's main in a pool that is too small for all of their nodes.

Runs where PAGED_KV_LIGHTZERO_MAIN names a checkout of LightZero's main.
"""

from __future__ import annotations

import os
import warnings

import numpy as np
import pytest

if not os.environ.get("PAGED_KV_LIGHTZERO_MAIN"):
    pytest.skip(
        "not run: PAGED_KV_LIGHTZERO_MAIN names no checkout of LightZero's main",
        allow_module_level=True,
    )

from lightzero_main_drives import build, search_with_lightzero

from paged_kv.integrations.lightzero import attach

MODES = ["rotary", "shift", "exact"]


@pytest.mark.parametrize("manager", [False, True], ids=["dicts", "manager"])
@pytest.mark.parametrize("eviction", ["search", "lru"])
@pytest.mark.parametrize("mode", MODES)
def test_visits_are_the_same(mode: str, eviction: str, manager: bool) -> None:
    ample = attach(build(mode, manager, envs=4))
    wanted = search_with_lightzero(ample)
    paged = ample.world_model.paged
    paged.end_search()
    roots = paged.cache.pages_in_use
    pages = roots + (paged.cache.stats.peak_pages - roots) // 3
    tight = attach(build(mode, manager, envs=4), num_pages=8, max_pages=pages, eviction=eviction)
    found = search_with_lightzero(tight)
    assert [visits for visits, _ in found] == [visits for visits, _ in wanted]
    for (_, one), (_, other) in zip(found, wanted):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    paged = tight.world_model.paged
    assert paged.nodes.recomputed > 5
    assert paged.cache.stats.peak_pages <= pages
    paged.cache.check()
    paged.manager.check()


def test_contexts_found_by_hash_are_lost_with_one_warning() -> None:
    tight = attach(build("rotary", envs=4), keys="latent", num_pages=8, max_pages=80)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        search_with_lightzero(tight)
    assert len([one for one in told if "begin anew" in str(one.message)]) == 1
    assert tight.world_model.paged.manager.recur_pool.stats.evictions

"""`step="lean"`: the short step answers what LightZero's own does, and says why where it is not
used.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
from lightzero_trees import Searcher, build_model, difference, same

pytestmark = pytest.mark.lightzero
ROUNDING = 2e-6
both_positions = pytest.mark.parametrize("rotary", [True, False], ids=["rotary", "learned"])


def attached(model: Any, **options: Any) -> Any:
    from paged_kv.integrations.lightzero import attach

    return attach(copy.deepcopy(model), **options)


def play(searcher: Searcher, seed: int = 3) -> Searcher:
    """Episodes that fill the windows, end and begin anew, with partial batches."""
    random = np.random.default_rng(seed)
    for step in range(9):
        searcher.search(4, ready=None if step < 6 else int(random.integers(1, searcher.envs + 1)))
        if step == 4:
            searcher.reset()
    return searcher


def pair(model: Any, **options: Any) -> tuple[Searcher, Searcher]:
    """The same games by LightZero's own steps and by short ones, both on pages."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lean = attached(model, step="lean", **options)
    own = attached(model, step="lightzero", **options)
    return Searcher(own), Searcher(lean)


@both_positions
@pytest.mark.parametrize("padding", ["masked", "attended"])
@pytest.mark.parametrize("at", ["read", "write"])
def test_answers_are_those_of_lightzeros_step(rotary: bool, padding: str, at: str) -> None:
    own, lean = pair(build_model(rotary=rotary), padding=padding, at=at)
    assert difference(play(own), play(lean)) <= ROUNDING
    assert lean.wm.paged.lean.steps == 9 * 4
    assert own.wm.paged.lean is None
    lean.wm.paged.cache.check()


@both_positions
def test_latent_keys_find_the_same_nodes(rotary: bool) -> None:
    own, lean = pair(build_model(rotary=rotary), keys="latent")
    play(own)
    play(lean)
    assert same(own, lean) or difference(own, lean) <= ROUNDING
    assert own.wm.hit_count == lean.wm.hit_count

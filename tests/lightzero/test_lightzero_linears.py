"""LightZero's searches with packed linear layers decide what they decide without."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from paged_kv.errors import BadCount
from paged_kv.linears.packing import has_kernels

pytestmark = pytest.mark.lightzero
SIMULATIONS = 6
PACKS = has_kernels(torch.float32)


@pytest.fixture(scope="module")
def fixed() -> Iterator[bool]:
    """Ties of the tree are broken the same way each time."""
    from paged_kv.integrations.ties import fixed_ties
    from paged_kv.tools.profile.client import tree_file

    with fixed_ties(tree_file()) as done:
        yield done


def player(**options: Any) -> Any:
    """Four environments on pages, with a model of which some layers are large enough to pack."""
    from paged_kv.integrations.lightzero import attach
    from paged_kv.tools.profile.client import LightZeroSide
    from paged_kv.tools.profile.presets import PRESETS
    from paged_kv.tools.profile.side import Setting

    wide = replace(PRESETS["memory"], layers=1, embed=512, context=8, envs=4)
    setting = Setting(4, SIMULATIONS, 0, torch.device("cpu"), 2, "read")
    made = LightZeroSide("paged", wide, setting)
    attach(made._policy, **options)
    return made


def patched(model: torch.nn.Module) -> int:
    """How many layers have a forward of their own."""
    return sum("forward" in part.__dict__ for part in model.modules())


@pytest.mark.parametrize("keys", ["node", "latent"])
def test_searches_decide_the_same(fixed: bool, keys: str) -> None:
    plain = player(keys=keys)
    packed = player(keys=keys, linears="packed")
    assert plain.wm.paged.linears is None
    for seed in range(6):  # past the first full window
        wanted = plain.step(SIMULATIONS, seed)
        found = packed.step(SIMULATIONS, seed)
        if fixed:  # else the clock breaks ties
            assert found.visits == wanted.visits
            assert found.values == pytest.approx(wanted.values, rel=1e-4, abs=1e-4)
        assert patched(packed.wm) == 0
    assert (packed.wm.paged.linears.nbytes > 0) == PACKS
    packed.wm.paged.cache.check()


def test_copies_share_no_packed_weights() -> None:
    packed = player(linears="packed")
    packed.step(SIMULATIONS, 0)
    other = copy.deepcopy(packed._policy)._collect_model.world_model
    assert other.paged.linears is not packed.wm.paged.linears
    assert other.paged.linears.nbytes == 0


def test_weights_that_changed_without_a_trace_are_packed_again() -> None:
    packed = player(linears="packed")
    packed.step(SIMULATIONS, 0)
    packed.wm.paged.weights_changed()
    assert packed.wm.paged.linears.nbytes == 0


def test_a_search_that_is_interrupted_leaves_the_model_as_it_was() -> None:
    packed = player(linears="packed")
    seen = []

    def interrupt(*_: object) -> None:
        seen.append(patched(packed.wm))
        if seen[-1]:  # not at the roots, which are made before the search
            raise KeyboardInterrupt

    packed.wm.transformer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        packed.step(SIMULATIONS, 0)
    assert seen[0] == 0
    assert seen[-1] > 0
    assert patched(packed.wm) == 0


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(BadCount, match=r"linears is 'fast', allowed is 'torch' or 'packed'"):
        player(linears="fast")

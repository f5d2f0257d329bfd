"""Searches of LightZero on pages of int8 codes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightzero_oracle import Player, heed_context
from lightzero_trees import build_model

from paged_kv.errors import BadCount
from paged_kv.integrations.lightzero import attach

pytestmark = pytest.mark.lightzero
ENVS = 4
SIMULATIONS = 16


def searched(rotary: bool, **options: Any) -> Player:
    """It played a few roots, with a search each."""
    model = build_model(rotary=rotary, context=8, envs=ENVS)
    heed_context(model.world_model, 3)
    play = Player(attach(model, **options), envs=ENVS, judged=False)
    for _ in range(3):
        play.search(SIMULATIONS)
    return play


@pytest.mark.parametrize("rotary", [True, False], ids=["rotary", "learned"])
def test_values_stay_close_in_fewer_bytes(rotary: bool) -> None:
    exact = searched(rotary)
    small = searched(rotary, storage="int8")
    ours, theirs = (play.wm.paged.cache for play in (small, exact))
    size = theirs.head_size
    assert theirs.page_bytes / ours.page_bytes == 4 * size / (size + 2)
    assert ours.stats.allocated_pages == theirs.stats.allocated_pages
    found = torch.stack([*map(torch.as_tensor, small.values)])
    wanted = torch.stack([*map(torch.as_tensor, exact.values)])
    off = (found - wanted).abs().max()
    assert 0 < off < 0.05 * wanted.abs().max(), "codes are read, and read right"
    ours.check()


def test_a_copy_of_the_model_has_codes_of_its_own() -> None:
    play = searched(True, storage="int8")
    twin = copy.deepcopy(play.wm)
    assert twin.paged.cache.storage == "int8"
    assert twin.paged.cache.live_sequences == 0


def test_windows_that_are_rewritten_are_refused() -> None:
    model = build_model(rotary=False, context=8, envs=ENVS)
    with pytest.raises(BadCount, match="at is 'write', allowed is 'read' where storage is 'int8'"):
        attach(model, at="write", storage="int8")
    with pytest.raises(BadCount, match="storage is 'int4'"):
        attach(model, storage="int4")

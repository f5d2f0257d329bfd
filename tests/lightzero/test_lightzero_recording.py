"""Recordings of real LightZero searches: of a policy, a model and a world model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from paged_kv.errors import AlreadyRecording, NothingToRecord
from paged_kv.recording import read_recording, record

pytestmark = pytest.mark.lightzero
ENVS = 3
SIMULATIONS = 6


def side(kind: str = "paged", **options: Any) -> Any:
    """LightZero's policy for CartPole, with environments to play in."""
    from paged_kv.tools.profile.client import LightZeroSide
    from paged_kv.tools.profile.presets import PRESETS
    from paged_kv.tools.profile.side import Setting

    setting = Setting(ENVS, SIMULATIONS, 0, torch.device("cpu"), 2, "read", **options)
    return LightZeroSide(kind, PRESETS["cartpole"], setting)


HOLDERS = {
    "policy": lambda s: s._policy,
    "model": lambda s: s._model,
    "world model": lambda s: s.wm,
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_search_is_recorded(holder: str, tmp_path: Path) -> None:
    player = side()
    target = HOLDERS[holder](player)
    with record(target, tmp_path / "run.jsonl", interval=0.0, budget=None) as recorder:
        assert not player.wm.paged.started  # recording makes no cache
        with pytest.raises(AlreadyRecording), record(player.wm, tmp_path / "again.jsonl"):
            pass
        for seed in range(4):
            recorder.mark("search")
            player.step(SIMULATIONS, seed)
    cache = player.wm.paged.cache
    assert "start" not in vars(player.wm.paged)
    assert not cache.turns.listeners
    found = read_recording(tmp_path / "run.jsonl")
    last = found.samples[-1]
    assert found.cache["token_bytes"] == player.token_bytes
    assert (
        last["forks"]
        == cache.stats.forks
        == sum(e["sequences"] for e in found.events if e["name"] == "commit")
    )
    assert last["freed_pages"] == cache.stats.freed_pages == sum(found.lives[-1]["counts"])
    assert (last["queries"], last["hits"]) == player.lookups()
    assert (
        max(sample["bytes_peak"] for sample in found.samples)
        == cache.stats.peak_pages * cache.page_bytes
    )
    assert sum(event["count"] for event in found.events if event.get("mark")) == 4
    for sample in found.samples:
        assert sum(sample["pages_by_refs"].values()) * cache.page_bytes == sample["bytes_in_use"]
        assert sample["bytes_unique"] <= sample["bytes_in_use"] <= sample["bytes_reserved"]
        assert sample["bytes_unique"] <= sample["bytes_dense"]


@pytest.mark.parametrize("keys", ["node", "latent"])
def test_the_tree_of_a_search_is_kept_at_its_peak(keys: str, tmp_path: Path) -> None:
    """By node a search releases its nodes itself; by latent the next one clears the index."""
    player = side(keys=keys)
    player.step(2, 0)
    with record(player.wm, tmp_path / "run.jsonl", interval=1000.0):
        player.step(SIMULATIONS, 1)
        player.step(2, 2)
    tree = max(read_recording(tmp_path / "run.jsonl").trees, key=lambda tree: len(tree["nodes"]))
    assert len(tree["nodes"]) == ENVS * (1 + SIMULATIONS)
    by_id = {node["id"]: node for node in tree["nodes"]}
    roots = [node for node in tree["nodes"] if node["parent"] is None]
    assert len(roots) == ENVS
    for node in tree["nodes"]:
        if node["parent"] is not None:
            # A child has its parent's pages, less those that slid out, and one of its own.
            shared = [page for page in node["pages"] if page in by_id[node["parent"]]["pages"]]
            assert len(shared) >= len(node["pages"]) - 1


def test_recording_changes_nothing(tmp_path: Path) -> None:
    from paged_kv.integrations.ties import fixed_ties
    from paged_kv.tools.profile import client

    with client.quiet():
        tree = client.tree_file()
    with fixed_ties(tree):
        plain = side()
        recorded = side()
        with record(recorded._policy, tmp_path / "run.jsonl", interval=0.0, budget=None):
            for seed in range(6):
                assert plain.step(SIMULATIONS, seed) == recorded.step(SIMULATIONS, seed)


def test_lightzeros_own_cache_is_named(tmp_path: Path) -> None:
    policy = side("dense")._policy
    with (
        pytest.raises(NothingToRecord, match="UniZeroPolicy has no paged"),
        record(policy, tmp_path / "run.jsonl"),
    ):
        pass

"""Recordings and reports of a cache with tiers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from paged_kv import PagedKVCache
from paged_kv.recording import read_recording, record
from paged_kv.tiers import HostTier, Tiers
from paged_kv.tools import cli
from paged_kv.tools.summary import tiers


def recorded(path: Path, places: Tiers | None) -> PagedKVCache:
    """A cache that was recorded while it wrote ten pages and read them."""
    cache = PagedKVCache(layers=1, heads=1, head_size=2, page_size=2, tiers=places)
    with record(cache, path, interval=0):
        seqs = cache.new(5)
        for seq in seqs:
            cache.append([seq], torch.ones(1, 1, 1, 4, 2), torch.ones(1, 1, 1, 4, 2))
        for seq in seqs:
            cache.gather([seq])
    return cache


def test_a_recording_keeps_what_moved(tmp_path: Path) -> None:
    cache = recorded(tmp_path / "run.jsonl", Tiers(4, HostTier()))
    found = read_recording(tmp_path / "run.jsonl")
    assert tiers(found) == cache.tiers
    read = [sample["tiers"][1]["read"] for sample in found.samples]
    assert read == sorted(read)
    assert (read[0], read[-1]) == (0, 10)


def test_a_report_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded(tmp_path / "run.jsonl", Tiers(4, HostTier()))
    assert cli.main(["report", str(tmp_path / "run.jsonl")]) == 0
    said = capsys.readouterr().out
    for text in ("tier", "frames", "host", "given"):
        assert text in said


def test_without_tiers_there_is_nothing_to_show(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded(tmp_path / "run.jsonl", None)
    found = read_recording(tmp_path / "run.jsonl")
    assert not tiers(found)
    assert not any("tiers" in sample for sample in found.samples)
    assert cli.main(["report", str(tmp_path / "run.jsonl")]) == 0
    assert "given" not in capsys.readouterr().out

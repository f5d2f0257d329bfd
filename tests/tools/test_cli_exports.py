"""Exports of recordings to TensorBoard and Prometheus, read back by their real readers."""

from __future__ import annotations

import sys
import threading
import urllib.request
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.parser import text_string_to_metric_families
from recording_tools import State
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from paged_kv import KVCacheManager, PagedKVCache
from paged_kv.errors import MissingPackage, NothingToRecord
from paged_kv.pages.allocator import PageAllocator
from paged_kv.recording import read_recording
from paged_kv.recording.prometheus import PagedKVCollector
from paged_kv.recording.tensorboard import export, scalars
from paged_kv.tools import cli

# -- TensorBoard


@pytest.mark.parametrize("package", ["tensorboardX", "torch.utils.tensorboard"])
def test_tensorboard_reads_the_scalars_back(
    package: str, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if package != "tensorboardX":
        monkeypatch.setitem(sys.modules, "tensorboardX", None)
    recording = read_recording(path)
    assert export(recording, tmp_path) == len(list(scalars(recording)))
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    names = {tag.removeprefix("paged_kv/") for tag in tags}
    assert names >= {"sequences", "pages_by_refs/3-4", "hit_rate", "cache_share"}
    read = events.Scalars("paged_kv/bytes_in_use")
    assert [scalar.value for scalar in read] == [
        sample["bytes_in_use"] for sample in recording.samples
    ]
    assert [scalar.step for scalar in read] == [
        round(sample["t"] * 1000) for sample in recording.samples
    ]
    assert read[0].wall_time == pytest.approx(recording.header["started"], abs=1)


def test_without_a_writer_the_package_is_named(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tensorboardX", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackage, match="pip install tensorboardX"):
        export(read_recording(path), tmp_path)
    assert cli.main(["report", str(path), "--tensorboard", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        "paged-kv: writing for TensorBoard needs tensorboardX or tensorboard: "
        "pip install tensorboardX\n"
    )
    assert not list(tmp_path.iterdir())


# -- Prometheus


def served() -> tuple[PagedKVCache, KVCacheManager]:
    """A cache of 4 pages, all in use, that evicted twice."""
    cache = PagedKVCache(layers=1, heads=1, head_size=2, page_size=2, num_pages=4, grow=False)
    manager = KVCacheManager(cache, env_count=1)
    for name in "abcd":
        (seq,) = cache.new()
        cache.append([seq], torch.ones(1, 1, 1, 4, 2), torch.ones(1, 1, 1, 4, 2))
        manager.set_recur_cache(name, seq)
    for name in "ad":
        manager.get_recur_cache(name)
    return cache, manager


def values(text: str) -> dict[str, tuple[str, dict[str, str], float]]:
    """Sample name -> type of its family, labels, value."""
    return {
        sample.name: (family.type, sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_prometheus_text() -> None:
    cache, manager = served()
    registry = CollectorRegistry()
    registry.register(PagedKVCollector(manager, {"model": "mine"}))
    found = values(generate_latest(registry).decode())
    assert {labels["model"] for _, labels, _ in found.values()} == {"mine"}
    assert {name: (kind, value) for name, (kind, _, value) in found.items()} == {
        "paged_kv_cache_usage_perc": ("gauge", 1.0),
        "paged_kv_cache_queries_total": ("counter", 2.0),
        "paged_kv_cache_hits_total": ("counter", 1.0),
        "paged_kv_cache_evictions_total": ("counter", 2.0),
        "paged_kv_forks_total": ("counter", 0.0),
        "paged_kv_appends_total": ("counter", 4.0),
        "paged_kv_allocated_pages_total": ("counter", 8.0),
        "paged_kv_copied_pages_total": ("counter", 0.0),
        "paged_kv_freed_pages_total": ("counter", 4.0),
        "paged_kv_growths_total": ("counter", 0.0),
        "paged_kv_bytes_in_use": ("gauge", float(4 * cache.page_bytes)),
        "paged_kv_bytes_reserved": ("gauge", float(4 * cache.page_bytes)),
        "paged_kv_bytes_in_use_peak": ("gauge", float(4 * cache.page_bytes)),
        "paged_kv_working_bytes": ("gauge", float(cache.working_bytes)),
        "paged_kv_sequences": ("gauge", 2.0),
    }
    cache.new(3)
    assert registry.get_sample_value("paged_kv_sequences", {"model": "mine"}) == 5
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        registry.register(PagedKVCollector(cache))


def test_a_server_scrapes_while_the_cache_works() -> None:
    cache = PagedKVCache(layers=1, heads=1, head_size=2, page_size=2)
    registry = CollectorRegistry()
    registry.register(PagedKVCollector(cache))
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            cache.release(cache.fork(cache.new(1) * 20) + cache.live()[:1])

    worker = threading.Thread(target=work)
    worker.start()
    try:
        seen = []
        while len(seen) < 20 or seen[-1] < 100:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics") as answer:
                seen.append(values(answer.read().decode())["paged_kv_forks_total"][2])
    finally:
        stop.set()
        worker.join()
        server.shutdown()
        server.server_close()
        thread.join()
    assert seen == sorted(seen)
    assert registry.get_sample_value("paged_kv_forks_total") == cache.stats.forks


def test_a_scrape_waits_for_a_change_to_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PagedKVCache(layers=1, heads=1, head_size=2, page_size=2)
    registry = CollectorRegistry()
    registry.register(PagedKVCollector(cache))
    seen: list[float | None] = []
    scraper = threading.Thread(
        target=lambda: seen.append(registry.get_sample_value("paged_kv_forks_total"))
    )
    hold = PageAllocator.hold

    def slowly(pages: PageAllocator, held: Iterable[int]) -> None:
        monkeypatch.setattr(PageAllocator, "hold", hold)
        scraper.start()
        scraper.join(0.05)
        assert not seen
        hold(pages, held)

    root = cache.new(1)
    monkeypatch.setattr(PageAllocator, "hold", slowly)
    cache.fork(root * 3)
    scraper.join()
    assert seen == [3.0]


def test_what_has_no_cache_yet_exports_nothing() -> None:
    state = State()
    registry = CollectorRegistry()
    registry.register(PagedKVCollector(state))
    assert generate_latest(registry) == b""
    state.start()
    assert registry.get_sample_value("paged_kv_sequences") == 0
    with pytest.raises(NothingToRecord):
        PagedKVCollector(object())


def test_without_prometheus_client_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "paged_kv.recording.prometheus")
    for name in ("prometheus_client", "prometheus_client.core", "prometheus_client.registry"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install prometheus_client"):
        __import__("paged_kv.recording.prometheus")

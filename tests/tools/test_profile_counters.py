"""What a profile counts: kernels, host copies, the time of regions, bytes of storages."""

from __future__ import annotations

import time

import pytest
import torch

from paged_kv.tools.profile.counters import (
    CACHE,
    LAYER,
    MODEL,
    REST,
    HostCopyCounter,
    KernelCounter,
    Probe,
    Probes,
    Regions,
    storage_bytes,
    wrap_overhead,
)


def test_kernels_are_counted_and_views_and_allocations_are_not() -> None:
    regions = Regions()
    regions.now = CACHE
    x = torch.ones(4, 4)
    with KernelCounter(regions) as kernels:
        view = x[1:, :2].transpose(0, 1).unsqueeze(0).detach()
        torch.empty(3)
        torch.empty_like(x)
        assert kernels.counts[CACHE] == 0
        view.add_(1)
        torch.stack([x, x])
        x[0].copy_(x[1])
        x.index_select(0, torch.zeros(1, dtype=torch.long))
    assert kernels.counts[CACHE] == 5  # `zeros` fills, so it counts


def test_host_copies_are_counted_once_each() -> None:
    regions = Regions()
    x = torch.ones(2)
    with HostCopyCounter(regions) as copies:
        x.cpu().numpy()
        x.numpy()
        x[0].item()
        x.tolist()
        x.to("cpu")
        x.to(torch.float64)
        x.sum()
    assert copies.counts[REST] == 5


def test_a_region_suspends_the_one_around_it() -> None:
    regions = Regions()
    model = regions.wrap(lambda: time.sleep(0.02), MODEL)
    cache = regions.wrap(model, CACHE)
    twice = regions.wrap(cache, CACHE)
    twice()
    assert regions.calls == {CACHE: 1, MODEL: 1}
    assert regions.seconds[MODEL] >= 0.02 > 10 * regions.seconds[CACHE]
    assert regions.now == REST
    regions.reset()
    assert not regions.seconds


def test_regions_add_up_to_the_whole() -> None:
    regions = Regions()
    model = regions.wrap(lambda: time.sleep(0.005), MODEL)
    begin = time.perf_counter()
    regions.reset()
    time.sleep(0.005)
    model()
    time.sleep(0.005)
    regions.stop()
    whole = time.perf_counter() - begin
    assert set(regions.seconds) == {MODEL, REST}
    assert regions.seconds[REST] >= 0.01
    assert 0.015 <= sum(regions.seconds.values()) <= whole


def test_a_region_ends_when_its_function_raises() -> None:
    regions = Regions()
    with pytest.raises(ZeroDivisionError):
        regions.wrap(lambda: 1 / 0, CACHE)()
    assert regions.now == REST
    assert wrap_overhead(100) < 1e-4


def test_probes_leave_no_trace() -> None:
    class Owner:
        def method(self) -> int:
            return 1

    owner = Owner()
    original = vars(Owner)["method"]
    probes = [Probe(owner, "method", CACHE), Probe(Owner, "method", LAYER)]
    with Probes(probes, Regions()) as regions:
        assert owner.method() == Owner().method() == 1
        assert regions.calls == {CACHE: 1, LAYER: 1}
    assert vars(owner) == {}
    assert vars(Owner)["method"] is original


def test_storage_bytes_count_a_storage_once() -> None:
    x = torch.zeros(8)
    assert storage_bytes([x, x[2:], x.view(2, 4), torch.zeros(2)]) == 40

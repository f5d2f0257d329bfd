"""LightZero's collectors in actors of a real Ray, which is started and ended here."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import cartpole_collectors
import psutil
import pytest
from cartpole_collectors import digest, make_collector, other_weights
from lightzero_trees import quiet
from local_ray import local_ray

from paged_kv.errors import BadArgument
from paged_kv.integrations.ray import CollectorPool, SeededCollector
from paged_kv.integrations.ray.weights import packed

pytestmark = [pytest.mark.lightzero, pytest.mark.ray]
SEEDS = [11, 12]
PLAY = {"policy_kwargs": {"temperature": 1.0, "epsilon": 0.0}}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return partial(make_collector, str(tmp_path_factory.mktemp("logs")))


@pytest.fixture(scope="module")
def pool(make: Any) -> Iterator[CollectorPool]:
    """Two workers."""
    with (
        local_ray(2, cartpole_collectors),
        CollectorPool(make, 2, timeout=60) as made,
    ):
        yield made


@pytest.fixture(scope="module")
def alone(make: Any) -> SeededCollector:
    """One process."""
    with quiet():
        return SeededCollector(make)


def one_by_one(alone: SeededCollector, episodes: int) -> list[str]:
    with quiet():
        return [digest(alone.collect(seed, n_episode=episodes, **PLAY)) for seed in SEEDS]


def test_two_actors_collect_what_one_process_does(
    pool: CollectorPool, alone: SeededCollector
) -> None:
    state = other_weights(alone.world_model, 0.1)
    with pytest.raises(BadArgument, match="weights"):
        pool.update(state)  # of the world model alone
    for factor in (0.05, 0.1):
        state = other_weights(alone.model, factor)
        alone.load(packed(state))
        version = pool.update(state)
        shards = pool.collect(SEEDS, n_episode=6, **PLAY)
        assert [digest(shard.data) for shard in shards] == one_by_one(alone, 6)
        assert [shard.version for shard in shards] == [version] * 2
    stats = pool.stats()
    assert len({os.getpid(), *(worker.pid for worker in stats.workers)}) == 3
    assert stats.merged.hits > 300
    assert stats.merged.old_used == 0


def test_who_is_killed_in_the_middle_collects_the_same(
    pool: CollectorPool, alone: SeededCollector
) -> None:
    episodes = 24
    (victim, _) = pool.stats().workers
    busy = psutil.Process(victim.pid).cpu_times().user

    def kill_at_work() -> None:
        while psutil.Process(victim.pid).cpu_times().user < busy + 0.2:
            time.sleep(0.01)
        os.kill(victim.pid or 0, signal.SIGKILL)

    killer = threading.Thread(target=kill_at_work)
    killer.start()
    shards = pool.collect(SEEDS, n_episode=episodes, **PLAY)
    killer.join()
    assert [digest(shard.data) for shard in shards] == one_by_one(alone, episodes)
    assert [worker.restarts for worker in pool.stats().workers] == [1, 0]

"""Pools of LightZero's collectors, in this process: workers die and hang when a test says so."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from cartpole_collectors import (
    digest,
    make_collector,
    make_segment_collector,
    other_weights,
)
from in_process import DIES_AFTER, DIES_BEFORE, FINE, HANGS, InProcess
from lightzero_trees import quiet

from paged_kv.errors import (
    BadArgument,
    BadCount,
    ClosedPool,
    NotCopyable,
    WeightsChanged,
    WorkerLost,
)
from paged_kv.integrations.ray import CollectorPool
from paged_kv.integrations.ray.collecting import SeededCollector
from paged_kv.integrations.ray.collector_worker import CollectorRecipe, CollectorWorker
from paged_kv.integrations.ray.weights import packed

pytestmark = [pytest.mark.lightzero, pytest.mark.ray]
SEEDS = [1, 2, 3]
Make = Callable[[], Any]
PLAY = {"policy_kwargs": {"temperature": 1.0, "epsilon": 0.0}}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


class Fates:
    """What becomes of the collect calls that are made, one after the other; then all is fine."""

    def __init__(self, *fates: str) -> None:
        self.left = list(fates)

    def __call__(self, verb: str) -> str:
        return self.left.pop(0) if verb == "collect" and self.left else FINE


def pool_of(
    make: Make,
    fate: Callable[[str], str] = lambda verb: FINE,
    workers: int = 2,
    **options: Any,
) -> CollectorPool:
    recipe = CollectorRecipe(make, {}, options.get("weights", "drop"), 1, workers)
    engine = InProcess(recipe, fate, CollectorWorker)
    return CollectorPool(make, workers, engine=engine, timeout=5, **options)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes a collector of whole episodes."""
    return partial(make_collector, str(tmp_path_factory.mktemp("logs")))


@pytest.fixture(scope="module")
def make_segments(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes a collector that stops within episodes."""
    return partial(make_segment_collector, str(tmp_path_factory.mktemp("logs")))


@pytest.fixture(scope="module")
def states(make: Make) -> list[dict[str, torch.Tensor]]:
    """Weights of three versions."""
    with quiet():
        policy, _ = make()
    return [other_weights(policy._model, factor) for factor in (0.05, 0.1, 0.2)]


def hashes(shards: Sequence[Any]) -> list[str]:
    return [digest(shard.data) for shard in shards]


def alone(make: Make, weights: str = "drop") -> SeededCollector:
    """A collector in this process, without a pool."""
    return SeededCollector(make, weights=weights)


@pytest.fixture(scope="module")
def expected(make: Make, states: Any) -> list[list[str]]:
    """The same shards, one after the other, of the first weights and of each version."""
    with quiet():
        collector = alone(make)
        found = []
        for state in (None, *states):
            if state is not None:
                collector.load(packed(state))
            found.append([digest(collector.collect(seed, **PLAY)) for seed in SEEDS])
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_are_those_of_one_process(
    make: Make, workers: int, states: Any, expected: Any
) -> None:
    with pool_of(make, workers=workers) as pool:
        first = pool.collect(SEEDS, **PLAY)
        assert pool.update(states[0]) == 1
        second = pool.collect(SEEDS, **PLAY)
        stats = pool.stats()
    assert [hashes(first), hashes(second)] == expected[:2]
    assert len(set(hashes(first + second))) == 2 * len(SEEDS)
    assert [shard.version for shard in first + second] == [0] * 3 + [1] * 3
    assert [shard.worker for shard in first] == [place % workers for place in range(3)]
    assert [shard.seed for shard in first] == SEEDS
    assert stats.merged.env_steps == sum(shard.env_steps for shard in first + second) > 100
    assert stats.merged.hits > 500
    assert stats.merged.old_used == 0


def test_a_buffer_takes_what_was_collected(make: Make) -> None:
    from lzero.mcts import UniZeroGameBuffer

    policy, _ = make()
    buffer = UniZeroGameBuffer(policy._cfg)
    with pool_of(make) as pool:
        for shard in pool.collect(SEEDS, **PLAY):
            buffer.push_game_segments(shard.data)
            shard.data[0][0].obs_segment[:] = 0  # nothing of it is read only
    assert buffer.get_num_of_transitions() > 0


def test_a_lost_worker_changes_nothing(make: Make, states: Any, expected: Any) -> None:
    """One is lost in each round but the first: at its first shard, its second, or the other's."""
    fates = Fates(*[FINE] * 3, DIES_BEFORE, *[FINE] * 3, HANGS, FINE, DIES_AFTER)
    with pool_of(make, fate=fates) as pool:
        rounds = []
        for state in (None, *states):
            if state is not None:
                pool.update(state)
            rounds.append(hashes(pool.collect(SEEDS, **PLAY)))
        assert pool.stats().restarts == 3
        assert not fates.left
    assert rounds == expected


def played(pool: CollectorPool, states: Sequence[Any]) -> list[str]:
    """Episodes that go on through updates, several times."""
    found = []
    for _ in range(2):
        found += hashes(pool.collect([1, 2], **PLAY))
        for turn, state in enumerate(states):
            pool.update(state)
            seeds = [10 * turn + 1, 10 * turn + 2]
            found += hashes(pool.collect(seeds, fresh=False, **PLAY))
    return found


def test_no_context_outlives_its_weights(make_segments: Make, states: Any) -> None:
    """Updates between and inside episodes, beside one that keeps old contexts."""
    keeping = alone(make_segments, weights="keep")
    keeping.collect(1, **PLAY)
    keeping.load(packed(states[0]))
    keeping.collect(1, fresh=False, **PLAY)
    assert keeping.figures().old_used > 0
    with pool_of(make_segments) as pool:
        found = played(pool, states)
        assert pool.stats().version == 6
        assert pool.stats().merged.old_used == 0
        assert pool.stats().merged.hits > 300
    assert found[:2] != found[8:10]  # of other weights
    with pool_of(make_segments, Fates(*[FINE] * 7, DIES_AFTER, HANGS)) as pool:
        assert played(pool, states) == found  # in the middle of episodes, after two updates
        assert pool.stats().restarts == 2
        assert pool.stats().merged.old_used == 0


def test_old_contexts_can_be_refused(make_segments: Make, states: Any) -> None:
    with pool_of(make_segments, weights="refuse") as pool:
        pool.collect([1, 2], **PLAY)
        pool.update(states[0])
        with pytest.raises(WeightsChanged):
            pool.collect([1, 2], fresh=False, **PLAY)
        pool.collect([1, 2], **PLAY)  # which begins anew
        assert pool.stats().merged.old_used == 0


def no_room() -> Any:
    raise MemoryError("not enough for this model")


def test_mistakes_are_told(make: Make, states: Any, expected: Any) -> None:
    with pytest.raises(BadArgument, match="make_collector"):
        CollectorPool("nothing", 1)  # type: ignore[arg-type]
    with pytest.raises(BadArgument, match="'keep'"):
        CollectorPool(make, 1, weights="keep")
    with pytest.raises(WorkerLost, match="MemoryError: not enough"):
        pool_of(no_room, workers=1)
    with pool_of(make) as pool:
        with pytest.raises(BadCount, match="seed"):
            pool.collect([-1])
        with pytest.raises(BadCount, match="one a worker, unless fresh"):
            pool.collect([1], fresh=False)
        with pytest.raises(AssertionError, match="n_episode >= env_num"):
            pool.collect([1], n_episode=1, **PLAY)
        with pytest.raises(BadArgument, match="weights"):
            pool.update({"other": torch.zeros(1)})
        with pytest.raises(NotCopyable):
            copy.copy(pool)
        assert pool.update(states[0]) == 1
        assert hashes(pool.collect(SEEDS, **PLAY)) == expected[1]
        assert repr(pool) == "<CollectorPool of 2 workers>"
    with pytest.raises(ClosedPool):
        pool.collect(SEEDS, **PLAY)

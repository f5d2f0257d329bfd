"""CollectorPool: LightZero's collectors in several workers, each with environments of its own."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

from paged_kv.checks import amount, choice, flag, function, listed, seconds, whole
from paged_kv.errors import BadCount, NotCopyable
from paged_kv.integrations.ray.collecting import CollectorFigures
from paged_kv.integrations.ray.collector_worker import Collected, CollectorRecipe, CollectorWorker
from paged_kv.integrations.ray.dispatch import Ask, Dispatch
from paged_kv.integrations.ray.engine import Engine
from paged_kv.integrations.ray.gate import Gate, verb
from paged_kv.integrations.ray.line import Answer, Limits, Line
from paged_kv.integrations.ray.versions import Versions, raise_first

WEIGHTS = ("drop", "refuse")


class Shard(NamedTuple):
    """What one call of a collector brought."""

    data: Any  # what LightZero's collector returned: for `push_game_segments` of its buffer
    seed: int
    worker: int
    version: int  # of the weights
    env_steps: int


class CollectorStats(NamedTuple):
    """One worker. Counts begin anew where it was brought back, but for `restarts`."""

    worker: int
    pid: int | None
    restarts: int
    figures: CollectorFigures  # as of its last answer


class CollectionStats(NamedTuple):
    """All workers."""

    workers: list[CollectorStats]
    merged: CollectorFigures  # sums
    restarts: int
    version: int  # of the weights


class CollectorPool:
    """Workers that hold a UniZero policy on pages, LightZero's own collector on it, and
    environments.

    What is collected depends on weights and seeds alone: neither on the workers nor on one that
    died and was brought back.

    - `make_collector`: makes a policy and its collector, in each worker; it is pickled with what it
      names. All seeds are 0 there, so that workers begin with the same weights.
    - `workers`: how many. `threads`: of torch, in each; `cpus`, `gpus`: that Ray counts for each.
    - `options`: of `integrations.lightzero.attach` in each, such as `padding` and `max_bytes`.
    - `weights`: what becomes of contexts whose weights changed: "drop" forgets them before the next
      search, with "refuse" it raises WeightsChanged. They are never used.
    - `timeout`, `start_timeout`: seconds after which a worker that does not answer is ended and
      brought back; `restarts`: how often without an answer in between. `engine`: what runs the
      workers, by default Ray.

    To be closed, or used as a context manager. Raises BadArgument, BadCount, MissingPackage,
    UnsupportedVersion, WorkerLost; calls raise ClosedPool, ConcurrentCall and NestedCall.
    """

    def __init__(
        self,
        make_collector: Callable[[], tuple[Any, Any]],
        workers: int,
        *,
        options: Mapping[str, Any] | None = None,
        weights: str = "drop",
        threads: int = 1,
        cpus: float = 1,
        gpus: float = 0,
        timeout: float = 600,
        start_timeout: float = 600,
        restarts: int = 3,
        engine: Engine | None = None,
    ) -> None:
        function("make_collector", make_collector, "a function that makes a policy and a collector")
        workers = amount("workers", workers, 1)
        limits = Limits(
            seconds("timeout", timeout),
            seconds("start_timeout", start_timeout),
            whole("restarts", restarts, 0),
        )
        recipe = CollectorRecipe(
            make_collector,
            dict(options or {}),
            choice("weights", weights, WEIGHTS),
            amount("threads", threads, 1),
            workers,
        )
        self._lines: dict[int, Line] = {}
        self._engine = _ray(recipe, cpus, gpus) if engine is None else engine
        self.gate = Gate(range(workers), self._engine.alive)
        self._versions = Versions(self._engine)
        self._dispatch = Dispatch(self._engine, self._lines, in_flight=2)
        self._figures = {name: CollectorFigures() for name in range(workers)}
        try:
            for name in range(workers):
                self._lines[name] = Line(name, self._engine, limits, self._versions.held)
                self._lines[name].call()
            for line in self._lines.values():
                line.start()
        except BaseException:
            self.close()
            raise

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise NotCopyable(type(self).__name__)

    def __repr__(self) -> str:
        return f"<CollectorPool of {len(self._lines)} workers>"

    def __enter__(self) -> CollectorPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all workers, and a Ray that was started for this pool. In a process that forked off
        nothing ends.
        """
        self.gate.closed = True
        if not self.gate.here:
            return
        for line in self._lines.values():
            line.close()
        self._engine.close()

    @verb
    def collect(self, seeds: Iterable[int], *, fresh: bool = True, **arguments: Any) -> list[Shard]:
        """One call of a collector's `collect(**arguments)` for each seed, in the order of seeds.

        With `fresh`, every call begins with environments and a policy as new: any number of seeds,
        which workers take in turn. Without, the episodes of each worker go on where its last call
        left them (LightZero's `MuZeroSegmentCollector` stops within episodes): one seed a worker.
        Raises what collectors raise, BadArgument, BadCount, WeightsChanged, WorkerLost.
        """
        found = [whole("seed", seed, 0) for seed in listed("seeds", seeds, "a list of seeds")]
        anew = flag("fresh", fresh)
        if not anew and len(found) != len(self._lines):
            raise BadCount("seeds", len(found), f"{len(self._lines)}, one a worker, unless fresh")
        dealt = {name: found[name :: len(self._lines)] for name in self._lines}
        version = self._versions.current
        answers = self._dispatch.gather(
            {name: _asks(mine, anew, arguments) for name, mine in dealt.items()}, version
        )
        raise_first(answers)
        collected = {name: self._noted(name, each) for name, each in answers.items()}
        rows = len(self._lines)
        return [
            _shard(collected[place % rows][place // rows], seed, place % rows, version)
            for place, seed in enumerate(found)
        ]

    @verb
    def update(self, state: Any) -> int:
        """Give all workers other weights, the `state_dict` of the policy's model; returns their
        version, which shards of them carry.

        They are handed to the engine once. Raises BadArgument for weights of another model; then
        workers go on with theirs.
        """
        return self._versions.update(state, self._dispatch, self._lines)

    def stats(self) -> CollectionStats:
        """What is held, and was done, as of the last answers."""
        workers = [
            CollectorStats(line.name, line.pid, line.restarts, self._figures[line.name])
            for line in self._lines.values()
        ]
        columns = zip(*self._figures.values())
        return CollectionStats(
            workers=workers,
            merged=CollectorFigures(*(sum(column) for column in columns)),
            restarts=sum(line.restarts for line in self._lines.values()),
            version=self._versions.current,
        )

    def _noted(self, name: int, answers: Sequence[Answer]) -> list[Collected]:
        """What a worker collected; its latest figures are kept."""
        found = [each.reply.value for each in answers if each.call.verb == "collect"]
        if found:
            self._figures[name] = found[-1].figures
        return found


def _asks(seeds: Sequence[int], fresh: bool, arguments: Mapping[str, Any]) -> list[Ask]:
    """The calls for one worker. Where the next one begins anew, those before need no repeating."""
    collects = [Ask("collect", (seed, fresh, dict(arguments))) for seed in seeds]
    if not fresh:
        return collects
    return [ask for each in collects for ask in (Ask("save", ()), each)]


def _shard(collected: Collected, seed: int, worker: int, version: int) -> Shard:
    data = pickle.loads(collected.data.data)
    return Shard(data, seed, worker, version, collected.env_steps)


def _ray(recipe: CollectorRecipe, cpus: float, gpus: float) -> Engine:
    from paged_kv.integrations.ray.cluster import RayEngine

    return RayEngine(recipe, cpus=cpus, gpus=gpus, worker=CollectorWorker)

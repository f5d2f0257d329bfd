"""Workers as actors of Ray."""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from math import ceil, inf
from typing import Any

from paged_kv.errors import BadArgument, MissingPackage, UnsupportedVersion
from paged_kv.integrations.ray.calls import Call
from paged_kv.integrations.ray.engine import Actor, Died, Payload, Ref
from paged_kv.integrations.ray.held_trees import TreeState
from paged_kv.integrations.ray.tape import Order
from paged_kv.integrations.ray.worker import Worker

OLDEST = (2, 60)  # what is tested, and nothing older
MOMENT = 2.0  # seconds
MOST_SECONDS = 1e6  # that Ray is told to wait

# before ray is loaded, which reads it then
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
try:
    import ray
    from ray import cloudpickle
    from ray.exceptions import GetTimeoutError, RayError

    from paged_kv.integrations.ray.metrics import telling
except ImportError:
    raise MissingPackage("a pool of workers", "ray", "'paged-kv[ray]'") from None


class Shared:
    """A local Ray that was started for a pool: the last pool that uses it ends it."""

    def __init__(self) -> None:
        self.users: set[int] = set()
        self.session = ""

    def use(self, user: int, cpus: int) -> str:
        """Have a Ray; the name of its session."""
        if not ray.is_initialized():
            start_local(cpus)
            self.users.clear()
            self.session = session()
        if session() == self.session:
            self.users.add(user)
        return session()

    def leave(self, user: int) -> None:
        """End it, unless another pool uses it."""
        if user in self.users:
            self.users.discard(user)
            if not self.users and session() == self.session:
                ray.shutdown()


SHARED = Shared()


class RayEngine:
    """Actors, each a `worker` made from `recipe`, a named tuple that says among others how many
    `workers` there will be. Where Ray runs nowhere in this process, a local one is started, and
    ended by `close` of the last engine that uses it.

    Ray neither restarts actors nor repeats calls by itself: a call that it repeated might be
    carried out twice. Raises BadArgument for what cannot be pickled, UnsupportedVersion.
    """

    def __init__(
        self, recipe: Any, *, cpus: float, gpus: float, worker: type[Any] = Worker
    ) -> None:
        check_version(ray.__version__)
        check_share("cpus", cpus)
        check_share("gpus", gpus)
        _check_sendable(recipe)
        self._recipe = partial(cloudpickle.loads, cloudpickle.dumps(recipe))
        self._worker = ray.remote(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0, max_concurrency=1
        )(worker)
        try:
            self._session = SHARED.use(
                id(self), max(os.cpu_count() or 1, ceil(cpus * recipe.workers))
            )
            _warn_of_less(CPU=cpus * recipe.workers, GPU=gpus * recipe.workers)
        except BaseException:
            SHARED.leave(id(self))
            raise

    def hire(self) -> Actor:
        """A new actor."""
        return self._worker.remote(self._recipe, telling)

    def stop(self, actor: Actor) -> None:
        """Kill an actor, unless all were ended with their Ray."""
        if self.alive():
            ray.kill(actor, no_restart=True)

    def hello(self, actor: Actor) -> Ref:
        """As `Worker.hello`."""
        return actor.hello.remote()

    def begin(
        self,
        actor: Actor,
        number: int,
        version: int,
        weights: Payload | None,
        states: Mapping[int, TreeState],
    ) -> Ref:
        """As `Worker.begin`."""
        return actor.begin.remote(number, version, weights, dict(states))

    def record(self, actor: Actor, order: Order | None, reason: str) -> Ref:
        """As `Worker.record`."""
        return actor.record.remote(order, reason)

    def run(self, actor: Actor, call: Call, payload: Payload | None) -> Ref:
        """As `Worker.run`; the actor gets what the payload stands for."""
        return actor.run.remote(call, payload)

    def give(self, actor: Actor, call: Call) -> tuple[Ref, Payload]:
        """As `Worker.give`. What it returns belongs to this process, whatever becomes of the
        actor.
        """
        ref, payload = actor.give.options(num_returns=2).remote(call)
        return ref, payload

    def seal(self, value: Any) -> bytes:
        """Pickled with functions and classes that no module has."""
        return bytes(cloudpickle.dumps(value))

    def put(self, value: Any) -> Payload:
        """Have the object store hold an object."""
        return ray.put(value)

    def wait(self, refs: Sequence[Ref], seconds: float) -> list[Ref]:
        """Those that can be had; waits for one."""
        ready, _ = ray.wait(list(refs), num_returns=1, timeout=min(seconds, MOST_SECONDS))
        if not ready:
            return []
        more, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0)
        return list(more)

    def result(self, ref: Ref, seconds: float) -> Any:
        """An answer, or a payload: arrays in it are those of the object store, to be read only."""
        try:
            return ray.get(ref, timeout=min(seconds, MOST_SECONDS))
        except GetTimeoutError as error:
            raise Died(f"it gave no answer within {seconds:g} seconds") from error
        except RayError as error:  # of the actor, its process, its machine, or the object store
            raise Died(_told(error)) from error

    def alive(self) -> bool:
        """Whether the Ray that was there at first still is."""
        return session() == self._session

    def now(self) -> float:
        """Seconds since some moment."""
        return time.monotonic()

    def close(self) -> None:
        """End the local Ray, if it was started here and nobody else uses it."""
        SHARED.leave(id(self))


def session() -> str:
    """The Ray that this process is connected to, "" if there is none."""
    if not ray.is_initialized():
        return ""
    found = ray.get_runtime_context()
    return f"{found.get_node_id()} {found.get_job_id()}"


def start_local(cpus: int, store_bytes: int = 200_000_000) -> None:
    """Start a Ray of this process and machine alone, without a dashboard and without statistics.

    `store_bytes` of shared memory: trees that move and snapshots lie there.
    """
    ray.init(
        num_cpus=cpus,
        include_dashboard=False,
        object_store_memory=store_bytes,
        log_to_driver=False,
        logging_level="warning",
        _system_config={"worker_niceness": 0},  # searches are what this Ray is there for
    )


def check_version(found: str) -> None:
    """Raise UnsupportedVersion for a Ray that is too old."""
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UnsupportedVersion("ray", found, (f"{oldest} and later",))


def check_share(name: str, value: Any) -> None:
    """Raise BadArgument unless `value` is a number of processors, or a part of one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < inf:
        raise BadArgument(name, value, "a number of at least 0")


def _warn_of_less(**needed: float) -> None:
    """Warn where Ray has fewer processors left than all workers ask for: who comes too late
    waits.
    """
    until = time.monotonic() + MOMENT
    while True:
        free = ray.available_resources()
        lacking = [kind for kind, count in needed.items() if count > free.get(kind, 0)]
        if not lacking:
            return
        if time.monotonic() > until:
            break
        time.sleep(MOMENT / 10)  # of workers that have just ended, it is told late
    for kind in lacking:
        warnings.warn(
            f"all workers ask for {needed[kind]:g} {kind}, and Ray has {free.get(kind, 0):g} left: "
            "some wait until there are more, up to `start_timeout`",
            RuntimeWarning,
            stacklevel=6,
        )


def _check_sendable(recipe: Any) -> None:
    for name, value in recipe._asdict().items():
        try:
            cloudpickle.dumps(value)
        except Exception as error:  # whatever a caller's own object raises
            allowed = f"what can be pickled, with all that it names: {error}"
            raise BadArgument(name, value, allowed) from error


def _told(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

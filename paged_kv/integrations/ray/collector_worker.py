"""A worker that collects: LightZero's collector with environments of its own. Any process may hold
one.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from paged_kv.cache import PagedKVCache
from paged_kv.errors import BadArgument
from paged_kv.integrations.ray.calls import Call, Reply
from paged_kv.integrations.ray.collecting import CollectorFigures, SeededCollector
from paged_kv.integrations.ray.once import Once, sendable
from paged_kv.integrations.ray.weights import Weights, check_fit

VERBS = ("weights", "fits", "collect", "save")


class CollectorRecipe(NamedTuple):
    """How a worker is made. It is pickled with what it names."""

    make_collector: Callable[[], tuple[Any, Any]]
    options: Mapping[str, Any]  # of `attach`
    weights: str
    threads: int
    workers: int


class CollectorHello(NamedTuple):
    """Who a worker is."""

    pid: int


class Collected(NamedTuple):
    """What came of a call."""

    data: npt.NDArray[np.uint8]  # pickled: arrays of an object store could not be written to
    env_steps: int
    figures: CollectorFigures


class CollectorWorker:
    """Carries out calls, each once, in the order of their numbers, as `Worker` does.

    Between two calls nothing is worth a snapshot but the weights: a call that begins anew needs no
    other state, and one that goes on is repeated after those before it.
    """

    def __init__(
        self,
        recipe: Callable[[], CollectorRecipe],
        telling: Callable[[PagedKVCache], Callable[[], object]] = lambda cache: lambda: None,
    ) -> None:
        self._recipe = recipe
        self._telling = telling
        self._tell: Callable[[], object] | None = None
        self._version = 0
        self._once = Once()
        self._collector: SeededCollector | None = None

    def hello(self) -> Reply:
        """Make the policy, the environments and the collector, alike in all workers."""
        try:
            recipe = self._recipe()
            torch.set_num_threads(recipe.threads)
            self._collector = SeededCollector(recipe.make_collector, recipe.options, recipe.weights)
        except Exception as error:  # whatever a caller's own function raises
            return Reply(0, None, sendable(error), None)
        return Reply(0, CollectorHello(os.getpid()), None, None)

    def begin(
        self, number: int, version: int, weights: Weights | None, states: Mapping[int, Any]
    ) -> Reply:
        """Be as another worker was when it had answered call `number`, with weights of this
        version.
        """
        try:
            if weights is not None:
                self._ready.load(weights)
        except Exception as error:
            return Reply(number, None, sendable(error), None)
        self._version = version
        return self._once.begin(number)

    def run(self, call: Call, payload: Any = None) -> Reply:
        """Carry out a call; the last one again is answered as before."""
        return self._once.reply(call, lambda: self._done(call, payload))

    def give(self, call: Call) -> tuple[Reply, dict[int, Any]]:
        """A snapshot, which is empty."""
        return self.run(call), {}

    # -- inside

    @property
    def _ready(self) -> SeededCollector:
        if self._collector is None:
            raise BadArgument("worker", self, "one that said hello")
        return self._collector

    def _done(self, call: Call, payload: Any) -> Any:
        args = pickle.loads(call.args)
        if call.verb == "weights":
            self._ready.load(payload)
            self._version = call.version
            return None
        if call.version != self._version:
            raise BadArgument("weights", call.version, f"version {self._version}, which is here")
        if call.verb == "fits":
            return check_fit(self._ready.model, *args)
        if call.verb == "save":
            return []
        if call.verb == "collect":
            return self._collected(*args)
        raise BadArgument("verb", call.verb, ", ".join(VERBS))

    def _collected(self, seed: int, fresh: bool, arguments: Mapping[str, Any]) -> Collected:
        before = self._ready.figures().env_steps
        data = pickle.dumps(self._ready.collect(seed, fresh, **arguments))
        if self._tell is None:
            self._tell = self._telling(self._ready.world_model.paged.cache)
        self._tell()
        figures = self._ready.figures()
        return Collected(
            np.frombuffer(data, dtype=np.uint8), figures.env_steps - before, self._counted(figures)
        )

    def _counted(self, figures: CollectorFigures) -> CollectorFigures:
        """With the calls before this one, and their time."""
        return figures._replace(calls=self._once.calls, busy_seconds=self._once.busy_seconds)

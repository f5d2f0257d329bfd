"""A worker: a model, an lm on it, and the trees that live there. Any process may hold one."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from paged_kv.cache import PagedKVCache
from paged_kv.errors import BadArgument
from paged_kv.integrations.huggingface.lm import PagedLM
from paged_kv.integrations.huggingface.model_limits import free_bytes
from paged_kv.integrations.ray.calls import Call, Figures, Reply
from paged_kv.integrations.ray.held_trees import HeldTrees, TreeState
from paged_kv.integrations.ray.once import Once, sendable
from paged_kv.integrations.ray.tape import Order, Tape
from paged_kv.integrations.ray.weights import Weights, check_fit, load

VERBS = (
    *("open", "sample", "extend", "fork", "crop"),
    *("logits", "hidden_states", "score", "sizes"),
    *("promote", "release", "pin", "unpin", "end", "keep"),
)


class Recipe(NamedTuple):
    """How a worker is made. It is pickled with what it names."""

    make_model: Callable[[], Any]
    options: Mapping[str, Any]  # of PagedLM
    threads: int
    workers: int  # that share a machine's memory, where no `max_bytes` is given


class Hello(NamedTuple):
    """Who a worker is."""

    pid: int
    max_bytes: int


class Worker:
    """Carries out calls, each once, in the order of their numbers. A mistake of the caller is told
    in the reply.

    `recipe` is asked for when it says hello: what cannot be read here is told then, too. `telling`
    makes a function of the cache that is called after each call.
    """

    def __init__(
        self,
        recipe: Callable[[], Recipe],
        telling: Callable[[PagedKVCache], Callable[[], object]] = lambda cache: lambda: None,
    ) -> None:
        self._recipe = recipe
        self._telling = telling
        self._tell: Callable[[], object] = lambda: None
        self._version = 0
        self._once = Once()
        self._trees: HeldTrees | None = None
        self._tape = Tape()

    def hello(self) -> Reply:
        """Make the model and the lm."""
        try:
            recipe = self._recipe()
            torch.set_num_threads(recipe.threads)
            model = recipe.make_model()
            if not isinstance(model, torch.nn.Module):
                raise BadArgument("make_model()", model, "a model of transformers")
            options = dict(recipe.options)
            if options.get("max_bytes") is None:
                device = next(model.parameters(), torch.empty(0)).device
                options["max_bytes"] = free_bytes(device) // (2 * recipe.workers)
            lm = PagedLM(model, progress=False, **options)
            self._trees = HeldTrees(lm)
            self._tell = self._telling(lm.pages)
        except Exception as error:  # whatever a caller's own function raises
            return Reply(0, None, sendable(error), None)
        return Reply(0, Hello(os.getpid(), lm.paths.residents.max_bytes), None, None)

    def begin(
        self,
        number: int,
        version: int,
        weights: Weights | None,
        states: Mapping[int, TreeState],
    ) -> Reply:
        """Be as another worker was when it had answered call `number`: these trees, of weights of
        this version.
        """
        try:
            if weights is not None:
                load(self._held.lm.model, weights)
            self._version = version
            self._held.take(states, self._identity)
            self._held.saved(states)
        except Exception as error:
            return Reply(number, None, sendable(error), None)
        self._once.begin(number)
        return self._once.amend(figures=self.figures())

    def record(self, order: Order | None, reason: str) -> Reply:
        """Record what the cache does from now on, or no more, for this reason. It is no call: one
        that is brought back does not repeat it.
        """
        try:
            self._tape.stop(reason)
            if order is not None:
                self._tape.start(self._held.lm.pages, order)
        except Exception as error:
            return Reply(0, None, sendable(error), None)
        return Reply(0, None, None, None)

    def run(self, call: Call, payload: Any = None) -> Reply:
        """Carry out a call; the last one again is answered as before."""
        return self._carried_out(call, payload)

    def give(self, call: Call) -> tuple[Reply, dict[int, TreeState] | None]:
        """Carry out a call that hands out trees: these come apart, since whoever asks may not want
        to see them. The reply has the numbers of all that live here.
        """
        given = self._carried_out(call, None).value
        return self._once.amend(value=self._held.trees()), given

    def figures(self) -> Figures:
        """What is held, and was done. Cost: O(trees)."""
        lm = self._held.lm
        residents = lm.paths.residents
        index = residents.index.stats
        pages = lm.pages.stats
        return Figures(
            nodes=self._held.nodes,
            pages=lm.pages.pages_in_use,
            bytes_in_use=lm.pages.bytes_in_use + residents.hidden_bytes,
            max_bytes=residents.max_bytes,
            tokens_fed=lm.paths.runner.fed,
            evicted=residents.evicted,
            queries=index.queries,
            hits=index.hits,
            pages_allocated=pages.allocated_pages,
            pages_copied=pages.copied_pages,
            pages_freed=pages.freed_pages,
            busy_seconds=self._once.busy_seconds,
            calls=self._once.calls,
        )

    # -- inside

    @property
    def _held(self) -> HeldTrees:
        if self._trees is None:
            raise BadArgument("worker", self, "one that said hello")
        return self._trees

    @property
    def _identity(self) -> dict[str, Any]:
        """What K/V of this worker are of: compared wherever a tree comes in."""
        return {"weights": self._version}

    def _carried_out(self, call: Call, payload: Any) -> Reply:
        if self._once.is_known(call):
            return self._once.last
        self._once.reply(call, lambda: self._done(call, payload))
        self._tell()
        self._tape.note(call.verb)
        return self._once.amend(figures=self.figures())

    def _done(self, call: Call, payload: Any) -> Any:
        held = self._held
        held.forget(call.dropped)
        args = pickle.loads(call.args)
        if call.verb == "weights":
            load(held.lm.model, payload)
            held.clear()
            self._version = call.version
            return None
        if call.version != self._version:
            raise BadArgument("weights", call.version, f"version {self._version}, which is here")
        if call.verb == "fits":
            return check_fit(held.lm.model, *args)
        if call.verb == "save":
            trees = held.changed()
            states = held.states(trees, self._identity)
            held.saved(trees)
            return states
        if call.verb == "copy":
            return held.states(args[0], self._identity)
        if call.verb == "take":
            return held.take(payload, self._identity)
        if call.verb not in VERBS:
            raise BadArgument("verb", call.verb, ", ".join(VERBS))
        return getattr(held, call.verb)(*args)

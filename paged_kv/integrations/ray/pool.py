"""SearchPool: searches with a language model on several workers, with verbs that read like those of
a `PagedLM`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch

from paged_kv.checks import amount, choice, counts, function, listed, seconds, whole
from paged_kv.errors import (
    BadArgument,
    BadCount,
    ForeignNode,
    NotCopyable,
    NotPinned,
    ReleasedNode,
    WeightsChanged,
)
from paged_kv.integrations.huggingface.draws import root_seeds
from paged_kv.integrations.ray.arguments import options_of_lm, token_rows
from paged_kv.integrations.ray.asking import Asking
from paged_kv.integrations.ray.calls import Name
from paged_kv.integrations.ray.dispatch import Dispatch
from paged_kv.integrations.ray.engine import Engine
from paged_kv.integrations.ray.figures import PoolStats, WorkerStats, merged
from paged_kv.integrations.ray.frontier import Frontier, Told
from paged_kv.integrations.ray.gate import Gate, verb
from paged_kv.integrations.ray.held_trees import Made
from paged_kv.integrations.ray.line import Limits, Line
from paged_kv.integrations.ray.mover import Mover
from paged_kv.integrations.ray.placement import BOUND, Placement
from paged_kv.integrations.ray.pool_nodes import Grove, PoolNode, Tokens
from paged_kv.integrations.ray.taping import stop, taping
from paged_kv.integrations.ray.upkeep import Upkeep
from paged_kv.integrations.ray.versions import Versions
from paged_kv.integrations.ray.worker import Recipe

WEIGHTS = ("drop", "refuse")
LOCAL = ("seed", "streamer", "output_scores")  # of `sample`, which stay with one lm


class SearchPool:
    """Workers that hold a model and a `PagedLM` each, and the trees that live there.

    A tree lives in one worker; a call goes to all workers whose trees it is about, in one message
    each, and results come in the order of the nodes. What is drawn depends on seeds alone, as in a
    `PagedLM`: neither on the workers nor on one that died and was brought back.

    - `make_model`: makes the model, in each worker; it is pickled with what it names.
    - `workers`: how many. `threads`: of torch, in each; `cpus`, `gpus`: that Ray counts for each.
    - `options`: of each `PagedLM`, such as `tokenizer`, `page_size` and `max_bytes`; without
      `max_bytes` all workers together take half of the free memory.
    - `weights`: what `update` does with contexts of old ones: "drop" computes them again, "refuse"
      raises WeightsChanged.
    - `timeout`, `start_timeout`: seconds after which a worker that does not answer is ended and
      brought back; `restarts`: how often without an answer in between.
    - `snapshot_every`: calls after which trees that changed are saved to the driver.
    - `in_flight`: messages to one worker at most that were not answered; `rows`: of one message,
      by default all.
    - `bound`: trees of a worker over the mean, at most. `progress`: is told rows done, and of how
      many, in each call. `engine`: what runs the workers, by default Ray.

    To be closed, or used as a context manager. Raises BadArgument, BadCount, MissingPackage,
    UnsupportedVersion, WorkerLost.
    """

    def __init__(
        self,
        make_model: Callable[[], Any],
        workers: int,
        *,
        options: Mapping[str, Any] | None = None,
        threads: int = 1,
        cpus: float = 1,
        gpus: float = 0,
        weights: str = "drop",
        timeout: float = 600,
        start_timeout: float = 600,
        restarts: int = 3,
        snapshot_every: int = 64,
        in_flight: int = 2,
        rows: int | None = None,
        bound: float = BOUND,
        progress: Told | None = None,
        engine: Engine | None = None,
    ) -> None:
        function("make_model", make_model, "a function that makes a model")
        workers = amount("workers", workers, 1)
        limits = Limits(
            seconds("timeout", timeout),
            seconds("start_timeout", start_timeout),
            whole("restarts", restarts, 0),
        )
        self._refuses = choice("weights", weights, WEIGHTS) == "refuse"
        every = amount("snapshot_every", snapshot_every, 1)
        size = None if rows is None else amount("rows", rows, 1)
        if progress is not None:
            function("progress", progress, "None or a function of rows done and rows in all")
        self._options = options_of_lm(options)
        self._next_tree = 0
        self._grove = Grove()
        self._placement = Placement(range(workers), bound)
        recipe = Recipe(make_model, self._options, amount("threads", threads, 1), workers)
        under_way = amount("in_flight", in_flight, 1)
        self._lines: dict[int, Line] = {}
        self._engine = _ray(recipe, cpus, gpus) if engine is None else engine
        self.gate = Gate(range(workers), self._engine.alive)
        self._versions = Versions(self._engine)
        try:
            self._connect(limits, under_way, size, progress, every)
        except BaseException:
            self.close()
            raise

    def _connect(
        self, limits: Limits, in_flight: int, rows: int | None, progress: Told | None, every: int
    ) -> None:
        """Have all workers, and what looks after them."""
        lines = self._lines
        for name in self._placement.workers():
            lines[name] = Line(name, self._engine, limits, self._versions.held)
        placement = self._placement
        used: dict[int, int] = {}
        dispatch = Dispatch(self._engine, lines, in_flight)
        self._dispatch = dispatch
        self._mover = Mover(dispatch, lines, placement, used)
        self._upkeep = Upkeep(self.gate, dispatch, lines, placement, self._grove, used)
        frontier = Frontier(dispatch, placement, self._mover, rows, progress)
        self._asking = Asking(
            lines, dispatch, frontier, self._mover, self._upkeep, self._versions, used, every
        )
        for line in lines.values():
            line.start()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise NotCopyable(type(self).__name__)

    def __repr__(self) -> str:
        return f"<SearchPool of {len(self._lines)} workers: {len(self._placement)} trees>"

    def __enter__(self) -> SearchPool:
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
        lines = list(self._lines.values())
        stop(lines, "done")
        for line in lines:
            line.close()
        self._engine.close()

    # -- paths begin and grow

    @verb
    def prefill(
        self, input_ids: Iterable[Any], *, seed: int | Sequence[int] | None = None
    ) -> list[PoolNode]:
        """A root for each prompt, fed, each in a tree of its own: rows of tokens, or texts.

        Workers are chosen here. `seed`: as for `PagedLM.prefill`, and the same draws.
        """
        prompts = token_rows("input_ids", input_ids)
        base = int(torch.randint(2**62, ()).item()) if seed is None else seed
        seeds = root_seeds(base, len(prompts))
        self._asking.settle()
        trees = [self._next_tree + place for place in range(len(prompts))]
        self._next_tree += len(prompts)
        try:
            for tree in trees:
                self._placement.open(tree)
            made = self._asking.ask("open", trees, [trees, prompts, seeds])
        except BaseException:
            for tree in trees:
                self._upkeep.close(tree)
            raise
        return [self._node(tree, (), root) for tree, (root,) in zip(trees, made)]

    @verb
    def sample(self, nodes: Iterable[PoolNode], **options: Any) -> list[PoolNode]:
        """Children with drawn tokens, `num_return_sequences` of each node side by side.

        `options` are those of `PagedLM.sample`, but for `seed` (draws follow from the seeds of the
        roots), `streamer` and `output_scores`; they are pickled, and processors see the rows of one
        worker.
        """
        for name in LOCAL:
            if options.get(name) is not None and options[name] is not False:
                raise BadArgument(name, options[name], "nothing in a pool: see docs/ray.md")
        return self._grow("sample", nodes, [], options)

    @verb
    def extend(self, nodes: Iterable[PoolNode], token_lists: Iterable[Any]) -> list[PoolNode]:
        """Children with more tokens, fed."""
        return self._grow("extend", nodes, [token_rows("token_lists", token_lists)])

    @verb
    def fork(self, nodes: Iterable[PoolNode], token_lists: Iterable[Any]) -> list[PoolNode]:
        """Children with more tokens, which are pending: no model call."""
        return self._grow("fork", nodes, [token_rows("token_lists", token_lists)])

    @verb
    def crop(self, nodes: Iterable[PoolNode], lengths: Any) -> list[PoolNode]:
        """Children with the first tokens of each node only: no model call."""
        found = self._check(nodes)
        kept = counts("lengths", lengths, [len(node.tokens) for node in found])
        return self._grow("crop", found, [kept])

    # -- what the model says

    @verb
    def logits(self, nodes: Iterable[PoolNode]) -> torch.Tensor:
        """What the head says behind nodes [N, vocabulary]."""
        return _stacked(self._ask("logits", nodes, []))

    @verb
    def hidden_states(self, nodes: Iterable[PoolNode]) -> torch.Tensor:
        """Last hidden states [N, hidden size] behind nodes."""
        return _stacked(self._ask("hidden_states", nodes, []))

    @verb
    def score(self, nodes: Iterable[PoolNode], continuations: Iterable[Any]) -> list[torch.Tensor]:
        """Log-probability of every token of a continuation of each node: float32 [tokens] a row."""
        return [
            row
            for (row,) in self._ask("score", nodes, [token_rows("continuations", continuations)])
        ]

    def text(self, tokens: Tokens) -> str:
        """Tokens as text. Raises BadArgument where there is no tokenizer among the options."""
        tokenizer = self._options.get("tokenizer")
        if tokenizer is None:
            raise BadArgument("tokenizer", None, "a tokenizer among `options`")
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True))

    # -- what is kept

    @verb
    def promote(self, node: PoolNode) -> int:
        """Keep a node and all below it, release all other nodes of its tree; returns how many."""
        (kept,) = self._check([node])
        ((numbers,),) = self._ask("promote", [kept], [])
        self._grove.remove([(kept.tree, number) for number in numbers])
        return len(numbers)

    @verb
    def release(self, nodes: Iterable[PoolNode]) -> None:
        """Give up nodes, and at once the pages that nobody shares. A tree without nodes ends.

        It is done once it has begun: also where a worker is lost meanwhile.
        """
        found = self._check(nodes)
        self._asking.settle()
        names: list[Name] = [node.name for node in dict.fromkeys(found)]
        self._grove.remove(names)
        self._asking.ask("release", [tree for tree, _ in names], [names])
        self._upkeep.close_empty()

    @verb
    def pin(self, nodes: Iterable[PoolNode]) -> None:
        """Keep K/V of nodes from eviction until `unpin` was called as often."""
        found = self._check(nodes)
        self._ask("pin", found, [])
        self._grove.pin([node.name for node in found], 1)

    @verb
    def unpin(self, nodes: Iterable[PoolNode]) -> None:
        """Undo one `pin` of each. Raises NotPinned. As `release`, it is done once it has begun."""
        found = self._check(nodes)
        for name, times in Counter(node.name for node in found).items():
            if times > self._grove.pins(name):
                raise NotPinned(name)
        self._asking.settle()
        names: list[Name] = [node.name for node in found]
        self._grove.pin(names, -1)
        self._asking.ask("unpin", [tree for tree, _ in names], [names])

    # -- workers

    def worker(self, tree: int) -> int:
        """Where a tree lives."""
        return self._placement.worker(whole("tree", tree, 0))

    @verb
    def move(self, tree: int, worker: int) -> None:
        """Let a tree live in another worker. Raises OutOfPages where it has no room there."""
        worker = whole("worker", worker, 0)
        if worker not in self._lines:
            raise BadArgument("worker", worker, f"one of {list(self._lines)}")
        tree = whole("tree", tree, 0)
        self._placement.worker(tree)
        self._asking.settle()
        self._mover.move(tree, worker, self._versions.current)

    @verb
    def retire(self, worker: int) -> dict[int, int]:
        """Do without a worker from now on; where each of its trees went. No others move."""
        worker = whole("worker", worker, 0)
        if worker not in self._lines or len(self._lines) == 1:
            raise BadArgument("worker", worker, f"one of several: {list(self._lines)}")
        self._asking.settle()
        homes = self._mover.retire(worker, self._versions.current)
        line = self._lines.pop(worker)
        stop([line], "done")
        line.close()
        return homes

    @verb
    def update(self, state: Any) -> int:
        """Give all workers other weights, the `state_dict` of a model; returns their version.

        They are handed to the engine once, and hold for all once each worker has said that they
        fit: one that is lost gets them when it comes back. Contexts of the old ones are given up,
        and computed again as they are asked for; with `weights="refuse"`, raises WeightsChanged
        while there are trees. Raises BadArgument for weights of another model, and WorkerLost; then
        workers go on with theirs.
        """
        self._asking.settle()
        if self._refuses and len(self._placement):
            raise WeightsChanged(len(self._placement), "release all nodes of the pool")
        version = self._versions.update(state, self._dispatch, self._lines)
        self._asking.look_after(list(self._lines))
        self._versions.forget(self._lines)  # of which there are snapshots now
        return version

    @verb
    def snapshot(self) -> None:
        """Save now what changed since the last snapshots: what is saved is not repeated."""
        self._asking.settle()
        for _, error in self._asking.save(list(self._lines)):
            raise error

    @contextmanager
    def record(
        self,
        folder: str | os.PathLike[str],
        *,
        title: str | None = None,
        interval: float = 0.05,
        budget: float | None = 0.005,
        accesses: bool = False,
    ) -> Iterator[Path]:
        """Record within the block what the cache of each worker does: to `worker-N.jsonl` in a
        folder of the worker's machine, which `paged-kv report` reads all together.

        A worker that dies leaves a file without an end, and goes on in `worker-N.2.jsonl` once it
        is brought back; what it repeats is recorded once more. Options: as those of
        `paged_kv.recording.record`. Raises BadArgument where the folder has recordings of workers,
        AlreadyRecording, BadCount, OSError.
        """
        taped = taping(self.gate, self._lines, folder, title, interval, budget, accesses)
        with taped as where:
            yield where

    def stats(self) -> PoolStats:
        """What is held, and was done, as of the last answers."""
        lines = list(self._lines.values())
        loads = self._placement.loads()
        workers = [
            WorkerStats(line.name, line.pid, loads.get(line.name, 0), line.restarts, line.figures)
            for line in lines
        ]
        return PoolStats(
            workers=workers,
            merged=merged(line.figures for line in lines),
            trees=len(self._placement),
            nodes=sum(self._grove.count(tree) for tree in self._grove.trees()),
            moved=self._mover.moved,
            restarts=sum(line.restarts for line in lines),
            version=self._versions.current,
        )

    # -- inside

    def _node(self, tree: int, path: Tokens, made: Made) -> PoolNode:
        node = PoolNode(self, tree, path[: made.kept] + made.tokens, made)
        self._grove.add(node)
        return node

    def _check(self, nodes: Iterable[PoolNode]) -> list[PoolNode]:
        """Nodes as a list. Raises BadArgument, ForeignNode, ReleasedNode."""
        found = []
        for node in listed("nodes", nodes, "a list of nodes"):
            if not isinstance(node, PoolNode) or node.pool is not self:
                raise ForeignNode(node)
            if node.name not in self._grove:
                raise ReleasedNode(node.number)
            found.append(node)
        return found

    def _grow(
        self,
        verb: str,
        nodes: Iterable[PoolNode],
        columns: list[list[Any]],
        options: Mapping[str, Any] | None = None,
    ) -> list[PoolNode]:
        """Children of nodes, those of each node side by side."""
        found = self._check(nodes)
        rows = self._ask(verb, found, columns, options)
        return [
            self._node(node.tree, node.tokens, made)
            for node, children in zip(found, rows)
            for made in children
        ]

    def _ask(
        self,
        verb: str,
        nodes: Iterable[PoolNode],
        columns: list[list[Any]],
        options: Mapping[str, Any] | None = None,
    ) -> list[list[Any]]:
        """What workers say of each node. `columns` have a value for each node."""
        found = self._check(nodes)
        for column in columns:
            if len(column) != len(found):
                raise BadCount("rows (one a node)", len(column), f"{len(found)} rows")
        self._asking.settle()
        names: list[Name] = [node.name for node in found]
        return self._asking.ask(verb, [node.tree for node in found], [names, *columns], options)


def _stacked(rows: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    return torch.stack([row for (row,) in rows]) if rows else torch.empty(0, 0)


def _ray(recipe: Recipe, cpus: float, gpus: float) -> Engine:
    from paged_kv.integrations.ray.cluster import RayEngine

    return RayEngine(recipe, cpus=cpus, gpus=gpus)

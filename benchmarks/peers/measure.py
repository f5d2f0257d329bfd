"""Timings, bytes and scaling. Rounds are interleaved, so that whatever else the machine does hits
all peers alike.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from .catalog import Row
from .checks import Dense, Handles
from .peer import Peer
from .workload import Script, Search, Workload, script

Figures = dict[str, Any]
TURN = 10  # steps of one peer before the next one has its turn
KINDS_OF_TOKENS = 4  # batches of K/V that steps take in turn
TREE = 64  # nodes of a tree in the scaling test
NEAR = 400  # the newest nodes: those of the search that is going on


def spread(seconds: Sequence[float]) -> Figures:
    """Median, quartiles and extremes in microseconds."""
    values = sorted(value * 1e6 for value in seconds)
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {
        "median": middle,
        "q1": low,
        "q3": high,
        "min": values[0],
        "max": values[-1],
        "samples": len(values),
    }


@dataclass
class Side:
    """One peer in a run, with its times and its most bytes."""

    peer: Peer
    made: Script
    handles: Handles = field(default_factory=Handles)
    times: dict[str, list[float]] = field(default_factory=dict)
    bytes_over_unique: float = 0.0

    def timed(self, what: str, call: Callable[[], Any]) -> Any:
        """Call it; its time goes to `what`."""
        begin = time.perf_counter()
        result = call()
        self.times.setdefault(what, []).append(time.perf_counter() - begin)
        return result

    def release(self, batches: Sequence[Sequence[int]], batch: int) -> None:
        """Give nodes back; whole batches are timed."""
        for nodes in batches:
            doomed = self.handles.drop(nodes)
            if len(nodes) < batch:
                self.peer.release(doomed)
            else:
                self.timed("release", partial(self._let_go, doomed))

    def _let_go(self, doomed: list[Any]) -> None:
        self.peer.release(doomed)
        doomed.clear()  # contexts without a verb of their own go with the last reference


def sides(
    rows: Sequence[Row], work: Workload, seed: int, *, contents: bool
) -> list[tuple[Row, Side]]:
    """A fresh peer for each row that has what is measured; those that copy play as many simulations
    as fit.
    """
    found = []
    for row in rows:
        kind = row.contents if contents else row.tables
        if kind is not None:
            fitting = work.for_copies() if kind.copies else work
            peer = kind(fitting, fitting.nodes, fitting.unique_tokens)
            found.append((row, Side(peer, script(fitting, seed))))
    return found


def tables(rows: Sequence[Row], work: Workload, repeats: int) -> dict[str, Figures]:
    """Bookkeeping alone: fork + append of a batch, and release of one."""

    def play(side: Side, search: Search) -> Iterator[None]:
        peer = side.peer
        handles = side.handles
        for node in search.begun:
            handles.add([node], [peer.begin(side.made.lengths[node])])
        for number, (parents, children) in enumerate(search.steps):
            if not number % TURN:
                yield
            batch = handles.of(parents)
            handles.add(children, side.timed("fork", partial(peer.fork, batch, work.new)))
        side.release(search.released, work.envs)

    return collected(rows, work, repeats, play, contents=False)


def contents(rows: Sequence[Row], work: Workload, repeats: int) -> dict[str, Figures]:
    """Fork, write and gather of a batch; in every fourth step attention over what was gathered;
    bytes held.
    """
    dense = Dense(work)
    fresh = [dense.tokens(work.envs, work.new) for _ in range(KINDS_OF_TOKENS)]
    prefix = dense.tokens(1, work.window)
    arranged: dict[int, Any] = {}

    def play(side: Side, search: Search) -> Iterator[None]:
        peer = side.peer
        handles = side.handles
        made = side.made
        if id(peer) not in arranged:
            arranged[id(peer)] = (
                [peer.arrange(part) for part in fresh],
                peer.arrange_queries(fresh[0][0]),
            )
        tokens, queries = arranged[id(peer)]
        for node in search.begun:
            length = made.lengths[node]
            handles.add(
                [node],
                [
                    peer.begin(
                        length, peer.arrange(tuple(part[:, :, :, :length] for part in prefix))
                    )
                ],
            )
        for number, (parents, children) in enumerate(search.steps):
            if not number % TURN:
                yield
            batch = handles.of(parents)
            new = tokens[number % KINDS_OF_TOKENS]
            if number % 4 == 3:
                handles.add(children, peer.step(batch, new, work.new, queries))
                side.times.setdefault("attention", []).append(peer.attention_seconds)
            else:
                handles.add(children, side.timed("step", partial(peer.step, batch, new, work.new)))
        lengths = [made.lengths[node] for node in handles.known]
        unique = unique_tokens(made, handles.known) * work.token_bytes
        side.bytes_over_unique = max(side.bytes_over_unique, peer.kv_bytes(lengths) / unique)
        side.release(search.released, work.envs)

    return collected(rows, work, repeats, play, contents=True)


def unique_tokens(made: Script, live: Sequence[int]) -> int:
    """Different tokens among live nodes: each node's own, and what it shares with ancestors that
    are gone.
    """
    seen: set[int] = set()
    total = 0
    for node in live:
        while node and node not in seen:
            seen.add(node)
            parent = made.parents[node]
            total += made.lengths[node] - (made.lengths[parent] if parent else 0)
            node = parent
    return total


def collected(
    rows: Sequence[Row],
    work: Workload,
    repeats: int,
    play: Callable[[Side, Search], Iterator[None]],
    *,
    contents: bool,
) -> dict[str, Figures]:
    """Play all searches, the peers in turn; the first search of each repeat warms up."""
    times: dict[str, dict[str, list[float]]] = {}
    bytes_: dict[str, float] = {}
    simulations: dict[str, int] = {}
    for repeat in range(repeats):
        playing = sides(rows, work, repeat, contents=contents)
        gc.collect()
        for number in range(work.searches):
            in_turn([play(side, side.made.searches[number]) for _, side in playing])
            if not number and work.searches > 1:
                for _, side in playing:
                    side.times.clear()
        for row, side in playing:
            known = times.setdefault(row.name, {})
            for what, values in side.times.items():
                known.setdefault(what, []).extend(values)
            bytes_[row.name] = max(bytes_.get(row.name, 0), side.bytes_over_unique)
            simulations[row.name] = side.peer.work.simulations
    found = {}
    for name, known in times.items():
        found[name] = {
            "us": {what: spread(values) for what, values in known.items()},
            "simulations": simulations[name],
        }
        if contents:
            found[name]["kv_bytes_over_unique"] = bytes_[name]
    return found


def in_turn(games: list[Iterator[None]]) -> None:
    """Run all to their end, a turn of each at a time; each round begins with another one."""
    over = object()
    while games:
        games = [game for game in games if next(game, over) is not over]
        games = games[1:] + games[:1]


# -- many live sequences


def forest(peer: Peer, live: int, draw: random.Random) -> list[Any]:
    """So many live nodes, as searches leave them: trees whose roots have an odd length from 5 to
    13.
    """
    work = peer.work
    known = []
    while len(known) < live:
        length = draw.choice(range(5, 14, 2))
        lengths = [length]
        tree = [peer.begin(length)]
        known.append(tree[0])
        while len(tree) < TREE and len(known) < live:
            place = draw.randrange(len(tree))
            if lengths[place] + work.new > 13:
                place = 0
            (child,) = peer.fork([tree[place]], work.new)
            tree.append(child)
            lengths.append(lengths[place] + work.new)
            known.append(child)
    return known


def scaling(
    rows: Sequence[Row], work: Workload, live: Sequence[int], rounds: int
) -> dict[str, dict[int, Figures]]:
    """Fork + append beside so many live sequences; parents near (of the newest) and any
    (of all).
    """
    found: dict[str, dict[int, Figures]] = {}
    for count in live:
        fitting = replace(work, layers=1, heads=1, head_size=16, window=24)
        playing = []
        for row in rows:
            if row.tables is not None and not row.tables.copies:
                peer = row.tables(
                    fitting, count + 2 * NEAR, 2 * count + count // TREE * 16 + 50_000
                )
                # the collector should not walk a million idle records in the middle of a timing
                gc.freeze()
                playing.append((row.name, peer, forest(peer, count, random.Random(0))))
        gc.collect()
        gc.freeze()
        times: dict[tuple[str, str], list[float]] = {}
        draw = random.Random(1)
        for _ in range(rounds):
            for parents in ("near", "any"):
                first = max(0, count - NEAR) if parents == "near" else 0
                places = [
                    [draw.randrange(first, count) for _ in range(work.envs)] for _ in range(8)
                ]
                for name, peer, known in playing:
                    for batch in places:
                        chosen = [known[place] for place in batch]
                        begin = time.perf_counter()
                        children = peer.fork(chosen, work.new)
                        times.setdefault((name, parents), []).append(time.perf_counter() - begin)
                        peer.release(children)
        for (name, parents), values in times.items():
            found.setdefault(name, {}).setdefault(count, {})[parents] = spread(values)
        del playing
        gc.unfreeze()
        gc.collect()
    return found


def host_bytes(rows: Sequence[Row], work: Workload, live: int) -> dict[str, float]:
    """Bytes of python objects and arrays a live sequence, K/V not counted."""
    return dict(_host_bytes(rows, work, live))


def _host_bytes(rows: Sequence[Row], work: Workload, live: int) -> Iterator[tuple[str, float]]:
    fitting = replace(work, layers=1, heads=1, head_size=16, window=24)
    for row in rows:
        if row.tables is None or row.tables.copies:
            continue
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        peer = row.tables(fitting, live + 8, 2 * live + live // TREE * 16 + 1000)
        known = forest(peer, live, random.Random(0))
        after = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        yield row.name, (after - before) / len(known)
        del peer, known


def pin_threads() -> None:
    """One thread: with more, timings of small tensors jump from run to run."""
    torch.set_num_threads(1)

"""Recorded searches replayed on 1 to 1,000 simulated workers: how even it is, and what moves.

PYTHONPATH=. python benchmarks/ray_replay.py --json benchmarks/results/ray_replay.json \
    --svg benchmarks/results/ray_replay.svg

The searches are those of `ray_searches.py`. Each simulated tree is one of them, begun at another
time: there are few recordings and many trees, which differ in nothing but that. A worker has
`--trees` of them on average; where one ends, another begins. In a round each tree expands the rows
that it expanded when it was recorded, and holds the pages that it held. Trees are placed and moved
by the code that pools use, `Placement` and `choose`: a worker whose pages exceed its `max_bytes`
has to evict, and gives one tree away before the next round. Three ways are compared: the hash
alone, the hash with the bound on trees, and both with moves, as in a pool.

Simulated are loads and bytes, not time. Whatever does not fit counts as evicted once, and trees
grow as if it were there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from machine import processor

from paged_kv.integrations.ray.balance import Load, choose
from paged_kv.integrations.ray.placement import BOUND, Placement

SEARCHES = Path(__file__).parent / "results" / "ray_searches.json"
WORKERS = (1, 2, 4, 10, 30, 100, 300, 1000)
EACH = 8  # trees of a worker, on average
ROOM = 1.25  # `max_bytes` over what a worker holds on average
TREES = (2, 8, 32)  # of a worker, where their number is varied
ROOMS = (1.1, 1.25, 1.5)  # where `max_bytes` is varied
MOST_REPEATS = 10
ALONE = 1e9  # a bound that never matters
HASH = "hash alone"
BOUNDED = "with the bound"
POOL = "with bound and moves"
WAYS = (HASH, BOUNDED, POOL)
COLOURS = ["var(--other)", "var(--reserved)", "var(--paged)"]
Numbers = npt.NDArray[np.int64]


class Material(NamedTuple):
    """Recorded searches of one kind, the shorter ones filled up with zeros."""

    rows: Numbers  # [searches, rounds]
    bytes: Numbers  # [searches, rounds]
    rounds: Numbers  # [searches]

    @property
    def mean_bytes(self) -> float:
        """Bytes of a tree at a random moment of its life."""
        return float(self.bytes.sum() / self.rounds.sum())


class Case(NamedTuple):
    """What is simulated."""

    workers: int
    trees: int  # of a worker, on average
    room: float  # `max_bytes` over what a worker holds on average
    way: str


class Traffic:
    """What moved, and what did not fit."""

    def __init__(self) -> None:
        self.moves = 0
        self.moved_bytes = 0
        self.written_bytes = 0
        self.evicted_bytes = 0


def material(searches: Sequence[dict[str, Any]], kind: str) -> Material:
    """The recorded searches of a kind."""
    chosen = [each["rounds"] for each in searches if each["kind"] == kind]
    longest = max(map(len, chosen))
    table = np.zeros((len(chosen), longest, 2), dtype=np.int64)
    for place, rounds in enumerate(chosen):
        table[place, : len(rounds)] = rounds
    return Material(table[..., 0], table[..., 1], np.array([len(rounds) for rounds in chosen]))


class World:
    """Trees on workers, round after round."""

    def __init__(self, case: Case, found: Material, seed: int) -> None:
        self.traffic = Traffic()
        self._found = found
        self._moves = case.way == POOL
        self._random = np.random.default_rng(seed)
        self._placement = Placement(range(case.workers), ALONE if case.way == HASH else BOUND)
        slots = case.workers * case.trees
        self._max_bytes = int(case.room * case.trees * found.mean_bytes)
        self._over = np.zeros(case.workers, dtype=np.int64)  # that did not fit, a round before
        self._kind = self._random.integers(len(found.rounds), size=slots)
        self._age = self._random.integers(found.rounds[self._kind])  # not all begin at once
        self._tree = np.arange(slots)
        self._next = slots
        self._home = np.array([self._placement.open(tree) for tree in range(slots)])

    def searches(self) -> Numbers:
        """Which search each tree is."""
        return self._kind

    def ages(self) -> Numbers:
        """The round that each tree is in."""
        return self._age

    def homes(self) -> list[int]:
        """The worker of each tree."""
        return [int(home) for home in self._home]

    def placed(self) -> list[int]:
        """The same, as the directory has it."""
        return [self._placement.worker(int(tree)) for tree in self._tree]

    def trees(self) -> Numbers:
        """Trees of each worker."""
        return np.array(list(self._placement.loads().values()))

    def rows(self) -> Numbers:
        """Rows that each worker expands in this round."""
        return self._summed(self._found.rows[self._kind, self._age])

    def held(self) -> Numbers:
        """Bytes that the trees of each worker want."""
        return self._summed(self._sizes())

    def turn(self) -> None:
        """The next round: trees end, others begin, and who was short gives a tree away."""
        before = self._sizes()
        self._age += 1
        for slot in np.flatnonzero(self._age >= self._found.rounds[self._kind]):
            self._begin(int(slot))
            before[slot] = 0
        self.traffic.written_bytes += int(np.maximum(self._sizes() - before, 0).sum())
        over = np.maximum(self.held() - self._max_bytes, 0)
        self.traffic.evicted_bytes += int(np.maximum(over - self._over, 0).sum())
        self._over = over
        if self._moves and over.any():
            self._balance([int(worker) for worker in np.flatnonzero(over)])
            self._over = np.minimum(over, np.maximum(self.held() - self._max_bytes, 0))

    def _begin(self, slot: int) -> None:
        self._placement.close(int(self._tree[slot]))
        self._tree[slot] = self._next
        self._next += 1
        self._home[slot] = self._placement.open(int(self._tree[slot]))
        self._kind[slot] = self._random.integers(len(self._found.rounds))
        self._age[slot] = 0

    def _balance(self, short: Sequence[int]) -> None:
        """As `Mover.balance`: one tree of each worker that is short, to one that is not."""
        held = self.held()
        sizes = self._sizes()
        kept = np.minimum(held, self._max_bytes)
        loads = {worker: Load(int(each), self._max_bytes) for worker, each in enumerate(kept)}
        keep = frozenset(short)
        slots: dict[int, list[int]] = {worker: [] for worker in short}
        for slot in np.flatnonzero(np.isin(self._home, short)):
            slots[int(self._home[slot])].append(int(slot))
        for worker in short:
            share = self._max_bytes / held[worker]  # what was evicted does not travel
            own = {int(self._tree[slot]): int(sizes[slot] * share) for slot in slots[worker]}
            move = choose(worker, loads, own, {}, keep)
            if move is None:
                continue
            slot = next(slot for slot in slots[worker] if self._tree[slot] == move.tree)
            self._placement.move(move.tree, move.worker)
            self._home[slot] = move.worker
            load = loads[move.worker]
            moved = own[move.tree]
            loads[move.worker] = load._replace(bytes_in_use=load.bytes_in_use + moved)
            self.traffic.moves += 1
            self.traffic.moved_bytes += moved

    def _sizes(self) -> Numbers:
        return self._found.bytes[self._kind, self._age]

    def _summed(self, values: Numbers) -> Numbers:
        return np.bincount(self._home, weights=values, minlength=len(self._over)).astype(np.int64)


def replayed(case: Case, found: Material, rounds: int, seed: int) -> dict[str, Any]:
    """Figures of so many rounds, after as many as the longest search has."""
    world = World(case, found, seed)
    for _ in range(int(found.rounds.max())):
        world.turn()
    world.traffic = Traffic()
    uneven: dict[str, list[float]] = {"trees": [], "rows": [], "held": []}
    for _ in range(rounds):
        world.turn()
        for name, values in (
            ("trees", world.trees()),
            ("rows", world.rows()),
            ("held", world.held()),
        ):
            uneven[name].append(float(values.max() / values.mean()))
    traffic = world.traffic
    turns = rounds * case.workers
    return {
        **case._asdict(),
        **{f"{name}_over_mean": float(np.mean(each)) for name, each in uneven.items()},
        "rows_over_mean_worst": max(uneven["rows"]),
        "moves_per_worker_and_round": traffic.moves / turns,
        "moved_of_written": traffic.moved_bytes / traffic.written_bytes,
        "evicted_of_written": traffic.evicted_bytes / traffic.written_bytes,
        "moved_bytes_per_worker_and_round": traffic.moved_bytes / turns,
    }


def repeated(case: Case, found: Material, rounds: int, seed: int) -> dict[str, Any]:
    """The mean of several replays, the more the fewer workers there are to even out."""
    times = max(1, min(MOST_REPEATS, 100 // case.workers))
    runs = [replayed(case, found, rounds, seed + place) for place in range(times)]
    means = {
        name: round(float(np.mean([run[name] for run in runs])), 4)
        for name in runs[0]
        if name not in case._fields
    }
    return {**case._asdict(), "replays": times, **means}


def cases(trees: int, room: float, workers: Sequence[int]) -> list[Case]:
    """All workers; then, on 100, other numbers of trees and other memories."""
    found = [Case(each, trees, room, way) for each in workers for way in WAYS]
    found += [Case(100, each, room, way) for each in TREES if each != trees for way in WAYS]
    found += [Case(100, trees, each, way) for each in ROOMS if each != room for way in WAYS]
    return found


def draw(rows: Sequence[dict[str, Any]], path: Path, trees: int = EACH, room: float = ROOM) -> None:
    """The picture: a column for each kind of search, a row for each measure, against workers."""
    import altair as alt

    from paged_kv.tools.html.picture import svg

    measures = {
        "rows_over_mean": "rows: largest over mean",
        "evicted_of_written": "evicted / written bytes",
        "moved_of_written": "moved / written bytes",
        "moves_per_worker_and_round": "moves a worker and round",
    }
    shown = [row for row in rows if row["trees"] == trees and row["room"] == room]
    hues = alt.Scale(domain=list(WAYS), range=COLOURS)
    legend = alt.Legend(title=None, labelLimit=400)
    kinds = list(dict.fromkeys(row["kind"] for row in shown))
    charts = []
    for place, (field, name) in enumerate(measures.items()):
        for kind in kinds:
            points = [
                {"workers": row["workers"], "y": row[field], "way": row["way"]}
                for row in shown
                if row["kind"] == kind
            ]
            title = f"searches of a {kind}" if place == 0 else ""
            chart = (
                alt.Chart(alt.Data(values=points), width=330, height=150, title=title)
                .mark_line(point=True)
                .encode(
                    x=alt.X("workers:Q", scale=alt.Scale(type="log"), title="workers"),
                    y=alt.Y("y:Q", scale=alt.Scale(zero=place > 0), title=name),
                    color=alt.Color("way:N", scale=hues, legend=legend),
                )
            )
            charts.append(chart)
    text = (
        "Recorded searches on simulated workers: how even rows are, and what is evicted and moves"
    )
    path.write_text(svg(alt.concat(*charts, columns=len(kinds)), text))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--searches", type=Path, default=SEARCHES)
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS)
    parser.add_argument("--trees", type=int, default=EACH, help="of a worker")
    parser.add_argument("--room", type=float, default=ROOM, help="max_bytes over what is held")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    options = parser.parse_args()
    begun = time.process_time()
    searches = json.loads(options.searches.read_text())["searches"]
    rows = []
    for kind in dict.fromkeys(each["kind"] for each in searches):
        found = material(searches, kind)
        for case in cases(options.trees, options.room, options.workers):
            figures = repeated(case, found, options.rounds, options.seed)
            rows.append({"kind": kind, **figures})
            print(rows[-1], flush=True)
    if options.json:
        result = {
            "searches": len(searches),
            "rounds": options.rounds,
            "bound": BOUND,
            "processor": processor(),
            "command": " ".join(["python", *sys.argv]),
            "cpu_seconds": round(time.process_time() - begun, 1),
            "rows": rows,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.svg:
        draw(rows, options.svg, options.trees, options.room)


if __name__ == "__main__":
    main()

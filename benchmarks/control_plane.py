"""What bookkeeping costs: fork + append of 2 tokens for a batch of 8, against bare python lists.

    python benchmarks/control_plane.py --json benchmarks/results/control_plane.json

The floor does the same work (tables, reference counts, a free stack, slots, copy-on-write) and
nothing else: no handles, no checks, no errors, no undo. Both hold the same contexts (page size 2, 5
to 13 tokens, head offset 1). Parents are drawn twice: `near`, from the 400 newest sequences, as a
search does (8 roots, 50 simulations) beside many idle ones; and `any`, from all of them, where most
parents are in none of the processor's caches, for the floor neither. Rounds are interleaved, every
measurement draws parents of its own, figures are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from machine import processor

from paged_kv.pages.allocator import PageAllocator
from paged_kv.pages.block_tables import BlockTables

PAGE_SIZE = 2
BATCH = 8
NEW_TOKENS = 2
START = 1
# odd, as after a root of one token: every child then fills exactly one page
LENGTHS = (5, 7, 9, 11, 13)
CALLS = 16  # batches in one timed round
NEAR = 400  # sequences of one search


class Floor:
    """Bare lists: what any paged bookkeeping in python has to do at least."""

    def __init__(self, pages: int) -> None:
        self.tables: list[list[int]] = []
        self.starts: list[int] = []
        self.lengths: list[int] = []
        self.refs = [0] * (pages + 1)
        self.free = list(range(pages, 0, -1))

    def new(self, length: int) -> int:
        pages = [self.free.pop() for _ in range(-(-(START + length) // PAGE_SIZE))]
        for page in pages:
            self.refs[page] = 1
        self.tables.append(pages)
        self.starts.append(START)
        self.lengths.append(length)
        return len(self.tables) - 1

    def step(self, parents: list[int]) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        """Children, slots of their new tokens, page copies: no record, which the floor can do
        without.
        """
        tables = self.tables
        starts = self.starts
        lengths = self.lengths
        refs = self.refs
        free = self.free
        children = []
        slots = []
        copies = []
        for row in parents:
            pages = tables[row].copy()
            start = starts[row]
            length = lengths[row]
            end = start + length
            if end % PAGE_SIZE:
                fresh = free.pop()
                copies.append((pages[-1], fresh))
                pages[-1] = fresh
            while len(pages) * PAGE_SIZE < end + NEW_TOKENS:
                pages.append(free.pop())
            for page in pages:
                refs[page] += 1
            for index in range(end, end + NEW_TOKENS):
                slots.append(pages[index // PAGE_SIZE] * PAGE_SIZE + index % PAGE_SIZE)
            children.append(len(tables))
            tables.append(pages)
            starts.append(start)
            lengths.append(length + NEW_TOKENS)
        return children, slots, copies

    def drop(self, children: list[int]) -> None:
        """Undo the latest steps."""
        for row in reversed(children):
            for page in self.tables[row]:
                self.refs[page] -= 1
                if not self.refs[page]:
                    self.free.append(page)
        del (
            self.tables[-len(children) :],
            self.starts[-len(children) :],
            self.lengths[-len(children) :],
        )


class Ours:
    """The control plane of the package: `step` as a commit does it, `verbs` as fork and append one
    by one.
    """

    def __init__(self, pages: int) -> None:
        self.tables = BlockTables(PageAllocator(pages, max_pages=None), PAGE_SIZE)

    def new(self, length: int) -> int:
        (seq,) = self.tables.new(1, start=START)
        self.tables.carry_out(self.tables.plan([seq], length))
        return seq

    def step(self, parents: list[int]) -> list[int]:
        tables = self.tables
        plan = tables.plan(parents, NEW_TOKENS, fork=True)
        if plan.fresh > tables.books.pages.free_count:
            raise MemoryError
        return tables.carry_out(plan)

    def verbs(self, parents: list[int]) -> list[int]:
        tables = self.tables
        plan = tables.plan(tables.fork(parents), NEW_TOKENS)
        if plan.fresh > tables.books.pages.free_count:
            raise MemoryError
        return tables.carry_out(plan)

    def drop(self, children: list[int]) -> None:
        self.tables.release(children)


class Side(NamedTuple):
    """What is measured: a name, a step of a batch, the sequences it forks from, and how its
    children are dropped again.
    """

    name: str
    step: Callable[[list[int]], object]
    known: list[int]
    drop: Callable[[list[int]], None]


class Timed(NamedTuple):
    """Microseconds a batch, and the children that were made."""

    micros: float
    children: list[int]


def timed(step: Callable[[list[int]], object], batches: list[list[int]]) -> Timed:
    """Step through some batches."""
    begin = time.perf_counter()
    made = [step(batch) for batch in batches]
    spent = time.perf_counter() - begin
    of_each = [result[0] if isinstance(result, tuple) else result for result in made]
    children = [child for result in of_each for child in result]
    return Timed(spent / len(batches) * 1e6, children)


def measure(live: int, rounds: int, seed: int = 0) -> list[dict[str, float | str]]:
    """Medians over the rounds at `live` sequences: parents near, and any."""
    draw = random.Random(seed)
    pages = live * 7 + BATCH * CALLS * 2
    floor = Floor(pages)
    ours = Ours(pages)
    lengths = [draw.choice(LENGTHS) for _ in range(live)]
    rows = [floor.new(n) for n in lengths]
    seqs = [ours.new(n) for n in lengths]
    sides = [
        Side("floor", floor.step, rows, floor.drop),
        Side("step", ours.step, seqs, ours.drop),
        Side("verbs", ours.verbs, seqs, ours.drop),
    ]
    results = []
    for parents, nearest in (("near", min(NEAR, live)), ("any", live)):
        times: dict[str, list[float]] = {side.name: [] for side in sides}
        choice = range(live - nearest, live)
        for _ in range(rounds):
            for side in sides:
                drawn = [draw.sample(choice, BATCH) for _ in range(CALLS)]
                spent = timed(side.step, [[side.known[i] for i in batch] for batch in drawn])
                side.drop(spent.children)
                times[side.name].append(spent.micros)
        results.append(summed_up(live, parents, times))
    return results


def summed_up(live: int, parents: str, times: dict[str, list[float]]) -> dict[str, float | str]:
    """One row of the table."""
    middle = {f"{name}_us": statistics.median(values) for name, values in times.items()}
    ratios = {
        f"{name}_over_floor": middle[f"{name}_us"] / middle["floor_us"]
        for name in ("step", "verbs")
    }
    return {"live_sequences": live, "parents": parents, **middle, **ratios}


def report(results: list[dict[str, float | str]]) -> str:
    """The table, for people; growth is against the smallest number of sequences."""
    lines = [
        "      live  parents  floor us  step us  /floor  verbs us  /floor  growth of floor, "
        "step, verbs"
    ]
    for row in results:
        first = next(other for other in results if other["parents"] == row["parents"])
        growth = [
            float(row[key]) / float(first[key]) for key in ("floor_us", "step_us", "verbs_us")
        ]
        lines.append(
            f"{row['live_sequences']:>10,}  {row['parents']:>7}  {row['floor_us']:>8.2f} "
            f"{row['step_us']:>8.2f} {row['step_over_floor']:>7.2f}  "
            f"{row['verbs_us']:>8.2f} {row['verbs_over_floor']:>7.2f}  "
            + " ".join(f"{value:>6.2f}" for value in growth)
        )
    return "\n".join(lines)


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--live", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    measure(1000, 20)  # warm-up
    results = [row for live in options.live for row in measure(live, options.rounds)]
    print(report(results))
    if options.json:
        machine = {
            "processor": processor(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        }
        work = {
            "batch": BATCH,
            "new_tokens": NEW_TOKENS,
            "page_size": PAGE_SIZE,
            "lengths": LENGTHS,
        }
        work |= {"start": START, "rounds": options.rounds, "calls_per_round": CALLS, "near": NEAR}
        text = json.dumps({"machine": machine, "workload": work, "results": results}, indent=2)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()

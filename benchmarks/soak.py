"""Whether anything corrupts contents, asked for long: what the tests do in short, with every place
and many more turns.

    python benchmarks/soak.py --json benchmarks/results/soak.json

- `finalizers`: turns of a program whose tree nodes release their contexts when the cyclic collector
  finds them, with the collector's usual threshold and with 7; a second thread collects all the
  time, hooks of a policy release and read, and in half of the turns a timer's handler releases and
  calls verbs. Contents are compared after every turn.
- `places`: an interrupt, or another error, before every bytecode of every verb.
- `undone`: the same before the bytecodes of a call that finishes what an interrupted one left
  undone.
- `releases`: a release by a handler before every few bytecodes of every verb, and one by another
  thread.
- `faults`: an error of every operation on tensors of every verb.
- `walks`: so many interrupts at random bytecodes of random verbs in random states, beside a dense
  model.
- `signals`: real ones, by a timer, at random moments of such walks.

Whatever is found that should not be is counted as broken, shown, and makes the command fail. Ctrl-C
ends the part that runs and those to come; what was done so far is told.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from every_verb import SCENARIOS
from garden import Weather, collecting, heard, run
from interrupts import Trial, faulted
from random_walk import RULES, Call, Ending, Walk, interrupting_within, plainly
from soak_parts import Part, Parts, Stop

WEATHERS = (
    Weather(threshold=700, thread=True),
    Weather(threshold=7, thread=True),
    Weather(threshold=700, thread=True, timer=0.002),
    Weather(threshold=7, thread=True, timer=0.002),
)
TURNS = 2000  # of one garden
STEPS = 60  # of one walk
SHARE = 0.6  # of its calls that are to be broken off
UNDONE = 60  # bytecodes between two that are tried for leaving something undone


class Soak(Parts):
    """What is tried."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)

    def finalizers(self, turns: int) -> None:
        """Nodes that release their contexts."""
        with self.part("finalizers", turns, "turns") as part:
            began = time.perf_counter()
            seed = 0
            while part.done < turns:
                count = int(min(TURNS, turns - part.done))
                weather = WEATHERS[seed % len(WEATHERS)]
                counts = self.tried(part, partial(run, seed, count, weather))
                if isinstance(counts, dict):
                    part.add(counts)
                seed += 1
                self.did(part, began, count)

    def places(self, trials: list[Trial], every: int) -> None:
        """Interrupts at every bytecode."""
        places = [(trial, at) for trial in trials for at in range(1, trial.steps + 1, every)]
        with self.part("places", len(places), "interrupts") as part:
            self.each(part, (partial(trial.interrupt, at) for trial, at in places))

    def undone(self, trials: list[Trial], every: int) -> None:
        """Interrupts of what finishes an interrupted call."""
        settling = [Trial(trial.settling(at)) for trial in trials for at in trial.unsettled(UNDONE)]
        places = [(trial, at) for trial in settling for at in range(1, trial.steps + 1, 4 * every)]
        with self.part("undone", len(places), "interrupts") as part:
            self.each(part, (partial(trial.interrupt, at) for trial, at in places))

    def releases(self, trials: list[Trial], every: int) -> None:
        """Releases at any time."""
        calls: list[Callable[[], object]] = []
        for number, trial in enumerate(trials):
            for at in range(1 + number % 4, trial.steps + 1, 4 * every):
                calls.append(partial(trial.release, at, in_thread=False))
            for at in range(1 + number % 16, trial.steps + 1, 16 * every):
                calls.append(partial(trial.release, at, in_thread=True))
        with self.part("releases", len(calls), "releases") as part:
            self.each(part, calls)

    def faults(self, trials: list[Trial]) -> None:
        """Errors of operations on tensors."""
        calls: list[Callable[[], object]] = []
        for trial in trials:
            world = trial.scenario.prepare()
            steps = faulted(lambda: trial.scenario.call(world), sys.maxsize).steps  # noqa: B023
            for at in range(1, steps + 1):
                calls += [partial(trial.fault, at, after) for after in (False, True)]
        with self.part("faults", len(calls), "faults") as part:
            self.each(part, calls)

    def walks(self, interrupts: int) -> None:
        """Interrupts in random states."""
        known: dict[str, int] = {}
        with self.part("walks", interrupts, "interrupts") as part:
            began = time.perf_counter()
            while part.done < interrupts:
                for broken in self.walk(
                    part, lambda rule: interrupting_within(self.random.randint, rule, known)
                ):
                    self.did(part, began, broken)

    def signals(self, seconds: float) -> None:
        """Real signals."""
        with self.part("signals", seconds, "seconds") as part:
            began = time.perf_counter()
            alarm = Alarm(self.random)
            with alarm.set():
                while part.done < seconds:
                    for broken in self.walk(part, lambda rule: alarm.perform):
                        part.add({"interrupts": broken})
                        self.did(part, began, time.perf_counter() - began - part.done)

    def walk(self, part: Part, perform: Callable[[str], Any]) -> Iterator[int]:
        """One walk; yields how many calls were broken off in each step."""
        gc.collect()
        gc.freeze()  # else the collector, which runs often here, takes ever longer
        draw = self.random.randint
        walk = Walk(draw)
        for _ in range(STEPS):
            self.tried(part, partial(walk.grow, draw))
            before = walk.broken
            rule = self.random.choice(RULES)
            walk.perform = perform(rule) if self.random.random() < SHARE else plainly
            broken = part.broken
            self.tried(part, partial(getattr(walk, rule), draw))
            part.add({"steps": 1})
            yield walk.broken - before
            if part.broken > broken:
                return
        self.tried(part, walk.finish)


class Alarm:
    """A timer that raises KeyboardInterrupt at a random moment of a call."""

    def __init__(self, chosen: random.Random) -> None:
        self.random = chosen
        self.armed = False

    @contextmanager
    def set(self) -> Iterator[None]:
        """The signal is ours for the time of the block."""
        previous = signal.signal(signal.SIGALRM, self.ring)
        try:
            yield
        finally:
            signal.signal(signal.SIGALRM, previous)

    def ring(self, *told: object) -> None:
        """The handler."""
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt

    def perform(self, call: Call) -> Ending:
        """Call; at some moment the timer rings, perhaps too late."""
        try:
            self.armed = True
            signal.setitimer(signal.ITIMER_REAL, self.random.uniform(0.00001, 0.0006))
            ending = plainly(call)
            self.armed = False
        except KeyboardInterrupt:
            ending = Ending(broken="by a signal")
        signal.setitimer(signal.ITIMER_REAL, 0)
        return ending


def main() -> None:
    """Run all parts, print a table, and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=1_000_000, help="of the finalizers")
    parser.add_argument("--interrupts", type=int, default=100_000, help="of the walks")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the signals")
    parser.add_argument("--every", type=int, default=1, help="so many bytecodes of each verb")
    parser.add_argument("--seed", type=int, default=0, help="of the random parts")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    faulted(lambda: torch.zeros(1), 1)  # loads what torch needs for it
    soak = Soak(options.seed)
    signal.signal(signal.SIGINT, soak.wish)
    began = time.perf_counter()
    try:
        all_parts(soak, options)
    except Stop:
        print("stopped", file=sys.stderr)
    print(soak.table())
    print(f"{'broken promises:':<24} {soak.broken}")
    if options.json:
        options.json.write_text(
            json.dumps(document(soak, time.perf_counter() - began), indent=1) + "\n"
        )
    sys.exit(1 if soak.broken else 0)


def all_parts(soak: Soak, options: argparse.Namespace) -> None:
    """One after another."""
    soak.finalizers(options.turns)
    # a finalizer that is broken off complains where nobody can catch it
    with heard([]), collecting(700):
        trials = [Trial(scenario) for scenario in SCENARIOS]
        soak.places(trials, options.every)
        soak.undone(trials, options.every)
        soak.releases(trials, options.every)
        soak.faults(trials)
        soak.walks(options.interrupts)
        soak.signals(options.seconds)


def document(soak: Soak, seconds: float) -> dict[str, Any]:
    """The JSON."""
    return {
        "schema": 1,
        "machine": {
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "command": shlex.join(["python", *sys.argv]),
        "stopped": soak.wish.stop,
        "seconds": round(seconds, 1),
        "broken": soak.broken,
        "results": soak.results(),
    }


if __name__ == "__main__":
    main()

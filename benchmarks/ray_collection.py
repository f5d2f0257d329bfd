"""UniZero's CartPole collected by two workers of Ray, beside one process, and two without Ray.

python benchmarks/ray_collection.py --json benchmarks/results/ray_collection.json

All sides collect the same number of episodes in the same number of environments, with LightZero's
own collector, the trained model and one thread a process, and get new weights before each round. A
side deals its environments into batches; which size is the fastest is found out first, in this
process. Sides take turns, round by round; what is told are medians, and medians of the ratios
within a round. Episodes end after the same number of steps, so that all rounds are equally long.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import pickle
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import processor

from paged_kv.integrations.ray import CollectorPool, SeededCollector
from paged_kv.integrations.ray.weights import packed
from paged_kv.tools.data import checkpoint_path

HERE = str(Path(__file__).resolve().parent)
ENVS = 64  # in all
BATCHES = (16, 32, 64)
LENGTH = 40  # steps of an episode
PLAY = {"policy_kwargs": {"temperature": 0.25, "epsilon": 0.0}}
SIDES = ("one_process", "two_processes", "ray")


def make_collector(envs: int, folder: str) -> tuple[Any, Any]:
    """A trained policy, and LightZero's collector with so many environments."""
    logging.disable(logging.INFO)
    with silence():
        from ding.envs import create_env_manager
        from lzero.worker import MuZeroCollector

        sys.path.append(HERE)  # an actor does not have this folder on its path
        from train_cartpole import build_config, build_policy

        config = build_config(seed=0)
        config.policy.update(collector_env_num=envs, n_episode=envs)
        config.policy.model.world_model_cfg.env_num = envs
        policy, _ = build_policy(config, checkpoint_path())
        made = [partial(env_class(), config.env)] * envs
        collector = MuZeroCollector(
            env=create_env_manager(config.env.manager, made),
            policy=policy.collect_mode,
            exp_name=os.path.relpath(folder),
            policy_config=config.policy,
        )
    return policy, collector


def env_class() -> Any:
    """CartPole that a seed determines, and that ends after some steps."""
    from zoo.classic_control.cartpole.envs.cartpole_lightzero_env import CartPoleEnv

    class ShortCartPole(CartPoleEnv):  # type: ignore[misc]
        seeded = False

        def seed(self, seed: int, dynamic_seed: bool = True) -> None:
            super().seed(seed, dynamic_seed)
            self.seeded = True

        def reset(self) -> Any:
            start = super().reset()
            if self.seeded:
                start["observation"], _ = self._env.reset(seed=self._seed)
                self.seeded = False
            return start

        def step(self, action: Any) -> Any:
            result = super().step(action)
            if self._timestep < LENGTH or result.done:
                return result
            result.info["eval_episode_return"] = self._eval_episode_return
            return result._replace(done=True)

    return ShortCartPole


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """LightZero prints a line at every step of a small batch."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


class OneProcess:
    """This process: batches one after the other."""

    def __init__(self, batch: int, folder: str) -> None:
        self.collector = SeededCollector(partial(make_collector, batch, folder))

    def collect(self, state: Any, seeds: Sequence[int]) -> list[Any]:
        """One batch a seed, with these weights."""
        with silence():
            self.collector.load(packed(state))
            return [self.collector.collect(seed, **PLAY) for seed in seeds]

    def close(self) -> None:
        """Nothing to end."""


def serve(pipe: Connection, batch: int, folder: str) -> None:
    """A process without Ray: collects what it is sent."""
    torch.set_num_threads(1)
    side = OneProcess(batch, folder)
    pipe.send(b"ready")
    while True:
        job = pipe.recv()
        if job is None:
            return
        pipe.send(pickle.dumps(side.collect(*job)))


class TwoProcesses:
    """Two processes, each with half of the batches."""

    def __init__(self, batch: int, folder: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes = []
        self._started = []
        for _ in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, batch, folder), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._started.append(process)
        for pipe in self._pipes:
            pipe.recv()

    def collect(self, state: Any, seeds: Sequence[int]) -> list[Any]:
        """As `OneProcess.collect`."""
        for place, pipe in enumerate(self._pipes):
            pipe.send((state, seeds[place::2]))
        halves = [pickle.loads(pipe.recv()) for pipe in self._pipes]
        return [halves[place % 2][place // 2] for place in range(len(seeds))]

    def close(self) -> None:
        """End both."""
        for pipe, process in zip(self._pipes, self._started):
            pipe.send(None)
            process.join()


class Ray:
    """Two actors."""

    def __init__(self, batch: int, folder: str) -> None:
        self.pool = CollectorPool(partial(make_collector, batch, folder), 2)

    def collect(self, state: Any, seeds: Sequence[int]) -> list[Any]:
        """As `OneProcess.collect`."""
        self.pool.update(state)
        return [shard.data for shard in self.pool.collect(seeds, **PLAY)]

    def close(self) -> None:
        """End the actors and their Ray."""
        self.pool.close()


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    begun = time.perf_counter()
    result = work()
    return time.perf_counter() - begun, result


def steps(data: Sequence[Any]) -> int:
    """Steps of environments in what was collected."""
    return sum(len(segment.action_segment) for each in data for segment in each[0])


def actions(data: Sequence[Any]) -> list[list[int]]:
    """What was done, to compare."""
    return [[int(a) for a in segment.action_segment] for each in data for segment in each[0]]


def speeds(folder: str, rounds: int) -> dict[int, float]:
    """Environment steps a second in this process, by the size of batches."""
    sides = {batch: OneProcess(batch, folder) for batch in BATCHES}
    state = state_of(sides[BATCHES[0]])
    found: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    for turn in range(rounds + 1):
        for batch, side in sides.items():
            spent, _ = timed(partial(side.collect, state, list(range(ENVS // batch))))
            if turn:
                found[batch].append(ENVS * LENGTH / spent)
    return {batch: round(median(each), 1) for batch, each in found.items()}


def state_of(side: OneProcess) -> dict[str, torch.Tensor]:
    """The trained weights."""
    return {name: value.clone() for name, value in side.collector.model.state_dict().items()}


def compare(folder: str, rounds: int, alone: int, shared: int) -> dict[str, Any]:
    """All sides in turn; `alone` and `shared` are the sizes of their batches."""
    sides = {
        "one_process": OneProcess(alone, folder),
        "two_processes": TwoProcesses(shared, folder),
        "ray": Ray(shared, folder),
    }
    state = state_of(sides["one_process"])
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    try:
        for turn in range(rounds + 1):
            found = {}
            for name in (*SIDES[turn % 3 :], *SIDES[: turn % 3]):
                batch = alone if name == "one_process" else shared
                seeds = [100 * turn + place for place in range(ENVS // batch)]
                spent, data = timed(partial(sides[name].collect, state, seeds))
                found[name] = data
                if turn:
                    seconds[name].append(spent)
            assert actions(found["ray"]) == actions(found["two_processes"])
            counts = {name: steps(data) for name, data in found.items()}
            assert len(set(counts.values())) == 1, counts
        old = sides["ray"].pool.stats().merged.old_used
    finally:
        for side in sides.values():
            side.close()
    pairs = {other: [b / a for a, b in zip(seconds["ray"], seconds[other])] for other in SIDES[:2]}
    return {
        "batch": {"one_process": alone, "two_workers": shared},
        "steps_a_round": counts["ray"],
        "steps_a_second": {
            name: round(counts[name] / median(each), 1) for name, each in seconds.items()
        },
        "ray_over_one_process": round(median(pairs["one_process"]), 3),
        "ray_over_two_processes": round(median(pairs["two_processes"]), 3),
        "old_contexts_used": old,
        "seconds": {name: [round(spent, 3) for spent in each] for name, each in seconds.items()},
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # LightZero writes its logs below the working directory
        by_batch = speeds(folder, max(2, options.rounds // 3))
        alone = max(BATCHES, key=by_batch.__getitem__)
        shared = max((b for b in BATCHES if 2 * b <= ENVS), key=by_batch.__getitem__)
        result = {
            "envs": ENVS,
            "steps_of_an_episode": LENGTH,
            "steps_a_second_by_batch": by_batch,
            **compare(folder, options.rounds, alone, shared),
        }
        os.chdir(home)
    result |= {
        "processor": processor(),
        "load_average": os.getloadavg(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": " ".join(["python", *sys.argv]),
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

"""Train CartPole twice with LightZero 0.2.0: on its own cache, and on pages.

    OMP_NUM_THREADS=1 python benchmarks/train_both.py --minutes 15 \
        --json benchmarks/results/train_both.json --svg benchmarks/results/train_both.svg

LightZero's own CartPole configuration, search, losses and policy (see train_cartpole.py), the same
seeds on both sides, equal scores in the search tree decided the same way, and pages as `attach`
sets them by default. The two play the same until the first batch on which LightZero's cache is at
fault (rows that change places, padding that takes part in attention), and from there on each its
own run. Recorded are the returns of all episodes against environment steps, wall-clock and CPU time
of the process, a hash of all actions that were collected, and the bytes that each cache takes at
three points of the cycle: after collecting, after learning and after evaluating. `--steps` ends
each side after that many environment steps instead.

Ctrl-C ends the side in work after its present turn and writes what there is; a second one ends the
script at once.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ding.utils import set_pkg_seed
from lzero.entry.utils import calculate_update_per_collect
from lzero.mcts import UniZeroGameBuffer
from lzero.mcts.ctree.ctree_muzero import mz_tree
from lzero.worker import MuZeroCollector
from machine import processor
from train_both_figures import Row, at_equal_steps, report, same_until, slopes
from train_cartpole import SELECT_SEED, build_config, build_envs, build_policy, evaluate, learn

from paged_kv.integrations.lightzero import installed
from paged_kv.integrations.ties import fixed_ties
from paged_kv.tools.profile.counters import storage_bytes

CACHES = ("lightzero", "paged")


@dataclass
class Until:
    """When a side is over: after its minutes or its environment steps, or when the user has said
    so.
    """

    minutes: float
    steps: int | None
    stopped: bool = False

    def over(self, run: Run) -> bool:
        """Whether a side has run long enough."""
        if self.stopped:
            return True
        return run.steps >= self.steps if self.steps is not None else run.wall >= self.minutes * 60

    def on_interrupt(self, *_: Any) -> None:
        """The first Ctrl-C asks, the second one insists."""
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
        tell("stopping after this turn; once more to stop at once")


@dataclass
class Run:
    """One side: its clocks, and what was noted."""

    cache: str
    world_model: Any
    steps: int = 0
    updates: int = 0
    returns: list[Row] = field(default_factory=list)
    held: list[Row] = field(default_factory=list)
    actions: Any = field(default_factory=hashlib.sha256)
    wall_began: float = field(default_factory=time.monotonic)
    cpu_began: float = field(default_factory=time.process_time)

    @property
    def wall(self) -> float:
        """Seconds since the side began, pauses included."""
        return time.monotonic() - self.wall_began

    @property
    def cpu(self) -> float:
        """Seconds that the process worked for this side."""
        return time.process_time() - self.cpu_began

    def note(self, point: str, episodes: Sequence[float]) -> None:
        """Note where the side stands: the returns of the latest episodes, and what the
        cache holds.
        """
        now = {
            "at": point,
            "env_steps": self.steps,
            "wall_s": round(self.wall, 2),
            "cpu_s": round(self.cpu, 2),
        }
        self.held.append({**now, **held_bytes(self.cache, self.world_model)})
        if episodes:
            actions = self.actions.hexdigest()[:16]
            scores = {"mean_return": round(float(np.mean(episodes)), 2), "episodes": len(episodes)}
            self.returns.append({**now, "updates": self.updates, **scores, "actions": actions})


def held_bytes(cache: str, world_model: Any) -> dict[str, int]:
    """Bytes that the stores of a cache take now."""
    if cache == "paged":
        pages = world_model.paged.cache
        peak = pages.stats.peak_pages * pages.page_bytes
        return {"in_use": pages.bytes_in_use, "reserved": pages.bytes_reserved, "peak_in_use": peak}
    rings = [
        *world_model.shared_pool_init_infer,
        world_model.shared_pool_recur_infer,
        world_model.shared_pool_wm,
    ]
    entries = [entry for ring in rings for entry in ring if entry is not None]
    total = storage_bytes(
        half._cache
        for entry in entries
        for layer in entry
        for half in (layer._k_cache, layer._v_cache)
    )
    # the rings never give an entry back
    return {"in_use": total, "reserved": total, "peak_in_use": total}


def train(cache: str, seed: int, until: Until, choices: dict[str, str]) -> Row:
    """One side: collect, learn and, every so often, evaluate, until it is over."""
    cfg = build_config(seed)
    set_pkg_seed(seed, use_cuda=False)
    with installed(cache=cache, **choices):
        policy, _ = build_policy(cfg)
    envs, episodes = build_envs(cfg, cfg.policy.collector_env_num, seed)
    collector = MuZeroCollector(
        env=envs, policy=policy.collect_mode, exp_name="exp", policy_config=cfg.policy
    )
    buffer = UniZeroGameBuffer(cfg.policy)
    run = Run(cache, policy._collect_model.world_model)
    next_eval = cfg.policy.eval_freq
    while not until.over(run):
        seen = len(episodes)
        data = collect(collector, cfg, run)
        run.note("collected", episodes[seen:])
        buffer.push_game_segments(data)
        run.updates = learn(policy, buffer, calculate_update_per_collect(cfg, data, 1), run.updates)
        run.note("learned", [])
        if run.updates >= next_eval and not until.stopped:
            next_eval = run.updates + cfg.policy.eval_freq
            run.note("evaluated", evaluate(policy, cfg, SELECT_SEED))
        tell(progress(run))
    collector.close()
    return summary(run)


def collect(collector: Any, cfg: Any, run: Run) -> Any:
    """The next episodes, counted and hashed."""
    explore = {"temperature": cfg.policy.fixed_temperature_value, "epsilon": 0.0}
    data = collector.collect(train_iter=run.updates, policy_kwargs=explore)
    for segment in data[0]:
        run.actions.update(np.asarray(segment.action_segment, dtype=np.int64).tobytes())
    run.steps = collector.envstep
    return data


class Nowhere(io.StringIO):
    """LightZero prints some lines at every step."""

    def write(self, text: str) -> int:
        """Forget the text."""
        return len(text)


def tell(text: str) -> None:
    """Write a line for people past the silence that LightZero's own prints are sent to."""
    print(text, file=sys.__stdout__, flush=True)


def progress(run: Run) -> str:
    """One line for people who wait."""
    score = run.returns[-1]
    held = run.held[-1]
    return (
        f"{run.cache:>9}: {run.wall:6.0f} s, {run.steps:6,} steps, {run.updates:5,} updates, "
        f"return {score['mean_return']:5.1f} ({score['at']}), {held['in_use']:,} of "
        f"{held['reserved']:,} bytes in use"
    )


def summary(run: Run) -> Row:
    """What is recorded of one side."""
    wm = run.world_model
    lookups = wm.root_total_query_cnt + wm.total_query_count
    hits = wm.root_hit_cnt + wm.hit_count
    return {
        "cache": run.cache,
        "env_steps": run.steps,
        "updates": run.updates,
        "wall_s": round(run.wall, 1),
        "cpu_s": round(run.cpu, 1),
        "lookups": lookups,
        "hits": hits,
        "slopes_bytes_per_1000_steps": slopes(run.held),
        "returns": run.returns,
        "held": run.held,
    }


def in_a_folder_of_its_own(work: Callable[[], list[Row]]) -> list[Row]:
    """LightZero writes its logs below the working directory."""
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            return work()
        finally:
            os.chdir(home)


def run_all(caches: Sequence[str], seed: int, until: Until, choices: dict[str, str]) -> list[Row]:
    """The sides, one after the other."""
    with fixed_ties(mz_tree.__file__), contextlib.redirect_stdout(Nowhere()):
        return [train(cache, seed, until, choices) for cache in caches if not until.stopped]


def kept(file: Path | None, caches: Sequence[str]) -> list[Row]:
    """The sides that an earlier run has left in a file, and that are not run again."""
    if file is None or not file.exists():
        return []
    return [side for side in json.loads(file.read_text())["sides"] if side["cache"] not in caches]


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="wall-clock limit of each side")
    parser.add_argument(
        "--steps", type=int, help="environment steps of each side, in place of --minutes"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--caches",
        nargs="+",
        choices=CACHES,
        default=CACHES,
        help="the sides to run; others are kept as the --json file has them",
    )
    parser.add_argument(
        "--window",
        choices=("cached", "exact"),
        default="cached",
        help="what contexts on pages keep",
    )
    parser.add_argument(
        "--step",
        choices=("lean", "lightzero"),
        default="lean",
        help="how steps on pages are taken",
    )
    parser.add_argument(
        "--attention",
        choices=("gathered", "pages"),
        default="gathered",
        help="how contexts on pages are attended to",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path, help="draw the picture to this file (needs altair)")
    return parser.parse_args()


def document(options: argparse.Namespace, stopped: bool, sides: Sequence[Row]) -> Row:
    """The JSON."""
    machine = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    work = {
        "minutes": options.minutes,
        "steps": options.steps,
        "seed": options.seed,
        "stopped": stopped,
        "caches": list(options.caches),
        "window": options.window,
        "step": options.step,
        "attention": options.attention,
    }
    found: Row = {"machine": machine, "workload": work, "sides": sides}
    if len(sides) == 2:
        found["same_actions_and_returns"] = same_until(*sides)
        found["at_equal_steps"] = at_equal_steps(sides)
    return found


def main() -> None:
    """Train both sides, print a table, write the JSON and the picture."""
    options = parsed()
    if options.svg:
        from train_both_picture import drawing  # now, lest its libraries are missed after the run
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    until = Until(options.minutes, options.steps)
    choices = {
        "window": options.window,
        "step": options.step,
        "attention": options.attention,
    }
    signal.signal(signal.SIGINT, until.on_interrupt)
    sides = in_a_folder_of_its_own(lambda: run_all(options.caches, options.seed, until, choices))
    sides = sorted(
        [*kept(options.json, options.caches), *sides], key=lambda side: CACHES.index(side["cache"])
    )
    print(report(sides))
    found = document(options, until.stopped, sides)
    if len(sides) == 2:
        print("same actions and returns:", found["same_actions_and_returns"])
        print("clocks at equal steps:", found["at_equal_steps"])
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.svg:
        options.svg.write_text(drawing(sides))


if __name__ == "__main__":
    main()

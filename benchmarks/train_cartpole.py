"""Train the small CartPole world model that the integration tests and benchmarks search with.

LightZero 0.2.0 does the training, with its own `cartpole_unizero_config`; only the device, the
environment manager and the number of evaluation environments differ. The best model seen so far is
written to `--out` as a safetensors file.

    OMP_NUM_THREADS=1 python benchmarks/train_cartpole.py --minutes 8 --seed 0 \
        --out cartpole.safetensors

`--seed` fixes the random numbers of the environments, numpy, torch and the C++ search tree. The
wall-clock limit depends on the machine, so two runs agree up to the point where the slower one
stops.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ding.config import compile_config
from ding.envs import create_env_manager
from ding.policy import create_policy
from ding.utils import set_pkg_seed
from lzero.entry.utils import calculate_update_per_collect
from lzero.mcts import UniZeroGameBuffer
from lzero.model.unizero_model import UniZeroModel
from lzero.worker import MuZeroCollector, MuZeroEvaluator
from safetensors.torch import load_file, save_file
from zoo.classic_control.cartpole.config.cartpole_unizero_config import create_config, main_config
from zoo.classic_control.cartpole.envs.cartpole_lightzero_env import CartPoleEnv

EVAL_ENVS = 8
# starting states that choose the best model, and that judge it
SELECT_SEED = 10_000
FINAL_SEED = 20_000
# 2 MB of rotations that the model computes when it is built
DERIVED = "world_model.transformer.freqs_cis"
PRELOADED = "PAGED_KV_FIXED_SRAND"


class SeededCartPole(CartPoleEnv):  # type: ignore[misc]
    """LightZero's CartPole, with gymnasium's generator seeded too: the parent only seeds numpy."""

    def __init__(self, returns: list[float], cfg: Any) -> None:
        super().__init__(cfg)
        self._returns = returns

    def reset(self) -> dict[str, Any]:
        """Start an episode; the first reset seeds the generator that all later episodes
        draw from.
        """
        if not self._init_flag:
            super().reset()  # builds the environment
            self._env.reset(seed=self._seed)
        observation: dict[str, Any] = super().reset()
        return observation

    def step(self, action: Any) -> Any:
        """One step; the return of an episode that ends is noted."""
        timestep = super().step(action)
        if timestep.done:
            self._returns.append(float(timestep.info["eval_episode_return"]))
        return timestep


def fix_tree_seed() -> None:
    """Run this script again with `srand` replaced by a function that does nothing.

    The search tree reseeds the C generator from the clock before each traversal, with no option
    against it. Needs Linux and a C compiler; without one the script goes on, and ties fall
    differently in each run.
    """
    compiler = shutil.which("cc")
    if os.environ.get(PRELOADED) or compiler is None or not sys.platform.startswith("linux"):
        return
    folder = tempfile.mkdtemp(prefix="srand-")
    source = Path(folder, "srand.c")
    library = Path(folder, "srand.so")
    source.write_text("void srand(unsigned int seed) { (void)seed; }\n")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    env = {**os.environ, "LD_PRELOAD": str(library), PRELOADED: "1"}
    code = subprocess.run([sys.executable, *sys.argv], env=env).returncode
    shutil.rmtree(folder)
    sys.exit(code)


def build_config(seed: int) -> Any:
    """LightZero's compiled CartPole configuration, on the CPU and in one process."""
    config = copy.deepcopy(main_config)
    create = copy.deepcopy(create_config)
    config.policy.cuda = False
    config.policy.device = "cpu"
    config.policy.model.world_model_cfg.device = "cpu"
    for part in (config.env, config.policy, config.policy.model.world_model_cfg):
        part.evaluator_env_num = EVAL_ENVS
    config.env.n_evaluator_episode = EVAL_ENVS
    create.env_manager.type = "base"
    return compile_config(config, seed=seed, env=None, auto=True, create_cfg=create, save_cfg=False)


def build_policy(cfg: Any, weights: Path | None = None) -> tuple[Any, UniZeroModel]:
    """A policy and the model inside it, optionally with the weights of an earlier run."""
    model = UniZeroModel(**cfg.policy.model)
    if weights is not None:
        model.load_state_dict({**model.state_dict(), **load_file(weights)}, strict=True)
    policy = create_policy(cfg.policy, model=model, enable_field=["learn", "collect", "eval"])
    return policy, model


def build_envs(cfg: Any, count: int, seed: int) -> tuple[Any, list[float]]:
    """`count` environments stepped in this process, with the list that the returns of episodes end
    up in.

    They are seeded `seed`, `seed + 1`, ...
    """
    returns: list[float] = []
    manager = create_env_manager(
        cfg.env.manager, [partial(SeededCartPole, returns, cfg=cfg.env)] * count
    )
    manager.seed(seed, dynamic_seed=False)
    return manager, returns


def save(model: UniZeroModel, out: Path) -> None:
    """Write the model's tensors in fp32; cloned, as the encoder is reachable under three names."""
    tensors = {
        k: v.detach().clone().contiguous()
        for k, v in model.state_dict().items()
        if k not in DERIVED
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    partial_file = out.with_suffix(".tmp")
    save_file(tensors, partial_file)
    partial_file.chmod(0o644)
    partial_file.replace(out)


def evaluate(policy: Any, cfg: Any, seed: int, rounds: int = 1) -> list[float]:
    """Returns of `8 * rounds` greedy episodes, whose starting states `seed` decides."""
    # seeding an environment reseeds numpy: training must not notice
    random_state = np.random.get_state()
    envs, returns = build_envs(cfg, EVAL_ENVS, seed)
    evaluator = MuZeroEvaluator(
        n_evaluator_episode=EVAL_ENVS,
        env=envs,
        policy=policy.eval_mode,
        exp_name="exp",
        policy_config=cfg.policy,
    )
    # one episode per environment: with more, quick failures would count more often
    for _ in range(rounds):
        evaluator.eval()
    evaluator.close()
    np.random.set_state(random_state)
    return returns


def learn(policy: Any, buffer: Any, updates: int, done: int) -> int:
    """Up to `updates` gradient steps after the `done` earlier ones; returns how many
    there are now.
    """
    if buffer.get_num_of_transitions() <= policy._cfg.batch_size:
        return done
    for iteration in range(done, done + updates):
        batch = buffer.sample(policy._cfg.batch_size, policy)
        batch.append(iteration)
        policy.learn_mode.forward(batch)
    policy.recompute_pos_emb_diff_and_clear_cache()
    return done + updates


def train(cfg: Any, minutes: float, seed: int, out: Path) -> dict[str, float]:
    """Collect and learn in turns for `minutes`, saving whenever an evaluation beats the best so
    far.

    Stops early once every evaluation episode has the greatest length, 200. Returns where the best
    was found.
    """
    set_pkg_seed(seed, use_cuda=False)
    policy, model = build_policy(cfg)
    buffer = UniZeroGameBuffer(cfg.policy)
    envs, _ = build_envs(cfg, cfg.policy.collector_env_num, seed)
    collector = MuZeroCollector(
        env=envs, policy=policy.collect_mode, exp_name="exp", policy_config=cfg.policy
    )
    explore = {"temperature": cfg.policy.fixed_temperature_value, "epsilon": 0.0}
    started = time.monotonic()
    best = -1.0
    updates = 0
    next_eval = cfg.policy.eval_freq
    late = False
    found: dict[str, float] = {}
    while best < 200 and not late:
        data = collector.collect(train_iter=updates, policy_kwargs=explore)
        buffer.push_game_segments(data)
        updates = learn(policy, buffer, calculate_update_per_collect(cfg, data, 1), updates)
        late = time.monotonic() - started > minutes * 60
        if updates < next_eval and not late:
            continue
        next_eval = updates + cfg.policy.eval_freq
        mean = float(np.mean(evaluate(policy, cfg, SELECT_SEED)))
        elapsed = (time.monotonic() - started) / 60
        steps = collector.envstep
        print(f"{elapsed:.1f} min, {steps} steps, {updates} updates: return {mean:.1f}", flush=True)
        if mean > best:
            best = mean
            found = {"minutes": round(elapsed, 1), "env_steps": steps, "updates": updates}
            save(model, out)
    collector.close()
    return found


def main() -> None:
    """Train, reload the file that was written, and evaluate it from starting states not seen
    before.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="wall-clock limit of the training"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("cartpole.safetensors"))
    parser.add_argument("--evaluate-only", action="store_true", help="evaluate --out as it is")
    args = parser.parse_args()
    fix_tree_seed()
    logging.disable(logging.INFO)
    out = args.out.resolve()
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # LightZero writes its logs below the working directory
        cfg = build_config(args.seed)
        if not args.evaluate_only:
            print("best:", train(cfg, args.minutes, args.seed, out), flush=True)
        returns = evaluate(build_policy(cfg, out)[0], cfg, FINAL_SEED, rounds=3)
        os.chdir(home)
    mean = np.mean(returns)
    low = min(returns)
    high = max(returns)
    print(f"{len(returns)} episodes: mean {mean:.1f}, min {low:.0f}, max {high:.0f}")
    print(f"{out.name}: {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()

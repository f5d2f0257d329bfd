"""World models of LightZero's main, and what drives them: random play, misses, reanalysis, real
searches.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from lightzero_trees import quiet

MODES = ("shift", "rotary", "exact", "rebuild")
ENVS = 3


def build(
    mode: str,
    manager: bool = False,
    *,
    context: int = 10,
    envs: int = ENVS,
    ppo: bool = False,
    **more: Any,
) -> Any:
    """A UniZero model for small images and 6 actions, random in all its weights, in eval mode."""
    with quiet():
        from easydict import EasyDict
        from lzero.model.unizero_model import UniZeroModel
        from lzero.model.unizero_ppo_model import UniZeroPPOModel
        from lzero.policy.unizero import UniZeroPolicy

        config = EasyDict(copy.deepcopy(UniZeroPolicy.config["model"]["world_model_cfg"]))
        config.update(
            context_length=context,
            max_blocks=20,
            max_tokens=40,
            num_layers=2,
            num_heads=2,
            embed_dim=64,
            env_num=envs,
            action_space_size=6,
            obs_type="image",
            group_size=8,
            device="cpu",
            norm_type="LN",
            rotary_emb=mode == "rotary",
            max_seq_len=256,
            rope_theta=1e4,
            use_new_cache_manager=manager,
            exact_kv_window_reset=mode == "exact",
            rebuild_kv_window_from_tokens=mode == "rebuild",
            **{"num_simulations": 40, **more},
        )
        torch.manual_seed(0)
        kind = UniZeroPPOModel if ppo else UniZeroModel
        model = kind(
            observation_shape=(3, 64, 64),
            action_space_size=6,
            num_res_blocks=1,
            num_channels=8,
            norm_type="LN",
            world_model_cfg=config,
        ).eval()
        fill(model)
        if mode == "shift":
            model.world_model.precompute_pos_emb_diff_kv()
    return model


@torch.no_grad()
def fill(model: Any) -> None:
    """Random numbers for weights of zero: zero last layers would give every latent
    state one key.
    """
    for weights in model.parameters():
        if not weights.abs().any():
            weights.normal_(0, 0.3)


def counters(wm: Any) -> dict[str, int]:
    """LightZero's own counts of hits, padding and rebuilt windows."""
    names = (
        "hit_count",
        "total_query_count",
        "root_hit_cnt",
        "root_total_query_cnt",
        "kv_padding_total_batches",
        "kv_padding_unequal_batches",
        "kv_padding_padded_samples",
        "kv_padding_token_count",
        "kv_padding_max_tokens",
        "exact_kv_reset_batches",
        "exact_kv_reset_samples",
        "reanalysis_root_seed_count",
        "reanalysis_root_seed_hit_count",
    )
    return {name: getattr(wm, name, 0) for name in names}


def forget_root(wm: Any, env: int) -> None:
    """What the policy does when an episode ends."""
    wm.past_token_context_init_infer_envs[env].clear()
    if wm.use_new_cache_manager:
        wm.kv_cache_manager.init_pools[env].clear()
    else:
        wm.past_kv_cache_init_infer_envs[env].clear()


def forget_nodes(wm: Any) -> None:
    """What LightZero does after each root step."""
    if wm.use_new_cache_manager:
        wm.kv_cache_manager.clear_recur_cache()
    else:
        wm.past_kv_cache_recurrent_infer.clear()
    wm.past_token_context_recurrent_infer.clear()


class Driver:
    """Drives one world model with seeded random numbers, and notes everything it answers."""

    def __init__(self, wm: Any, seed: int = 0, misses: float = 0.0) -> None:
        self.wm = wm
        self.misses = misses
        self.random = np.random.RandomState(seed)
        self.lost = np.random.RandomState(seed + 1)
        self.answers: list[torch.Tensor] = []

    def latents(self, rows: int) -> Any:
        return self.random.randn(rows, 1, self.wm.embed_dim).astype("f4")

    def note(self, *parts: Any) -> None:
        self.answers += [part.clone() for part in parts if part is not None and part.numel()]

    @torch.no_grad()
    def play(self, steps: int = 14, simulations: int = 12, envs: int = ENVS) -> None:
        """Root steps of random subsets of the environments, first and later steps mixed, a search
        below each.
        """
        wm = self.wm
        random = self.random
        last = torch.zeros(envs, 1, wm.embed_dim)
        actions = [-1] * envs
        times = [0] * envs
        for _ in range(steps):
            ready = sorted(random.choice(envs, random.randint(1, envs + 1), replace=False).tolist())
            now = torch.from_numpy(self.latents(len(ready)))
            before = last[ready]
            if self.lost.rand() < self.misses:
                before[0] += 1
            positions = np.array([times[env] for env in ready])
            out = wm.wm_forward_for_initial_infererence(
                before, [actions[env] for env in ready], now, positions, ready
            )
            forget_nodes(wm)
            self.note(out.logits_policy, out.logits_value, out.logits_observations)
            wm.latent_state = now
            self.search(now.numpy(), simulations, positions)
            for row, env in enumerate(ready):
                last[env] = now[row]
                actions[env] = int(random.randint(6))
                times[env] = times[env] + 1
                if random.rand() < 0.12:
                    actions[env] = -1
                    times[env] = 0
                    forget_root(wm, env)

    def search(self, roots: Any, simulations: int, positions: Any) -> None:
        """Nodes below random earlier ones, none twice by one action: two nodes with one latent have
        one key.
        """
        wm = self.wm
        random = self.random
        rows = range(len(roots))
        states = [roots]
        depths = [[0] * len(roots)]
        untried = [[random.permutation(6).tolist() for _ in range(simulations)] for _ in rows]
        for simulation in range(simulations):
            places = [
                int(random.choice([p for p in range(len(states)) if untried[row][p]]))
                for row in rows
            ]
            latents = np.stack([states[place][row] for row, place in enumerate(places)])
            if self.lost.rand() < self.misses:
                latents[self.lost.randint(len(latents))] += 1
            paged = getattr(wm, "paged", None)
            # as LightZero's search does once a model is attached
            if paged is not None and paged.keys == "node":
                paged.nodes.choose(places, rows)
            depth = [depths[place][row] for row, place in enumerate(places)]
            actions = torch.tensor(
                [[untried[row][place].pop()] for row, place in enumerate(places)]
            )
            _, latent, reward, policy, value = wm.forward_recurrent_inference(
                [(latents, actions)], simulation, depth, positions
            )
            self.note(latent, reward, policy, value)
            states.append(latent.numpy().copy())
            depths.append([one + 1 for one in depth])

    @torch.no_grad()
    def reanalyze(self) -> None:
        """Chunks with seeded roots of windows of all lengths, without seeds, and wider than the
        model's env_num.
        """
        wm = self.wm
        longest = self.wm.context_length - 3
        wm.reanalyze_phase = True
        wm.latent_state = torch.zeros(1)
        for rows, seeded in ((ENVS, True), (ENVS, True), (ENVS, False), (7, False), (2, True)):
            with quiet():
                wm.clear_caches()
            roots = self.latents(rows)
            if seeded:
                lengths = [2 * self.random.randint(0, longest // 2) for _ in range(rows)]
                lengths[0] = longest - 1
                before = [
                    torch.from_numpy(self.random.randn(length, wm.embed_dim).astype("f4"))
                    for length in lengths
                ]
                tokens = [
                    torch.cat((old, torch.from_numpy(root))) for old, root in zip(before, roots)
                ]
                self.note(*map(torch.tensor, wm.seed_reanalysis_root_caches(roots, tokens)))
            self.search(roots, 10, np.arange(rows) + 5)
        wm.reanalyze_phase = False


def encode_alone(model: Any) -> Any:
    """Have a model encode every observation by itself, so that its bits do not depend on the rows
    beside it.

    Main's own cache finds no root again whose bits differ.
    """
    tokenizer = model.world_model.tokenizer
    encode = tokenizer.encode_to_obs_embeddings
    tokenizer.encode_to_obs_embeddings = lambda seen: torch.cat([encode(row[None]) for row in seen])
    return model


def search_with_lightzero(model: Any, steps: int = 8, envs: int = 4) -> list[Any]:
    """LightZero's C++ search over random subsets of the environments: visits and values of every
    root.
    """
    with quiet():
        from easydict import EasyDict
        from lzero.mcts import UniZeroMCTSCtree
        from lzero.policy.unizero import UniZeroPolicy

        config = EasyDict(UniZeroMCTSCtree.default_config())
        config.update(copy.deepcopy(UniZeroPolicy.config))
        config.update(
            num_simulations=25,
            device="cpu",
            deterministic=True,
            env_type="not_board_games",
            cuda=False,
        )
        config.model.update(
            value_support_range=(-50.0, 51.0, 1.0), reward_support_range=(-50.0, 51.0, 1.0)
        )
        config.model.categorical_distribution = True
        mcts = UniZeroMCTSCtree(config)
    random = np.random.RandomState(0)
    found = []
    last = torch.zeros(envs, 3, 64, 64)
    actions = [-1] * envs
    times = [0] * envs
    for _ in range(steps):
        ready = sorted(random.choice(envs, random.randint(2, envs + 1), replace=False).tolist())
        now = torch.from_numpy(random.rand(len(ready), 3, 64, 64).astype("f4"))
        positions = [times[env] for env in ready]
        with torch.no_grad():
            out = model.initial_inference(
                last[ready], [actions[e] for e in ready], now, positions, ready_env_id=ready
            )
            roots = UniZeroMCTSCtree.roots(len(ready), [list(range(6))] * len(ready))
            roots.prepare_no_noise(
                out.reward, out.policy_logits.numpy().tolist(), [-1] * len(ready)
            )
            mcts.search(
                roots, model, out.latent_state.numpy(), [-1] * len(ready), np.array(positions)
            )
        visits = roots.get_distributions()
        found.append((visits, roots.get_values()))
        for row, env in enumerate(ready):
            last[env] = now[row]
            actions[env] = int(np.argmax(visits[row]))
            times[env] = times[env] + 1
    return found


def build_policy() -> Any:
    """A UniZero policy with a small model for images, to collect in 4 environments and to evaluate
    in 3.
    """
    with quiet():
        from easydict import EasyDict
        from lzero.policy.unizero import UniZeroPolicy

        config = EasyDict(copy.deepcopy(UniZeroPolicy.config))
        config.update(
            cuda=False,
            device="cpu",
            num_simulations=50,
            multi_gpu=False,
            use_wandb=False,
            on_policy=False,
            collector_env_num=4,
            evaluator_env_num=3,
            exp_name="run",
            cfg_type="UniZeroPolicyDict",
            deterministic=True,
            eps=EasyDict(eps_greedy_exploration_in_collect=False),
        )
        config.model.update(
            observation_shape=(3, 64, 64),
            action_space_size=6,
            num_res_blocks=1,
            num_channels=8,
            norm_type="LN",
        )
        config.model.world_model_cfg.update(
            context_length=8,
            max_blocks=10,
            max_tokens=20,
            num_layers=2,
            num_heads=2,
            embed_dim=64,
            env_num=4,
            action_space_size=6,
            device="cpu",
            num_simulations=50,
            group_size=8,
            norm_type="LN",
            obs_type="image",
        )
        torch.manual_seed(0)
        policy = UniZeroPolicy(config, enable_field=["collect", "eval", "learn"])
        fill(policy._model)
        policy._model.world_model.precompute_pos_emb_diff_kv()
    return policy


def build_cartpole_policy(manager: bool) -> Any:
    """Main's policy for CartPole, with its own configuration.

    Main cannot build models for vectors: it calls two constructors by keywords that they do not
    have. And it hands them whole numbers, which no linear layer takes.
    """
    with quiet():
        from easydict import EasyDict
        from lzero.model import unizero_model
        from lzero.policy.unizero import UniZeroPolicy
        from zoo.classic_control.cartpole.config.cartpole_unizero_config import main_config

        config = copy.deepcopy(UniZeroPolicy.config)
        merged = _merged(config, copy.deepcopy(main_config.policy))
        merged.update(
            cuda=False,
            device="cpu",
            multi_gpu=False,
            exp_name="run",
            cfg_type="UniZeroPolicyDict",
            on_policy=False,
            deterministic=True,
            eps=EasyDict(eps_greedy_exploration_in_collect=False),
        )
        merged.model.world_model_cfg.update(
            device="cpu", group_size=8, use_new_cache_manager=manager
        )
        renamed = {"layer_num": "num_layers", "output_shape": "output_dim"}
        names = ("RepresentationNetworkMLP", "VectorDecoderForMemoryEnv")
        before = {name: getattr(unizero_model, name) for name in names}
        try:
            for name, kind in before.items():
                setattr(
                    unizero_model,
                    name,
                    lambda *args, kind=kind, **given: kind(
                        *args, **{renamed.get(key, key): value for key, value in given.items()}
                    ),
                )
            torch.manual_seed(0)
            policy = UniZeroPolicy(merged, enable_field=["learn", "collect"])
        finally:
            for name, kind in before.items():
                setattr(unizero_model, name, kind)
        fill(policy._model)
        for model in (policy._model, policy._target_model):
            model.representation_network.register_forward_pre_hook(
                lambda _, given: (given[0].float(),)
            )
    return policy


def _merged(base: Any, more: Any) -> Any:
    from easydict import EasyDict

    result = EasyDict(base)
    for key, value in more.items():
        known = result.get(key)
        result[key] = (
            _merged(known, value) if isinstance(value, dict) and isinstance(known, dict) else value
        )
    return result


@torch.no_grad()
def collect_cartpole(policy: Any, steps: int) -> int:
    """Play CartPole in all environments of a policy; returns how many roots went on with an
    episode.
    """
    import gymnasium

    count = policy._cfg.collector_env_num
    going_on = 0
    games = [gymnasium.make("CartPole-v0") for _ in range(count)]
    seen = [game.reset(seed=row)[0] for row, game in enumerate(games)]
    times = [0] * count
    policy._reset_collect()
    for _ in range(steps):
        data = torch.from_numpy(np.stack(seen).astype("f4"))
        answers = policy._forward_collect(
            data,
            [np.ones(2, "int8")] * count,
            temperature=1.0,
            to_play=[-1] * count,
            epsilon=0.0,
            ready_env_id=list(range(count)),
            timestep=list(times),
        )
        going_on += sum(time > 0 for time in times)
        for row, game in enumerate(games):
            seen[row], _, done, cut, _ = game.step(answers[row]["action"])
            times[row] += 1
            if done or cut:
                seen[row] = game.reset()[0]
                times[row] = 0
                policy._reset_collect([row])
    return going_on


@torch.no_grad()
def collect_and_evaluate(policy: Any, steps: int = 8) -> list[Any]:
    """Values and visits of random subsets of the environments; every third step evaluates with the
    same model.
    """
    random = np.random.RandomState(0)
    found = []
    np.random.seed(1)  # LightZero draws noise and actions from it
    for step in range(steps):
        for forward, envs in ((policy._forward_collect, 4), (policy._forward_eval, 3))[
            : 1 if step % 3 else 2
        ]:
            ready = sorted(random.choice(envs, random.randint(2, envs + 1), replace=False).tolist())
            seen = torch.from_numpy(random.rand(len(ready), 3, 64, 64).astype("f4"))
            more = {"temperature": 1.0, "epsilon": 0.0} if envs == 4 else {}
            out = forward(
                seen,
                [np.ones(6, "int8")] * len(ready),
                to_play=[-1] * len(ready),
                ready_env_id=ready,
                timestep=np.full(len(ready), step),
                **more,
            )
            found += [
                (env, out[env]["searched_value"], out[env]["visit_count_distributions"])
                for env in ready
            ]
    return found


def worst(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """The largest difference, relative to the largest number of its tensor; 0 where all
    bits agree.
    """
    assert len(one) == len(other)
    return max(
        float((a - b).abs().max() / a.abs().max().clamp_min(1e-9)) for a, b in zip(one, other)
    )

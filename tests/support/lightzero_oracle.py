"""What every row must answer: its own window, replayed alone, with no cache that is under test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch


class Token(NamedTuple):
    """One token of a window: its embedding, and its rotary position."""

    embedding: torch.Tensor
    position: int


Window = tuple[Token, ...]


@torch.no_grad()
def replay(wm: Any, window: Window) -> list[torch.Tensor]:
    """The transformer's output at every token [E]: one row, a fresh dense cache, learned positions
    from 0 on. Tokens whose positions follow each other go through it together.
    """
    past = wm.transformer.generate_empty_keys_values(n=1, max_tokens=len(window))
    embeddings = torch.stack([token.embedding.view(-1) for token in window])
    if not wm.config.rotary_emb:
        embeddings = embeddings + wm.pos_emb.weight[: len(window)]
    outputs: list[torch.Tensor] = []
    for first, end in runs(window):
        x = embeddings[None, first:end]
        outputs += wm.transformer(x, past, start_pos=[window[first].position])[0]
    return outputs


def runs(window: Window) -> Iterator[tuple[int, int]]:
    """Where tokens of consecutive positions begin, and where they end."""
    first = 0
    for place in range(1, len(window)):
        if window[place].position != window[place - 1].position + 1:
            yield first, place
            first = place
    yield first, len(window)


@torch.no_grad()
def heed_context(wm: Any, factor: float = 8) -> None:
    """Make answers depend on the context more than they do with the weights of a fresh or small
    model.
    """
    for block in wm.transformer.blocks:
        for layer in (block.attn.query, block.attn.key, block.attn.value, block.attn.proj):
            layer.weight.mul_(factor)
    if not wm.config.rotary_emb:
        wm.precompute_pos_emb_diff_kv()


class Player:
    """Plays environments and searches them, and notes how far every row's answer is from that row
    alone, unless nobody wants to know.
    """

    def __init__(
        self, model: Any, envs: int = 4, seed: int = 0, gap: int = 2, judged: bool = True
    ) -> None:
        self.model = model
        self.judged = judged
        self.random = np.random.default_rng(seed)
        # LightZero's search places the first action below a root so many rotary positions too far
        self.gap = gap
        self.windows: dict[int, Window] = {}  # of the last root of each environment
        self.clocks: dict[int, int] = {}  # its step
        self.errors: list[np.ndarray[Any, Any]] = []  # [rows] of each step
        self.values: list[torch.Tensor] = []  # [rows, ...] of each step
        self.observations = torch.zeros(envs, 4)
        self.actions = [-1] * envs
        self.envs = list(range(envs))

    @property
    def wm(self) -> Any:
        return self.model.world_model

    def observe(self, rows: int) -> torch.Tensor:
        return torch.from_numpy(self.random.normal(size=(rows, 4)).astype(np.float32))

    def root(self, now: torch.Tensor | None = None, times: Sequence[int] | None = None) -> None:
        """The next root of every environment; `times` are the steps of their episodes."""
        now = self.observe(len(self.envs)) if now is None else now
        times = (
            [self.clocks.get(env, -1) + 1 for env in self.envs] if times is None else list(times)
        )
        self.clocks.update(zip(self.envs, times))
        begins = max(self.actions) == -1
        answer = self.model.initial_inference(
            self.observations, self.actions, now, [np.array(t) for t in times]
        )
        for row, env in enumerate(self.envs):
            seen = Token(answer.latent_state[row, 0], 2 * times[row])
            before: Window = ()
            if not begins:
                before = (
                    *self._kept(self.windows[env]),
                    self._action(self.actions[row], 2 * times[row] - 1),
                )
            self.windows[env] = (*before, seen)
        self.times = times
        self.tree = [[(self.windows[env], 0) for env in self.envs]]
        self._note(answer, [window for window, _ in self.tree[0]])
        self.observations, self.actions = (
            now,
            [int(a) for a in self.random.integers(2, size=len(now))],
        )

    def step(self, places: Sequence[int], actions: Sequence[int] | None = None) -> None:
        """A simulation: each row goes on from its node that was made at simulation `places[row]`
        (0: its root).
        """
        rows = range(len(self.envs))
        parents = [self.tree[place][row] for row, place in enumerate(places)]
        actions = (
            [int(a) for a in self.random.integers(2, size=len(rows))]
            if actions is None
            else list(actions)
        )
        paged = getattr(self.wm, "paged", None)
        # as LightZero's search does once a model is attached
        if paged is not None and paged.keys == "node":
            paged.nodes.choose(places, rows)
        latents = np.stack([window[-1].embedding.numpy()[None] for window, _ in parents])
        depths = [depth + 1 for _, depth in parents]
        answer = self.model.recurrent_inference(
            [(latents, torch.tensor(actions))],
            len(self.tree) - 1,
            depths,
            [np.array(t) for t in self.times],
        )
        made = []
        for row, (window, depth) in enumerate(parents):
            where = 2 * (depth + self.times[row]) + self.gap
            acted = (*self._kept(window), self._action(actions[row], where + 1))
            made.append(
                ((*acted, Token(answer.latent_state[row, 0].clone(), where + 2)), depth + 1)
            )
        self.tree.append(made)
        self._note(answer, [window for window, _ in made], predicted=True)

    def search(self, simulations: int, level: bool = False) -> None:
        """A root and `simulations` nodes; with `level` all rows grow alike, so that their windows
        stay equal.
        """
        self.root()
        for made in range(1, simulations + 1):
            places = self.random.integers(made, size=1 if level else len(self.envs))
            self.step([int(p) for p in places] * (len(self.envs) if level else 1))

    def worst(self) -> float:
        """The largest difference between an answer and that of the row alone."""
        return float(max(error.max() for error in self.errors))

    def _kept(self, window: Window) -> Window:
        """What is stored of a window: a full one has lost its oldest observation and action."""
        length = self.wm.context_length
        if length <= 2:  # no context: a node starts from its own token
            return window[-1:]
        return window[2:] if len(window) >= length - 1 else window

    def _action(self, action: int, position: int) -> Token:
        return Token(self.wm.act_embedding_table(torch.tensor(action)).detach(), position)

    def _note(self, answer: Any, windows: Sequence[Window], predicted: bool = False) -> None:
        self.values.append(answer.value.clone())
        if self.judged:
            self.errors.append(
                np.array([self._error(answer, row, w, predicted) for row, w in enumerate(windows)])
            )

    @torch.no_grad()
    def _error(self, answer: Any, row: int, window: Window, predicted: bool) -> float:
        outputs = replay(self.wm, window)
        found = [answer.value[row], answer.policy_logits[row]]
        wanted = [
            head.head_module(outputs[-1][None])
            for head in (self.wm.head_value, self.wm.head_policy)
        ]
        if predicted:
            found += [answer.reward[row], answer.latent_state[row, 0]]
            heads = (self.wm.head_rewards, self.wm.head_observations)
            wanted += [head.head_module(outputs[-2][None]) for head in heads]
        return max(
            float((one.flatten() - other.flatten()).abs().max())
            for one, other in zip(found, wanted)
        )

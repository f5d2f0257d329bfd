"""PPO-MCTS: a value function guides decoding, by a tree search over single tokens.

What it shows (the search is that of Liu et al., arXiv:2309.15028):

- policy and value are two heads of one model: `PagedLM(head=)` tells both in one forward;
- the reference, which the policy pays for leaving, is another model: its nodes mirror the policy's;
- prompts of unequal lengths are searched side by side, padded on the left as for `generate`;
- the likeliest tokens behind a node are its children, and pending: until a simulation comes to one
  of them, it costs neither a forward nor a page;
- the move is promoted: what hangs below it stays for the next one, all else gives its pages back.

    python examples/ppo_mcts.py --check
    python examples/ppo_mcts.py --model FOLDER
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from common import Cacheless, Head, Watch, arguments, load, prompts, report, text, told

from paged_kv.integrations.huggingface.lm import PagedLM

TEXTS = ("The weather today is", "My favourite thing to eat in the morning is a", "He said")


class Options(NamedTuple):
    """Of a search."""

    tokens: int = 8  # moves
    simulations: int = 12  # of a move
    width: int = 4  # children of a node
    exploration: float = 2.0
    penalty: float = 0.1  # for what is likelier by the policy than by the reference
    end: int | None = None  # the token that ends a text


class Spot:
    """A node of the search, and what its visits said."""

    def __init__(self, node: Any, prior: float = 1.0, reward: float = 0.0, value: float = 0.0):
        self.node = node
        self.prior = prior
        self.reward = reward  # of its last token
        self.value = value  # its parent's, until it is visited
        self.visits = 0
        self.children: list[Spot] = []
        self.mirrored: Any = None  # of the reference: kept as long as this is

    def best(self, exploration: float) -> Spot:
        """The child to look at next."""

        def promise(child: Spot) -> float:
            curious = child.prior * math.sqrt(self.visits) / (1 + child.visits)
            return child.reward + child.value + exploration * curious

        return max(self.children, key=promise)

    def learn(self) -> None:
        """One more visit: the value is now the mean of what its children are worth."""
        self.visits += 1
        tried = [child for child in self.children if child.visits]
        if tried:
            total = sum(child.visits * (child.reward + child.value) for child in tried)
            self.value = total / sum(child.visits for child in tried)


def expand(policy: Any, reference: Any, leaves: list[Spot], options: Options) -> None:
    """Ask both models about these leaves, all in one batch, and give them pending children."""
    nodes = [leaf.node for leaf in leaves]
    said = policy.logits(nodes)
    mirrored = reference.mirror(nodes)
    likely, tokens = said[:, :-1].log_softmax(-1).topk(options.width)
    usual = reference.logits(mirrored).log_softmax(-1).gather(-1, tokens)
    rewards = (-options.penalty * (likely - usual)).tolist()
    priors = likely.softmax(-1).tolist()
    parents = [node for node in nodes for _ in range(options.width)]
    kids = iter(policy.fork(parents, tokens.reshape(-1, 1).tolist()))
    for row, leaf in enumerate(leaves):
        leaf.mirrored = mirrored[row]
        leaf.value = float(said[row, -1])
        found = [Spot(next(kids), *each, leaf.value) for each in zip(priors[row], rewards[row])]
        leaf.children = [] if leaf.node.tokens[-1] == options.end else found


def simulate(policy: Any, reference: Any, roots: list[Spot], options: Options) -> None:
    """One walk down each tree, to a leaf, and back."""
    walks = [[root] for root in roots]
    for walk in walks:
        while walk[-1].children:
            walk.append(walk[-1].best(options.exploration))
    expand(policy, reference, [walk[-1] for walk in walks], options)
    for walk in walks:
        for spot in reversed(walk):
            spot.learn()


def decode(policy: Any, reference: Any, ids: Any, mask: Any, options: Options) -> Any:
    """The moves behind each prompt: pairs of a token and how often it was visited."""
    roots = [Spot(node) for node in policy.prefill(ids, mask)]
    moves: list[list[tuple[int, int]]] = [[] for _ in roots]
    live = list(range(len(roots)))
    for _ in range(options.tokens):
        for _ in range(options.simulations if live else 0):
            simulate(policy, reference, [roots[row] for row in live], options)
        for row in live:
            roots[row] = max(roots[row].children, key=lambda child: child.visits)
            policy.promote(roots[row].node)
            moves[row].append((roots[row].node.tokens[-1], roots[row].visits))
        live = [row for row in live if moves[row][-1][0] != options.end]
    return moves


def two_heads(model: Any, seed: int) -> Head:
    """Logits, and a value behind them: a random one, in place of what PPO has trained."""
    made = torch.Generator().manual_seed(seed)
    weights = torch.randn(model.config.hidden_size, 1, generator=made).to(model.device)
    logits = model.get_output_embeddings()
    return lambda hidden: torch.cat([logits(hidden), torch.tanh(hidden @ weights / 8)], -1)


def main(args: list[str] | None = None) -> None:
    asked = arguments(__doc__).parse_args(args)
    model, tokenizer = load(asked.model)
    other, _ = load(asked.model)
    with torch.no_grad():  # stands for what PPO has changed since both were the same
        next(model.base_model.layers.parameters()).mul_(1.05)
    head = two_heads(model, asked.seed)
    ids, mask = prompts(tokenizer, TEXTS)
    options = Options(end=model.config.eos_token_id)
    policy, reference = PagedLM(model, head=head), PagedLM(other)
    watches = [Watch(policy), Watch(reference)]
    moves = decode(policy, reference, ids, mask, options)
    for found in moves:
        print(text(tokenizer, [token for token, _ in found]))
    report(watches)
    if asked.check:
        told(moves == decode(Cacheless(model, head), Cacheless(other), ids, mask, options))


if __name__ == "__main__":
    main()

"""Particles: sequential Monte Carlo over texts that must not contain a letter.

What it shows:

- each particle is a node; a step asks for all that still write in one batch;
- a token is drawn among those that are allowed, and the particle's weight becomes what the model
  gives to all of these together: the weighted particles are samples of the model's own texts, given
  that none has the letter;
- resampling is a batched fork: particles of much weight go on several times, and share every page
  until they differ; nothing is copied or moved;
- a particle that drew the end is fed no more.

    python examples/particles.py --check
    python examples/particles.py --model FOLDER --letter e
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from common import Cacheless, Watch, arguments, load, prompts, report, text, told

from paged_kv.integrations.huggingface.lm import PagedLM

TEXTS = ("My favourite thing to do on a sunny day is",)


class Options(NamedTuple):
    """Of a run."""

    allowed: torch.Tensor  # [vocabulary], true for tokens that may be drawn
    end: int | None
    particles: int = 16
    tokens: int = 24
    seed: int = 0


class Particle(NamedTuple):
    """A text, and the logarithm of its weight."""

    node: Any
    weight: float


def step(lm: Any, live: list[Particle], options: Options, draws: torch.Generator) -> list[Particle]:
    """Each of these with one more token."""
    nodes = [particle.node for particle in live]
    logprobs = lm.logits(nodes).float().log_softmax(-1).cpu()
    logprobs = logprobs.masked_fill(~options.allowed, -torch.inf)
    masses = logprobs.logsumexp(-1).tolist()
    tokens = torch.multinomial(logprobs.softmax(-1), 1, generator=draws).tolist()
    forked = lm.fork(nodes, tokens)
    return [Particle(node, each.weight + mass) for node, each, mass in zip(forked, live, masses)]


def resampled(lm: Any, particles: list[Particle], draws: torch.Generator) -> list[Particle]:
    """As many particles of equal weight, where a few have most of it; else the same ones."""
    weights = torch.tensor([particle.weight for particle in particles], dtype=torch.float64)
    shares = weights.softmax(0)
    count = len(particles)
    if 1 / float((shares**2).sum()) > count / 2:
        return particles
    start = torch.rand(1, generator=draws, dtype=torch.float64)
    places = (torch.arange(count) + start) / count
    chosen = torch.searchsorted(shares.cumsum(0), places).clamp(max=count - 1).tolist()
    forked = lm.fork([particles[row].node for row in chosen], [[]] * count)
    mean = float(weights.logsumexp(0)) - torch.tensor(float(count)).log().item()
    return [Particle(node, mean) for node in forked]


def run(lm: Any, ids: torch.Tensor, mask: torch.Tensor, options: Options) -> list[Particle]:
    """Weighted texts behind one prompt."""
    draws = torch.Generator().manual_seed(options.seed)
    (root,) = lm.prefill(ids, mask)
    particles = [Particle(root, 0.0)] * options.particles
    for _ in range(options.tokens):
        live = [row for row, each in enumerate(particles) if going(each, root, options)]
        if not live:
            break
        for row, particle in zip(live, step(lm, [particles[row] for row in live], options, draws)):
            particles[row] = particle
        particles = resampled(lm, particles, draws)
    return particles


def going(particle: Particle, root: Any, options: Options) -> bool:
    """Whether a particle has not drawn the end."""
    tokens = particle.node.tokens
    return len(tokens) == len(root.tokens) or tokens[-1] != options.end


def without(letter: str, tokenizer: Any, vocabulary: int) -> torch.Tensor:
    """Which tokens [vocabulary] do not contain a letter; every other one, without a tokenizer."""
    if tokenizer is None:
        return torch.arange(vocabulary) % 2 == 0
    texts = tokenizer.batch_decode([[token] for token in range(vocabulary)])
    return torch.tensor([letter not in each.lower() for each in texts])


def main(args: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--letter", default="e", help="that no text may contain")
    asked = parser.parse_args(args)
    model, tokenizer = load(asked.model)
    ids, mask = prompts(tokenizer, TEXTS)
    allowed = without(asked.letter, tokenizer, model.config.vocab_size)
    options = Options(allowed, model.config.eos_token_id, seed=asked.seed)
    lm = PagedLM(model)
    watch = Watch(lm)
    found = run(lm, ids, mask, options)
    shares = torch.tensor([particle.weight for particle in found]).softmax(0).tolist()
    start = ids.shape[1]
    for share, particle in zip(shares, found):
        print(f"{share:.3f}", text(tokenizer, particle.node.tokens[start:]))
    report([watch])
    if asked.check:
        told(same(found, run(Cacheless(model), ids, mask, options)))


def same(found: list[Particle], expected: list[Particle]) -> bool:
    """Whether texts are equal, and weights up to rounding."""
    texts = all(one.node.tokens == other.node.tokens for one, other in zip(found, expected))
    return texts and all(
        abs(one.weight - other.weight) < 1e-3 for one, other in zip(found, expected)
    )


if __name__ == "__main__":
    main()

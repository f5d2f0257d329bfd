"""What a language model says of a text whose K/V it reads from pages of codes.

The text is Python's own description of its language, as `help()` has it (pydoc_data.topics, under
Python's licence): every Python has it. Windows of 1,024 tokens out of it are fed in pieces of 16
tokens, side by side, through `PagedLM`, whose attention reads each token, the new ones too, where
the pages hold it. Compared with exact pages, position by position.
"""

from __future__ import annotations

import argparse
import math
from pydoc_data import topics
from typing import Any, NamedTuple

import torch
from llm.models import facts, language_model, named_folder
from transformers import AutoTokenizer

from paged_kv.integrations.huggingface import PagedLM

WINDOW = 1024
PIECE = 16
KINDS = ("exact", "int8")


class Said(NamedTuple):
    """Of each position: the token that is most likely next, its lead over the second one, and the
    log-probability of the one that comes.
    """

    top: torch.Tensor
    lead: torch.Tensor
    logprob: torch.Tensor


def windows(options: argparse.Namespace) -> torch.Tensor:
    """Rows of tokens [n, WINDOW + 2], evenly spread over the text."""
    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    tokenizer = AutoTokenizer.from_pretrained(named_folder(options.model))
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    rows = max(1, options.positions // WINDOW)
    step = (len(tokens) - WINDOW - 2) // rows
    return torch.stack([tokens[row * step :][: WINDOW + 2] for row in range(rows)])


def said(model: Any, rows: torch.Tensor, storage: str) -> Said:
    """What the model says behind each token of each row but the first and the last."""
    lm = PagedLM(model, storage=storage, page_size=PIECE, progress=False)
    nodes = lm.prefill(rows[:, :1].tolist())
    found = []
    for first in range(1, WINDOW + 1, PIECE):
        piece = rows[:, first : first + PIECE].tolist()
        fed = lm.extend(nodes, piece, consume=True)
        nodes = fed.nodes
        logits = torch.cat(fed.logits)
        coming = rows[:, first + 1 : first + PIECE + 1].reshape(-1, 1)
        best = logits.topk(2, dim=-1)
        logprobs = logits.log_softmax(-1).gather(-1, coming)[:, 0]
        found.append(Said(best.indices[:, 0], best.values[:, 0] - best.values[:, 1], logprobs))
    return Said(*map(torch.cat, zip(*found)))


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Both kinds, and how they differ."""
    model = language_model(options.model)
    rows = windows(options)
    with torch.inference_mode():
        exact, small = [said(model, rows, kind) for kind in KINDS]
    perplexities = [math.exp(-each.logprob.double().mean()) for each in (exact, small)]
    same = exact.top == small.top
    return {
        "model": facts(model),
        "positions": len(same),
        "window": WINDOW,
        "piece": PIECE,
        "perplexity_exact": perplexities[0],
        "perplexity_int8": perplexities[1],
        "perplexity_change": perplexities[1] / perplexities[0] - 1,
        "same_top_token": float(same.double().mean()),
        "largest_lead_that_was_lost": max(exact.lead[~same].tolist(), default=0.0),
        "mean_logprob_difference": float((exact.logprob - small.logprob).abs().double().mean()),
    }


def told(found: dict[str, Any]) -> str:
    return "\n".join(
        [
            f"positions                     {found['positions']:,}",
            f"perplexity, exact             {found['perplexity_exact']:.4f}",
            f"perplexity, int8              {found['perplexity_int8']:.4f}",
            f"change                        {found['perplexity_change']:+.3%}",
            f"same top token                {found['same_top_token']:.2%}",
            f"largest lead that was lost    {found['largest_lead_that_was_lost']:.3f} nats",
            f"log-probabilities differ by   {found['mean_logprob_difference']:.4f} on average",
        ]
    )

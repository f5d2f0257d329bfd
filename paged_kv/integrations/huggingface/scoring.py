"""Log-probabilities of given tokens, of which nothing is left behind."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from paged_kv.integrations.huggingface.nodes import Node
from paged_kv.integrations.huggingface.paths import Paths
from paged_kv.integrations.huggingface.token_tree import Tokens

TOGETHER = 128  # tokens whose logits are held at once


def score(paths: Paths, nodes: Sequence[Node], rows: Sequence[Tokens]) -> list[torch.Tensor]:
    """Log-probability of each token of these continuations: a tensor [tokens] a row, float32."""
    before = paths.logits(nodes)
    scores = [_taken(before[row : row + 1], tokens[:1]) for row, tokens in enumerate(rows)]
    longer = [row for row, tokens in enumerate(rows) if len(tokens) > 1]
    look = partial(_looked, paths, nodes, rows)
    while longer:
        count = paths.runner.rows(
            len(nodes[row].tokens) - paths.length(nodes[row].tokens) + len(rows[row]) - 1
            for row in longer
        )
        states = paths.runner.fitting(longer, count, look)
        batch = longer[: len(states)]
        for row, rest in zip(batch, _rests(paths, states, [rows[row][1:] for row in batch])):
            scores[row] = torch.cat([scores[row], rest])
        del longer[: len(states)]
    paths.residents.fit()
    return scores


def _rests(
    paths: Paths, hidden: Sequence[torch.Tensor], rows: Sequence[Tokens]
) -> list[torch.Tensor]:
    """Log-probabilities of tokens [n] by the hidden states before them [n, size], row by row.

    A head reads all its weights however few tokens it is asked for, and logits are large: so it is
    asked for tokens of several rows at once, and for some of a long row.
    """
    states = torch.cat(list(hidden))
    tokens = tuple([token for row in rows for token in row])
    found = [
        _taken(paths.say(states[at : at + TOGETHER]), tokens[at : at + TOGETHER])
        for at in range(0, len(tokens), TOGETHER)
    ]
    return list(torch.cat(found).split_with_sizes([len(row) for row in rows]))


def _looked(
    paths: Paths, nodes: Sequence[Node], rows: Sequence[Tokens], batch: Sequence[int]
) -> list[torch.Tensor]:
    """Hidden states of all tokens but the last, of some rows."""
    with paths.residents.pages.scope():
        parents = [nodes[row].tokens for row in batch]
        known = [paths.length(path) for path in parents]
        bases = paths.bases(parents, known)
        rest = [path[length:] for path, length in zip(parents, known)]  # of those evicted meanwhile
        new = [more + rows[row][:-1] for more, row in zip(rest, batch)]
        states = paths.runner.look(bases, new)
        return [state[len(more) :] for state, more in zip(states, rest)]


def _taken(logits: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """Log-probabilities of tokens [n] by logits [n, vocabulary]."""
    if not tokens:
        return logits.new_zeros(0, dtype=torch.float32)
    chosen = torch.tensor(tokens, device=logits.device)[:, None]
    return logits.float().log_softmax(-1).gather(-1, chosen)[:, 0]

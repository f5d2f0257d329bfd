"""What a `PagedLM` tells in records."""

from __future__ import annotations

from typing import NamedTuple

import torch

from paged_kv.integrations.huggingface.nodes import Node
from paged_kv.integrations.huggingface.paths import Paths


class Extended(NamedTuple):
    """Children, and what the model said of their new tokens."""

    nodes: list[Node]
    hidden_states: list[torch.Tensor]  # [new tokens, hidden size] each
    logits: list[torch.Tensor]  # [new tokens, vocabulary] each, views of one; [] without a head


class LMStats(NamedTuple):
    """What a `PagedLM` holds and did."""

    nodes: int  # that exist
    paths: int  # with K/V
    tokens: int  # with K/V, each counted once
    kv_bytes: int  # of the pages in use
    hidden_bytes: int  # of the last hidden states that are kept
    working_bytes: int  # beside the pages
    packed_bytes: int  # of packed copies of weights
    tokens_fed: int
    evicted: int  # paths
    weights_dropped: int  # times that K/V of other weights were given up


def figures(paths: Paths) -> LMStats:
    """What is held now, and what was done. Cost: O(paths)."""
    paths.settle()
    residents = paths.residents
    residents.sweep()
    pages = residents.pages
    linears = paths.runner.linears
    return LMStats(
        nodes=len(residents.alive()),
        paths=len(residents.index),
        tokens=pages.stored_tokens,
        kv_bytes=pages.bytes_in_use,
        hidden_bytes=residents.hidden_bytes,
        working_bytes=pages.working_bytes,
        packed_bytes=0 if linears is None else linears.nbytes,
        tokens_fed=paths.runner.fed,
        evicted=residents.evicted,
        weights_dropped=paths.dropped,
    )

"""The paths of a `PagedLM` are made from a model and the caller's options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paged_kv.attention.choice import BACKENDS
from paged_kv.checks import amount, choice, function
from paged_kv.errors import UnsupportedModel
from paged_kv.eviction import Policy
from paged_kv.integrations.huggingface.heads import Head, head_of
from paged_kv.integrations.huggingface.model_limits import (
    free_bytes,
    refuse_dropout,
    token_bytes,
)
from paged_kv.integrations.huggingface.paths import Paths
from paged_kv.integrations.huggingface.residents import Residents
from paged_kv.integrations.huggingface.runner import Runner
from paged_kv.integrations.huggingface.shapes import (
    attends_through_interface,
    decoder_of,
    shape_of,
)
from paged_kv.linears import PackedLinears
from paged_kv.tiers import Tiers

WEIGHTS = ("drop", "refuse", "keep")
LINEARS = ("torch", "packed")


def make_paths(
    model: Any,
    *,
    tokenizer: Any,
    head: Head | None,
    max_bytes: int | None,
    page_size: int,
    storage: str,
    eviction: str | Callable[[], Policy],
    backend: str,
    batch_bytes: int,
    piece: int,
    weights: str,
    linears: str | PackedLinears,
    tiers: Tiers | None,
) -> Paths:
    """Paths through a model, of which nothing is known yet: see `PagedLM` for the options.

    Raises UnsupportedModel, BadArgument, BadCount.
    """
    shape = shape_of(model)
    if not attends_through_interface(model):
        raise UnsupportedModel(model, "its attention cannot be replaced by one over pages")
    refuse_dropout(model)
    if head is not None:
        function("head", head, "a function of hidden states")
    choice("backend", backend, BACKENDS)
    choice("weights", weights, WEIGHTS)
    packed = _packed(linears)
    tokens = amount("batch_bytes", batch_bytes, 1) // token_bytes(model)
    amount("prefill_chunk_size", piece, 1)
    if max_bytes is None:
        max_bytes = free_bytes(shape.device) // 2
    pages = shape.pages(
        page_size=page_size, storage=storage, num_pages=1, max_bytes=max_bytes, tiers=tiers
    )
    residents = Residents(pages, eviction, max_bytes)
    runner = Runner(
        decoder_of(model),
        shape,
        pages,
        tokens=max(1, tokens),
        piece=piece,
        backend=backend,
        linears=packed,
    )
    found = head_of(model) if head is None else head
    return Paths(model, found, tokenizer, runner, residents, weights)


def _packed(linears: str | PackedLinears) -> PackedLinears | None:
    """What computes linear layers; None where the model's own do. Raises BadArgument."""
    if isinstance(linears, PackedLinears):
        return linears
    return PackedLinears() if choice("linears", linears, LINEARS) == "packed" else None

"""Positions of tokens: what a client is told of them, what it may say, and whose they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from staged import advance, filled, made

from paged_kv import StagingBatch


def test_rebase_is_told_where_tokens_were_and_are(device: str) -> None:
    """After a slide the stored position and the index in the window differ; padding counts as
    neither.
    """
    cache = made(device)
    short, long = filled(cache, 2, 4)
    seen: list[tuple[list[Any], list[Any]]] = []

    def rebase(batch: StagingBatch) -> None:
        seen.append((batch.then.tolist(), batch.now.tolist()))
        batch.planes[0][:, 0, :, : batch.past] += 100

    cache.open([short, long], 1, rebase=rebase)
    cache.slide([long], 1)
    batch = cache.open([short, long], 1, rebase=rebase)
    still = [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert seen == [(still, still), ([[0, 0, 1], [1, 2, 3]], [[0, 0, 1], [0, 1, 2]])]
    assert (batch.keys(0)[0] >= 100).all()
    assert cache.gather([short]).keys.max() < 100, "nothing stored changes"


def test_rewritten_rows_own_their_pages(device: str) -> None:
    cache = made(device, value_head_size=3)
    short, long = filled(cache, 2, 5)
    batch = cache.open([short, long, long], 2)
    advance(batch, cache, 2)
    for plane in batch.planes:
        plane[:, 1] *= 2
    children = batch.commit(
        slide=[0, 0, 1], rewrite=[0, 2, None], positions=np.array([[70, 71]] * 3)
    )
    found = cache.gather(children)
    assert found.lengths.tolist() == [7, 5, 6]
    assert found.positions.tolist() == [
        list(range(7)),
        [0, 1, 2, 3, 4, 0, 0],
        [1, 2, 3, 4, 70, 71, 0],
    ]
    assert not found.keys[:, 0, :, :3].any(), "the padding was stored as tokens"
    rewritten = found.keys[:, 1, :, :3].clone()
    assert torch.equal(rewritten, 2 * cache.gather([long]).keys[:, 0, :, 2:])
    cache.release([short, long, children[2]])
    assert cache.pages_in_use == 4 + 3
    grandchildren = cache.fork(children[:2])
    assert cache.pages_needed(grandchildren, 2) == 2, (
        "ends on a page's edge: its children copy nothing"
    )


class Kind(NamedTuple):
    """How positions are handed over, and how they are changed afterwards."""

    make: Callable[[list[list[int]]], Any]
    spoil: Callable[[Any], Any]


KINDS = {
    "array": Kind(np.array, lambda positions: positions.fill(77)),
    "tensor": Kind(torch.tensor, lambda positions: positions.fill_(77)),
    "part of an array": Kind(
        lambda rows: np.array([rows, rows])[1], lambda positions: positions.fill(77)
    ),
    "tensor over an array": Kind(
        lambda rows: torch.from_numpy(np.array(rows)), lambda positions: positions.numpy().fill(77)
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [0, 1])
def test_positions_that_change_after_they_were_handed_over(
    device: str, kind: str, start: int
) -> None:
    """The cache copied them, whichever way the tokens are written: by whole pages, or by slots."""
    cache = made(device)
    seqs = cache.new(2, start=start)
    make, spoil = KINDS[kind]
    kv = torch.zeros(2, 2, 1, 2, 2, device=device)
    positions = make([[5, 6], [7, 8]])
    cache.append(seqs, kv, kv, positions)
    spoil(positions)
    batch = cache.open(seqs, 2)
    advance(batch, cache, 2)
    positions = make([[15, 16], [17, 18]])
    children = batch.commit(positions=positions)
    spoil(positions)
    assert cache.gather(children).positions.tolist() == [[5, 6, 15, 16], [7, 8, 17, 18]]
    batch = cache.open(seqs, 2)
    advance(batch, cache, 2)
    positions = make([[25, 26], [27, 28]])
    children = batch.commit(positions=positions, rewrite=[None, 0])
    spoil(positions)
    assert cache.gather(children).positions.tolist() == [[5, 6, 25, 26], [0, 1, 2, 3]]
    assert cache.open(children, 0).then.tolist() == [[5, 6, 25, 26], [0, 1, 2, 3]]

"""Positions of tokens: what a client is told of them, what it may say, and whose they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from staged import advance, filled, made

from paged_kv import PagedKVCache, Step


def test_rebase_is_told_where_tokens_were_and_are(device: str) -> None:
    """After a slide the stored position and the index in the window differ; padding counts as
    neither.
    """
    cache = made(device)
    short, long = filled(cache, 2, 4)
    seen: list[tuple[list[Any], list[Any]]] = []

    def rebase(batch: Step) -> None:
        seen.append((batch.then.tolist(), batch.now.tolist()))
        batch.planes[0][:, 0, :, : batch.past] += 100

    cache.open([short, long], 1, rebase=rebase)
    cache.slide([long], 1)
    batch = cache.open([short, long], 1, rebase=rebase)
    still = [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert seen == [(still, still), ([[0, 0, 1], [1, 2, 3]], [[0, 0, 1], [0, 1, 2]])]
    assert (batch.keys(0)[0] >= 100).all()
    assert cache.gather([short]).keys.max() < 100, "nothing stored changes"


def places(cache: PagedKVCache, *seqs: int) -> list[list[int]]:
    """Where the tokens of each sequence were placed."""
    return [cache.gather([seq]).positions[0].tolist() for seq in seqs]


def test_a_new_token_is_placed_behind_the_one_before_it(device: str) -> None:
    """Not at its index in the window: neither after a slide, nor after a cut, nor in a fork."""
    cache = made(device)
    (seq,) = filled(cache, 5)
    kv = torch.zeros(2, 1, 1, 1, 2, device=device)
    cache.slide([seq], 2)
    cache.append([seq], kv, kv)
    assert places(cache, seq) == [[2, 3, 4, 5]]
    cache.truncate([seq], 2)
    cache.append([seq], kv, kv, torch.tensor([[40]]))
    cache.append([seq], kv, kv)
    assert places(cache, seq) == [[2, 3, 40, 41]]
    whole, short, none = cache.fork([seq] * 3, at=[4, 2, 0])
    cache.append([whole, short, none], *[kv.expand(2, 3, 1, 1, 2)] * 2)
    assert places(cache, whole, short, none) == [[2, 3, 40, 41, 42], [2, 3, 4], [2]]
    cache.slide([whole], 5)
    cache.append([whole], kv, kv)
    assert places(cache, whole) == [[43]], "an empty window goes on where it was"


def test_the_children_of_a_step_go_on_where_their_parents_were(device: str) -> None:
    cache = made(device)
    short, long = filled(cache, 2, 5)
    cache.slide([long], 2)
    batch = cache.open([short, long, long], 3)
    advance(batch, cache, 2)
    children = batch.commit(slide=[0, 1, 3])
    assert places(cache, *children) == [[0, 1, 2, 3], [3, 4, 5, 6], [5, 6]]
    batch = cache.open(children, 1)
    advance(batch, cache, 1)
    placed = np.array([[70], [71], [72]])
    children = batch.commit(positions=placed)
    kv = torch.zeros(2, 3, 1, 1, 2, device=device)
    cache.append(children, kv, kv)
    assert [place[-2:] for place in places(cache, *children)] == [[70, 71], [71, 72], [72, 73]]
    assert places(cache, *cache.open(children, 2).commit()) == places(cache, *children)


def test_what_is_done_to_the_columns_of_new_tokens_is_stored(device: str) -> None:
    """And nothing else of the batch: neither its past nor its padding."""
    cache = made(device, value_head_size=3)
    seqs = filled(cache, 2, 5)
    before = cache.gather(seqs)
    batch = cache.open(seqs, 2)
    advance(batch, cache, 2)
    for plane in batch.planes:
        plane[:, :, :, : batch.past] *= 2
    for plane in batch.columns(batch.past, batch.past + 2):
        plane *= 3
    children = batch.commit()
    found = cache.gather(children, pad="left")
    assert found.lengths.tolist() == [4, 7]
    for part, was in ((found.keys, before.keys), (found.values, before.values)):
        assert (part[:, :, :, 5:] == -3).all()
        assert torch.equal(part[:, 1, :, :5], was[:, 1])
        assert torch.equal(part[:, 0, :, 3:5], was[:, 0, :, :2])
        assert not part[:, 0, :, :3].any()


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
    children = batch.commit(positions=positions, slide=[0, 1])
    spoil(positions)
    assert cache.gather(children).positions.tolist() == [[5, 6, 25, 26], [8, 27, 28, 0]]
    assert cache.open(children, 0).then.tolist() == [[5, 6, 25, 26], [0, 8, 27, 28]]

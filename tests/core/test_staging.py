"""The dense batch of a model step: what it shows, where it lies, what it costs, when it closes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from staged import advance, filled, made
from torch.utils._python_dispatch import TorchDispatchMode

from paged_kv import BadCount, ClosedBatch, ParentChanged, StagingBatch

VIEWS = {
    "view",
    "slice",
    "select",
    "unbind",
    "detach",
    "empty",
    "new_empty",
    "alias",
    "lift_fresh",
    "unsqueeze",
    "expand",
    "permute",
    "_unsafe_view",
}


class Kernels(TorchDispatchMode):
    """Counts the tensor operations that would launch on a GPU: no views, no allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("pad", ["left", "right"])
def test_contexts_stand_side_by_side_with_zeros_between(device: str, pad: str) -> None:
    cache = made(device, value_head_size=3)
    seqs = filled(cache, 1, 3)
    batch = cache.open(seqs, 2, pad=pad)
    assert (batch.past, batch.room, batch.size, batch.lengths) == (3, 2, 3, [1, 3])
    assert batch.pads == ([2, 0] if pad == "left" else [0, 0])
    token = batch.mask()
    assert token.tolist() == [
        [False, False, True] if pad == "left" else [True, False, False],
        [True] * 3,
    ]
    for layer in range(2):
        assert not batch.keys(layer).permute(0, 2, 1, 3)[~token].any()
        assert not batch.values(layer).permute(0, 2, 1, 3)[~token].any()
        assert torch.equal(batch.keys(layer)[1, :, :, :], cache.gather(seqs).keys[layer, 1])
    advance(batch, cache, 2)
    assert batch.mask()[:, 3:].all()
    assert (batch.keys(1)[:, :, 3:] == -1).all()
    children = batch.commit()
    found = cache.gather(children)
    assert found.lengths.tolist() == [3, 5]
    assert found.positions.tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 4]]
    assert (found.values[:, 0, :, 1:3] == -1).all()
    assert cache.lengths(seqs) == [1, 3], "the parents stay as they are"


@pytest.mark.parametrize("size", [2, 3, 4])
def test_windows_that_end_alike_are_gathered_by_pages_and_padded_with_zeros(
    device: str, size: int
) -> None:
    """Whole pages bring dead slots along: here they hold NaN, which must not be seen."""
    for end in range(size):
        cache = made(device, page_size=size, value_head_size=3)
        for plane in cache._storage.planes:
            plane.rows.fill_(torch.nan)
            plane.pages[0] = 0
        wanted: list[tuple[torch.Tensor, torch.Tensor]] = []
        seqs: list[int] = []
        for start in range(size):
            (seq,) = cache.new(start=start)
            for pages in range(3):
                length = (end - start) % size + size * pages
                keys, values = (
                    torch.randn(2, 1, 1, length, width, device=device) for width in (2, 3)
                )
                seqs += cache.fork([seq])
                cache.append([seqs[-1]], keys, values)
                wanted.append((keys[:, 0], values[:, 0]))
        batch = cache.open(seqs, 1)
        assert not batch.uniform
        assert batch.layout.paged
        for layer in range(2):
            for part in range(2):
                got = batch.get(layer)[part]
                for row, length in enumerate(batch.lengths):
                    assert torch.equal(got[row, :, batch.past - length :], wanted[row][part][layer])
                    assert not got[row, :, : batch.past - length].any()
        advance(batch, cache)
        children = batch.commit()
        cache.check()
        assert cache.lengths(children) == [length + 1 for length in batch.lengths]
        assert batch.now.max(axis=1, initial=0).tolist() == [
            max(length - 1, 0) for length in batch.lengths
        ]


def test_children_of_windows_that_end_alike_take_a_page_each_wherever_it_lies(device: str) -> None:
    cache = made(device)
    seqs = [*filled(cache, 2), *filled(cache, 6), *filled(cache, 4)]
    holes = filled(cache, *[2] * 6)
    cache.release(holes[::2])  # the next free pages lie apart
    before = cache.gather(seqs).keys.clone()
    batch = cache.open(seqs, 2)
    advance(batch, cache, 2, -3.0)
    children = batch.commit(slide=2)
    cache.check()
    assert cache.lengths(children) == [2, 6, 4]
    context = cache.gather(children)
    for row, length in enumerate((2, 6, 4)):
        assert torch.equal(context.keys[:, row, :, : length - 2], before[:, row, :, 2:length])
        assert bool((context.keys[:, row, :, length - 2 : length] == -3).all())
        assert context.positions[row, :length].tolist() == list(range(2, length + 2))
    assert cache.stats.copied_pages == 0


def test_what_the_batch_gives_are_views_of_one_buffer_at_a_fixed_address(device: str) -> None:
    cache = made(device)
    seqs = filled(cache, 3, 3)
    first = cache.open(seqs, 2)
    address = first.planes[0].data_ptr()
    view = first.keys(1)
    advance(first, cache)
    assert (first.keys(1).data_ptr(), first.keys(1).shape[2]) == (view.data_ptr(), 4)
    first.keys(0)[0] = 500.0
    assert (first.planes[0][0, 0, :, :4] == 500).all()
    first.close()
    second = cache.open(seqs[:1], 1)
    second.close()
    third = cache.open(seqs, 2)
    assert second.planes[0].data_ptr() == third.planes[0].data_ptr() == address
    assert (third.keys(0)[0] != 500).all(), "the pages do not change with the buffer"


def test_a_batch_closes_at_commit_at_close_and_at_the_next_open(device: str) -> None:
    cache = made(device)
    seqs = filled(cache, 2)
    committed = cache.open(seqs, 1)
    advance(committed, cache)
    committed.commit()
    closed = cache.open(seqs, 1)
    closed.close()
    closed.close()
    overtaken = cache.open(seqs, 1)
    still_open = cache.open(seqs, 1)
    kv = torch.zeros(1, 1, 1, 2, device=device)
    for batch in (committed, closed, overtaken):
        for name, call in {
            "get": lambda b=batch: b.keys(0),
            "update": lambda b=batch: b.update(0, kv, kv),
            "mask": batch.mask,
            "commit": batch.commit,
        }.items():
            with pytest.raises(ClosedBatch, match=rf"{name}\(\) on a closed staging batch"):
                call()
    assert still_open.size == 2


def test_an_error_in_open_leaves_the_open_batch_alone(device: str) -> None:
    cache = made(device)
    seqs = filled(cache, 2)
    batch = cache.open(seqs, 1)
    for arguments in (([*seqs, 7], 1), (seqs, -1)):
        with pytest.raises(ValueError):
            cache.open(*arguments)
    advance(batch, cache)
    assert cache.lengths(batch.commit()) == [3]


def test_a_commit_that_fails_can_be_tried_again(device: str) -> None:
    cache = made(device, num_pages=2, grow=False)
    seq, other = filled(cache, 2, 2)
    batch = cache.open([seq], 1)
    advance(batch, cache)
    with pytest.raises(RuntimeError, match="1 pages requested, 0 free"):
        batch.commit()
    cache.release([other])
    assert cache.lengths(batch.commit()) == [3]


@pytest.mark.parametrize("verb", ["slide", "truncate", "append"])
def test_a_parent_may_not_change_while_the_batch_is_open(device: str, verb: str) -> None:
    cache = made(device)
    (seq,) = filled(cache, 3)
    batch = cache.open([seq], 1)
    advance(batch, cache)
    kv = torch.zeros(2, 1, 1, 1, 2, device=device)
    cache.append([seq], kv, kv) if verb == "append" else getattr(cache, verb)([seq], 1)
    used = cache.pages_in_use
    with pytest.raises(ParentChanged, match=rf"parents \({seq:#x}\) changed since open"):
        batch.commit()
    assert (cache.pages_in_use, cache.live_sequences) == (used, 1)


def test_one_parent_may_have_many_children(device: str) -> None:
    cache = made(device)
    (root,) = filled(cache, 3)
    batch = cache.open([root, root, root], 1)
    kv = torch.arange(6.0, device=device).reshape(3, 1, 1, 2)
    for layer in range(2):
        batch.update(layer, kv, kv)
    children = batch.commit(slide=[0, 1, 3])
    assert cache.lengths(children) == [4, 3, 1]
    found = cache.gather(children, pad="left")
    assert torch.equal(found.keys[1, :, :, -1:], kv)
    assert cache.promote(children[2]) == 2
    assert cache.release_subtree(root) == 2


@pytest.mark.parametrize("value_head_size", [2, 3])
def test_the_number_of_kernels_is_that_of_the_planes(device: str, value_head_size: int) -> None:
    """One gather, one scatter and two page copies a plane, for any layers, batch and window."""
    planes = 1 if value_head_size == 2 else 2
    for layers, rows, length in ((1, 1, 3), (6, 9, 3), (3, 4, 31)):
        cache = made(device, layers=layers, value_head_size=value_head_size)
        seqs = filled(cache, length)
        with Kernels() as opened:
            batch = cache.open(seqs * rows, 2)
        advance(batch, cache, 2)
        with Kernels() as committed:
            batch.commit()
        moves = 0 if device == "cpu" else 1  # an index on its way to the device
        assert len(opened.names) == planes * (1 + moves), opened.names
        assert [name for name in opened.names if name != "_to_copy"] == ["index_select"] * planes
        kernels = [name for name in committed.names if name != "_to_copy"]
        assert sorted(kernels) == sorted(["index_put_", "index_select", "index_copy_"] * planes), (
            committed.names
        )
        assert len(committed.names) <= 3 * planes + moves * (planes + 1)


def test_slides_and_forks_touch_no_tensor(device: str) -> None:
    cache = made(device)
    (root,) = filled(cache, 7)
    with Kernels() as counted:
        child, other = cache.fork([root, root], at=[7, 4])
        cache.slide([child], 3)
        cache.truncate([other], 1)
        cache.promote(child)
        cache.release_subtree(root)
    assert counted.names == []


def test_layers_must_be_filled_alike(device: str) -> None:
    cache = made(device)
    batch = cache.open(filled(cache, 3), 2)
    kv = torch.zeros(1, 1, 1, 2, device=device)
    batch.update(0, kv, kv)
    with pytest.raises(
        BadCount, match=r"columns filled, by layer is \[4, 3\], allowed is the same number"
    ):
        batch.commit()
    batch.update(1, kv, kv)
    assert cache.lengths(batch.commit()) == [4]


@pytest.mark.parametrize("lengths", [(3, 3), (2, 5)])
def test_what_is_stored_can_be_less_than_what_was_computed(
    device: str, lengths: tuple[int, int]
) -> None:
    """Equal windows that end on a page's edge go in as one block, any other by slots: both subtract
    first.
    """
    cache = made(device, value_head_size=3)
    roots = cache.new(2, start=1)
    for root, length in zip(roots, lengths):
        kv = torch.ones(2, 1, 1, length, 3, device=device)
        cache.append([root], kv[..., :2], kv)
    batch = cache.open(roots, 2)
    advance(batch, cache, 2, value=7.0)
    steps = torch.tensor([1.0, 2.0], device=device).reshape(1, 1, 1, 2, 1)
    children = batch.commit(less=[steps, 2 * steps])
    for child, length in zip(children, lengths):
        found = cache.gather([child])
        assert (found.keys[..., length:, :] == 7 - steps[0, 0]).all()
        assert (found.values[..., length:, :] == 7 - 2 * steps[0, 0]).all()
    cache.check()


def test_a_search_step_is_counted_like_any_other(device: str) -> None:
    """The short cut of a commit, and the long way that a taken page in the row of fresh ones
    forces.
    """
    for between in (0, 1):
        cache = made(device)
        roots = filled(cache, 4, 4)
        if between:
            first, second = cache.new(2)
            cache.append([first, second], *[torch.zeros(2, 2, 1, 1, 2, device=device)] * 2)
            cache.release([first])
        batch = cache.open(roots, 2)
        advance(batch, cache, 2)
        before = cache.stats.allocated_pages
        used = cache.pages_in_use
        batch.commit(slide=2)
        assert cache.stats.allocated_pages == before + 2
        assert cache.stats.peak_pages == cache.pages_in_use == used + 2
        assert (cache.stats.forks, cache.stats.copied_pages) == (2, 0)


class Oops(Exception):
    """Raised by a hook."""


@pytest.mark.parametrize("error", [Oops, KeyboardInterrupt])
def test_a_hook_that_raises_leaves_no_batch_open(device: str, error: type[BaseException]) -> None:
    cache = made(device)
    seqs = filled(cache, 3)
    contents = cache.gather(seqs).keys.clone()
    batches: list[StagingBatch] = []

    def rebase(batch: StagingBatch) -> None:
        batches.append(batch)
        batch.planes[0][:] = 7
        raise error

    with pytest.raises(error):
        cache.open(seqs, 1, rebase=rebase)
    assert batches[0].closed
    with pytest.raises(ClosedBatch):
        batches[0].commit()
    assert torch.equal(cache.open(seqs, 1).keys(0), contents[0])
    cache.check()


def test_the_lists_of_a_batch_are_its_own(device: str) -> None:
    """Whoever changes the list that was handed over changes nothing."""
    cache = made(device)
    seqs = filled(cache, 2, 2)
    named = list(seqs)
    batch = cache.open(named, 1)
    named.reverse()
    advance(batch, cache)
    assert batch.parents == seqs
    children = batch.commit()
    assert [cache.promote(child) for child in children] == [0, 0]

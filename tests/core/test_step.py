"""A model step: what it shows, where it lies, what it costs, what it holds, how it ends."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_caches import books
from staged import advance, filled, made
from torch.utils._python_dispatch import TorchDispatchMode

from paged_kv import CacheIndex, PagedKVCache, Step
from paged_kv.errors import BadCount, ClosedStep, OutOfPages

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


class Oops(Exception):
    """Raised by a hook."""


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
        for plane in cache._pool.storage.planes:
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
        assert batch._layout.paged
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


def test_a_step_ends_at_commit_at_close_and_with_its_block(device: str) -> None:
    cache = made(device)
    seqs = filled(cache, 2)
    committed = cache.open(seqs, 1)
    advance(committed, cache)
    committed.commit()
    closed = cache.open(seqs, 1)
    closed.close()
    closed.close()
    with cache.open(seqs, 1) as left:
        assert not left.closed
    still_open = cache.open(seqs, 1)
    kv = torch.zeros(1, 1, 1, 2, device=device)
    for step in (committed, closed, left):
        for name, call in {
            "get": lambda b=step: b.keys(0),
            "update": lambda b=step: b.update(0, kv, kv),
            "mask": step.mask,
            "then": lambda b=step: b.then,
            "columns": lambda b=step: b.columns(0, 1),
            "commit": step.commit,
        }.items():
            with pytest.raises(ClosedStep, match=rf"{name}\(\) of a closed step"):
                call()
        assert repr(step).endswith("closed>")
        step.close()
    assert still_open.size == 2
    assert cache.open_steps == 1


def test_an_error_in_open_leaves_an_open_step_alone(device: str) -> None:
    cache = made(device)
    seqs = filled(cache, 2)
    step = cache.open(seqs, 1)
    for arguments in (([*seqs, 7], 1), (seqs, -1)):
        with pytest.raises(ValueError):
            cache.open(*arguments)
    advance(step, cache)
    assert cache.lengths(step.commit()) == [3]


def test_pages_are_taken_at_open_and_a_commit_takes_none(device: str) -> None:
    cache = made(device, num_pages=3, grow=False)
    seq, other = filled(cache, 2, 2)
    before = books(cache.books)
    with pytest.raises(OutOfPages, match="2 pages requested, 1 free") as caught:
        cache.open([seq, other], 1)
    assert (caught.value.requested, caught.value.free, caught.value.pending) == (2, 1, 0)
    assert books(cache.books) == before
    first = cache.open([seq], 2)
    assert (cache.pages_free, cache.pages_in_use) == (0, 3)
    with pytest.raises(OutOfPages, match="1 held by open steps") as caught:
        cache.open([other], 1)
    assert (caught.value.requested, caught.value.free, caught.value.pending) == (1, 0, 1)
    advance(first, cache, 2)
    allocated = cache.stats.allocated_pages
    assert cache.lengths(first.commit()) == [4]
    assert cache.stats.allocated_pages == allocated


def test_room_that_is_not_filled_is_given_back(device: str) -> None:
    cache = made(device)
    (seq,) = filled(cache, 3)
    used = cache.pages_in_use
    step = cache.open([seq, seq], 6)
    assert cache.pages_in_use == used + 3 + 4, "the first writes on in the last page"
    advance(step, cache, 1)
    first, second = step.commit()
    assert cache.pages_in_use == used + 1
    (table,) = cache.page_tables([seq])
    tables = cache.page_tables([first, second])
    assert tables[0] == table
    assert tables[1][:-1] == table[:-1] != tables[1]
    (grown,) = cache.fork([first])
    kv = torch.zeros(2, 1, 1, 3, 2, device=device)
    cache.append([grown], kv, kv)
    cache.check()


def close(steps: list[Step]) -> None:
    steps[-1].close()


def leave(steps: list[Step]) -> None:
    steps[-1].__exit__()


def drop(steps: list[Step]) -> None:
    steps.clear()


def fail(steps: list[Step]) -> None:
    with pytest.raises(Oops), steps.pop():
        raise Oops


def knot(steps: list[Step]) -> None:
    step: Any = steps.pop()
    step.itself = step
    del step
    gc.collect()


def elsewhere(steps: list[Step]) -> None:
    thread = threading.Thread(target=steps.clear)
    thread.start()
    thread.join()


ENDS = [close, leave, drop, fail, knot, elsewhere]


@pytest.mark.parametrize("filled_columns", [0, 1, 3])
@pytest.mark.parametrize("end", ENDS)
def test_a_step_that_is_given_up_leaves_no_trace(
    device: str, end: Callable[[list[Step]], None], filled_columns: int
) -> None:
    cache = made(device)
    seqs = filled(cache, 3, 2, 4)
    contents = cache.gather(seqs)
    used = cache.pages_in_use
    steps = [cache.open([*seqs, seqs[0]], 3)]
    advance(steps[0], cache, filled_columns)
    assert cache.pages_in_use > used
    end(steps)
    assert (cache.pages_in_use, cache.open_steps, cache.live()) == (used, 0, seqs)
    cache.check()
    for found, wanted in zip(cache.gather(seqs), contents):
        assert torch.equal(found, wanted)
    cache.append(seqs[:1], *[torch.ones(2, 1, 1, 1, 2, device=device)] * 2)
    assert cache.stats.copied_pages == 1, "the one of the step, none of the sequence"


@pytest.mark.parametrize("end", ENDS)
def test_a_step_without_room_gives_back_no_slot_of_another(
    end: Callable[[list[Step]], None],
) -> None:
    """A fork wrote on in the page that the step only read."""
    cache = made()
    (seq,) = filled(cache, 3)
    (fork,) = cache.fork([seq])
    steps = [cache.open([seq], 0)]
    kv = torch.full((2, 1, 1, 1, 2), 9.0)
    cache.append([fork], kv, kv)
    end(steps)
    cache.check()
    cache.append([seq], -kv, -kv)
    assert cache.gather([fork]).keys[0, 0, 0, 3, 0] == 9


CHANGES: dict[str, Callable[[PagedKVCache, int], object]] = {
    "slide": lambda cache, seq: cache.slide([seq], 2),
    "truncate": lambda cache, seq: cache.truncate([seq], 2),
    "truncate all": lambda cache, seq: cache.truncate([seq], 3),
    "release": lambda cache, seq: cache.release([seq]),
    "release subtree": lambda cache, seq: cache.release_subtree(seq),
    "promote away": lambda cache, seq: cache.promote(cache.live()[0]),
    "append": lambda cache, seq: refill(cache, seq, 0),
    "refill": lambda cache, seq: refill(cache, seq, 1),
    "refill all": lambda cache, seq: refill(cache, seq, 3),
    "evict": lambda cache, seq: evict(cache, seq),
    "trim": lambda cache, seq: cache.trim(),
}


def refill(cache: PagedKVCache, seq: int, count: int) -> None:
    """Other tokens in place of the last ones, and one more."""
    cache.truncate([seq], count)
    kv = torch.full((2, 1, 1, count + 1, 2), 99.0, device=cache.device)
    cache.append([seq], kv, kv)


def evict(cache: PagedKVCache, seq: int) -> None:
    """An index lets the sequence go."""
    index = CacheIndex(cache, max_entries=1)
    index.put("a", seq)
    index.put("b", cache.new(1)[0])
    assert seq not in cache.books
    index.clear()


@pytest.mark.parametrize("change", CHANGES)
def test_a_step_keeps_what_it_was_opened_on(device: str, change: str) -> None:
    cache = made(device)
    (root,) = filled(cache, 1)
    sibling, seq = cache.fork([root, root])
    kv = torch.arange(8.0, device=device).reshape(2, 1, 1, 2, 2)
    cache.append([sibling], kv, kv)
    cache.append([seq], kv, kv)
    cache.release([root])
    contents = cache.gather([seq]).keys[:, 0].clone()
    step = cache.open([seq, seq, sibling], 2)
    CHANGES[change](cache, seq)
    cache.check()
    advance(step, cache)
    assert torch.equal(step.keys(1)[1, :, :3], contents[1])
    assert step.then.tolist() == [[0, 1, 2]] * 3
    children = step.commit(slide=[0, 3, 1])
    cache.check()
    found = cache.gather(children)
    assert found.lengths.tolist() == [4, 1, 3]
    assert found.positions.tolist() == [[0, 1, 2, 3], [3, 0, 0, 0], [1, 2, 3, 0]]
    assert torch.equal(found.keys[:, 0, :, :3], contents)
    assert bool((found.keys[:, 1, :, 0] == -1).all())
    cache.release(cache.live())
    assert cache.pages_in_use == 0


def test_children_hang_on_what_was_opened_whatever_ended_since(device: str) -> None:
    """As forks of that moment would: also where nothing else holds the branches together."""
    cache = made(device)
    (root,) = filled(cache, 2)
    step = cache.open([root, root], 1)
    advance(step, cache)
    cache.release([root])
    cache.check()
    first, second = step.commit()
    assert cache.parent(first) is None
    assert cache.promote(first) == 1
    assert cache.live() == [first]
    cache.release([first])
    assert not cache.books.tree.joints
    assert second not in cache.books


def test_what_ends_with_its_children_leaves_their_children_a_parent(device: str) -> None:
    cache = made(device)
    (root,) = filled(cache, 2)
    (child,) = cache.fork([root])
    (grandchild,) = cache.fork([child])
    cache.release([root, child])
    cache.check()
    assert cache.parent(grandchild) is None
    assert not cache.books.tree.joints


@pytest.mark.parametrize("count", [2, 4, 7])
def test_steps_that_are_open_at_once_know_nothing_of_each_other(device: str, count: int) -> None:
    cache = made(device)
    (root,) = filled(cache, 3)
    steps = [cache.open([root, root], 3) for _ in range(count)]
    assert cache.open_steps == count
    assert len({step.planes[0].data_ptr() for step in steps}) == count
    for part in (1, 2):
        for number, step in enumerate(steps):
            advance(step, cache, part, float(number))
    steps[1].close()
    for number in [*range(2, count), 0]:
        children = steps[number].commit()
        found = cache.gather(children).keys[..., 3:, :]
        assert bool((found == number).all())
        cache.check()
    assert cache.open_steps == 0
    addresses = {step.planes[0].data_ptr() for step in steps}
    assert cache.open([root, root], 3).planes[0].data_ptr() in addresses, "buffers are used again"


def test_buffers_that_nothing_uses_are_given_back_by_trim(device: str) -> None:
    cache = made(device)
    (root,) = filled(cache, 3)
    first, second = (cache.open([root], 2) for _ in range(2))
    first.close()
    held = cache._pool.buffers.nbytes
    cache.trim()
    assert 0 < cache._pool.buffers.nbytes == held // 2
    advance(second, cache, 2)
    assert cache.pages_free == 0
    (child,) = second.commit()
    assert bool((cache.gather([child]).keys[..., 3:, :] == -1).all())
    cache.check()


def test_a_step_is_dropped_although_something_was_put_off_while_it_opened() -> None:
    """Its frames must not be kept alive by whoever looked at them."""
    cache = made()
    (seq,) = filled(cache, 3)
    doomed = cache.new(2)
    storage = cache._pool.storage
    real = storage.gather

    def gather(*args: Any) -> None:
        cache.release([doomed.pop()])
        real(*args)

    gc.disable()
    storage.gather = gather  # type: ignore[method-assign]
    step = cache.open([seq], 1)
    del storage.gather
    assert cache.open_steps == 1
    del step
    assert cache.open_steps == 0


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("lengths", [(3, 3), (2, 5), (4, 4), (1, 0)])
def test_columns_that_nothing_is_in_are_zeros(
    device: str, pad: str, lengths: tuple[int, int]
) -> None:
    """Also in a buffer that was used, over pages that were used."""
    cache = made(device, value_head_size=3)
    for plane in cache._pool.storage.planes:
        plane.rows[plane.page_rows * cache.page_size :] = torch.nan
    for _ in range(2):
        seqs = filled(cache, *lengths)
        step = cache.open(seqs, 3, pad=pad)
        for plane in step.planes:
            assert plane.shape[3] == step.past + 3
            assert not plane[..., step.past :, :].any()
        advance(step, cache, 2, 7.0)
        for plane in step.planes:
            assert not plane[..., step.size :, :].any()
        assert bool((step.columns(step.past, step.size)[0] == 7).all())
        step.close()


def test_columns_of_new_tokens_may_be_changed_before_they_are_stored(device: str) -> None:
    cache = made(device)
    seqs = filled(cache, 2, 4)
    step = cache.open(seqs, 2)
    advance(step, cache, 2, 7.0)
    (columns,) = step.columns(step.past, step.size)
    assert step.columns(step.past, step.size)[0] is columns, "made once"
    columns -= torch.tensor([1.0, 2.0], device=device).reshape(1, 1, 1, 2, 1)
    children = step.commit()
    found = cache.gather(children, pad="left").keys[..., -2:, :]
    assert bool((found == torch.tensor([6.0, 5.0], device=device).reshape(2, 1)).all())


def test_a_slide_of_a_commit_is_bounded_by_the_window(device: str) -> None:
    cache = made(device)
    step = cache.open(filled(cache, 3), 2)
    advance(step, cache, 2)
    with pytest.raises(BadCount, match="slide is 4, allowed is an int from 0 to 3"):
        step.commit(slide=4)
    with pytest.raises(TypeError):
        step.commit(rewrite=[0])  # type: ignore[call-arg]
    assert cache.lengths(step.commit(slide=3)) == [2]


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
    """One gather and one write a plane, for any layers, batch and window; and where windows end
    within a page, one that blanks the room, and two that copy last pages for all but one child.
    """
    planes = 1 if value_head_size == 2 else 2
    for layers, rows, length in ((1, 1, 3), (6, 9, 3), (3, 4, 31), (5, 3, 8)):
        cache = made(device, layers=layers, value_head_size=value_head_size)
        seqs = filled(cache, length)
        with Kernels() as opened:
            step = cache.open(seqs * rows, 2)
        advance(step, cache, 2)
        with Kernels() as committed:
            step.commit()
        wanted = ["index_select"]
        if length % 2:
            wanted += ["zero_"]
        if length % 2 and rows > 1:
            wanted += ["index_select", "index_copy_"]
        moves = 0 if device == "cpu" else 1  # an index on its way to the device
        kernels = [name for name in opened.names if name != "_to_copy"]
        assert sorted(kernels) == sorted(wanted * planes), opened.names
        assert len(opened.names) <= len(kernels) + moves * (planes + 1)
        (kernel,) = {name for name in committed.names if name != "_to_copy"}
        assert kernel == ("index_put_" if length % 2 else "copy_")
        assert len(committed.names) <= planes * (1 + moves)


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


def test_a_search_step_is_counted_like_any_other(device: str) -> None:
    """Fresh pages side by side, and pages with a taken one between them."""
    for between in (0, 1):
        cache = made(device)
        roots = filled(cache, 4, 4)
        if between:
            first, second = cache.new(2)
            cache.append([first, second], *[torch.zeros(2, 2, 1, 1, 2, device=device)] * 2)
            cache.release([first])
        before = cache.stats.allocated_pages
        appends = cache.stats.appends
        used = cache.pages_in_use
        step = cache.open(roots, 2)
        advance(step, cache, 2)
        step.commit(slide=2)
        assert cache.stats.appends == appends + 2
        assert cache.stats.allocated_pages == before + 2
        assert cache.stats.peak_pages == cache.pages_in_use == used + 2
        assert (cache.stats.forks, cache.stats.copied_pages) == (2, 0)


@pytest.mark.parametrize("error", [Oops, KeyboardInterrupt])
def test_a_hook_that_raises_leaves_no_batch_open(device: str, error: type[BaseException]) -> None:
    cache = made(device)
    seqs = filled(cache, 3)
    contents = cache.gather(seqs).keys.clone()
    batches: list[Step] = []

    def rebase(batch: Step) -> None:
        batches.append(batch)
        batch.planes[0][:] = 7
        raise error

    with pytest.raises(error):
        cache.open(seqs, 1, rebase=rebase)
    assert batches[0].closed
    with pytest.raises(ClosedStep):
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

"""Attention to windows that stay in their pages, against a plain one on dense copies."""

from __future__ import annotations

import copy
import os
import pickle
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from in_pages_machine import InPagesMachine

from paged_kv import PagedKVCache, PagedKVError, Step
from paged_kv.attention import in_pages
from paged_kv.attention.in_pages import InPages, why_not
from paged_kv.errors import (
    BadArgument,
    BadCount,
    BadDtype,
    BadShape,
    ClosedStep,
    NestedCall,
    NotCopyable,
)
from paged_kv.pages.pool import Pool

CPU = torch.device("cpu")
LAYERS, HEADS, SIZE = 2, 2, 4

needs_numba = pytest.mark.skipif(
    in_pages.loop() is None, reason="numba is not here: windows are copied"
)


def cache(**options: Any) -> PagedKVCache:
    """A small one."""
    options = {"page_size": 2, **options}
    return PagedKVCache(layers=LAYERS, heads=HEADS, head_size=SIZE, **options)


def filled(pages: PagedKVCache, rows: int = 3, length: int = 5, start: int = 1) -> list[int]:
    """Sequences of one length with random contents."""
    seqs = pages.new(rows, start=start)
    shape = LAYERS, rows, HEADS, length, SIZE
    pages.append(seqs, torch.randn(shape), torch.randn(shape))
    return seqs


def opened(pages: PagedKVCache, seqs: list[int], room: int = 2) -> tuple[Step, InPages]:
    """A step whose windows stay where they are."""
    step = pages.open(seqs, room, gather="later")
    attention = step.in_pages()
    assert attention is not None
    return step, attention


def test_numba_is_there_to_be_tested() -> None:
    core_only = os.environ.get("PAGED_KV_CORE_ONLY") == "1"
    assert core_only or why_not(CPU, torch.float32) is None


def test_agrees_with_the_oracle(device: str) -> None:
    machine = type("Machine", (InPagesMachine,), {"device": device})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=200, stateful_step_count=25, deadline=None)
    )


@needs_numba
@pytest.mark.parametrize("size", [1, 3, 16, 96])
@pytest.mark.parametrize("page_size", [1, 2, 5])
def test_long_windows_of_many_pages(page_size: int, size: int) -> None:
    pages = PagedKVCache(layers=1, heads=3, head_size=size, page_size=page_size)
    seqs = pages.new(4, start=page_size - 1)
    keys, values = torch.randn(2, 1, 4, 3, 70, size).unbind(0)
    pages.append(seqs, keys, values)
    tokens = torch.randn(4, 3, 3, size)
    with pages.open(seqs, 1, gather="later") as step:
        attention = step.in_pages()
        assert attention is not None
        seen = attention.see(0, 0, tokens)
    query, key, value = tokens.split(1, dim=2)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query, torch.cat((keys[0], key), 2), torch.cat((values[0], value), 2)
    )
    assert torch.allclose(seen, wanted.squeeze(2), atol=1e-5)


@needs_numba
def test_what_is_no_number_is_passed_on() -> None:
    pages = cache()
    seqs = filled(pages)
    _, attention = opened(pages, seqs)
    tokens = torch.randn(3, HEADS, 3, SIZE)
    tokens[1, 0, 0, 0] = float("nan")
    seen = attention.see(0, 0, tokens)
    assert seen[1, 0].isnan().all()
    assert seen[[0, 2]].isfinite().all()


@needs_numba
def test_scores_of_any_size_do_not_overflow() -> None:
    pages = cache()
    _, attention = opened(pages, filled(pages))
    assert attention.see(0, 0, torch.full((3, HEADS, 3, SIZE), 1e18)).isfinite().all()


@needs_numba
def test_windows_are_copied_once_somebody_asks_for_them() -> None:
    pages = cache()
    seqs = filled(pages)
    called: list[int] = []
    with (
        pages.open(seqs, 2) as wanted,
        pages.open(seqs, 2, gather="later", rebase=lambda step: called.append(step.past)) as step,
    ):
        attention = step.in_pages()
        assert attention is not None
        tokens = torch.randn(LAYERS, 3, HEADS, 3, SIZE)
        first = [attention.see(0, layer, tokens[layer]) for layer in range(LAYERS)]
        step.columns(step.past, step.past + 2)
        assert not called
        for layer in range(LAYERS):
            wanted.update(layer, tokens[layer, :, :, 1:2], tokens[layer, :, :, 2:3])
        assert torch.equal(step.planes[0], wanted.planes[0])
        assert called == [5]
        again = [attention.see(0, layer, tokens[layer]) for layer in range(LAYERS)]
        assert torch.equal(torch.stack(first), torch.stack(again))
        attention.see(1, 0, tokens[0])
        assert torch.equal(step.planes[0][0, :, :, -1], tokens[0, :, :, 1])


@needs_numba
@pytest.mark.parametrize(
    "change",
    [
        lambda pages, seqs: pages.release(seqs),
        lambda pages, seqs: pages.trim(),
        lambda pages, seqs: (pages.release(seqs), pages.trim(), filled(pages, 9, 9)),
        lambda pages, seqs: (pages.release(seqs), filled(pages, 2, 5)),
        lambda pages, seqs: filled(pages, 60, 9),
        lambda pages, seqs: pages.append(
            seqs, torch.ones(LAYERS, 3, HEADS, 3, SIZE), torch.ones(LAYERS, 3, HEADS, 3, SIZE)
        ),
    ],
    ids=["release", "trim", "move", "use again", "grow", "append"],
)
@pytest.mark.parametrize("length", [5, 4])
def test_windows_stay_what_they_were(
    change: Callable[[PagedKVCache, list[int]], object], length: int
) -> None:
    pages = cache(num_pages=32)
    seqs = filled(pages, length=length)
    with pages.open(seqs, 2):  # takes the slots behind them, so that the next one copies pages
        _, attention = opened(pages, seqs)
    tokens = torch.randn(3, HEADS, 3, SIZE)
    before = attention.see(0, 1, tokens)
    change(pages, seqs)
    assert torch.equal(attention.see(0, 1, tokens), before)
    pages.check()


@needs_numba
def test_a_hook_that_fails_is_called_again() -> None:
    pages = cache()
    seqs = filled(pages)
    calls: list[int] = []

    def rebase(step: Step) -> None:
        calls.append(step.size)
        step.columns(0, step.past)[0].add_(1)
        if len(calls) == 1:
            raise ZeroDivisionError

    step = pages.open(seqs, 2, gather="later", rebase=rebase)
    step.columns(step.past, step.past + 1)[0].fill_(7)
    step.fill(1)
    with pytest.raises(ZeroDivisionError):
        step.keys(0)
    wanted = pages.gather(seqs).keys[0] + 1
    assert torch.equal(step.keys(0)[:, :, :-1], wanted)
    assert bool((step.keys(0)[:, :, -1] == 7).all())
    assert calls == [6, 6]


@needs_numba
def test_a_step_that_has_ended_is_not_read() -> None:
    pages = cache()
    step, attention = opened(pages, filled(pages))
    step.close()
    with pytest.raises(ClosedStep):
        attention.see(0, 0, torch.zeros(3, HEADS, 3, SIZE))
    with pytest.raises(ClosedStep):
        step.in_pages()


TOKENS = torch.zeros(3, HEADS, 3, SIZE)
MISTAKES: dict[str, tuple[type[PagedKVError], Callable[[InPages], object]]] = {
    "column": (BadCount, lambda a: a.see(2, 0, TOKENS)),
    "no column": (BadCount, lambda a: a.see(-1, 0, TOKENS)),
    "layer": (BadCount, lambda a: a.see(0, LAYERS, TOKENS)),
    "no layer": (BadCount, lambda a: a.see(0, -1, TOKENS)),
    "a word": (PagedKVError, lambda a: a.see("0", 0, TOKENS)),  # type: ignore[arg-type]
    "no tensor": (BadArgument, lambda a: a.see(0, 0, [1.0])),  # type: ignore[arg-type]
    "rows": (BadShape, lambda a: a.see(0, 0, TOKENS[:2])),
    "sizes": (BadShape, lambda a: a.see(0, 0, TOKENS[..., :3])),
    "double": (BadDtype, lambda a: a.see(0, 0, TOKENS.double())),
    "sparse": (BadArgument, lambda a: a.see(0, 0, TOKENS.to_sparse())),
    "nested": (BadArgument, lambda a: a.see(0, 0, torch.nested.nested_tensor([TOKENS[0]]))),
}


@needs_numba
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_refused_before_anything_is_written(name: str) -> None:
    pages = cache()
    step, attention = opened(pages, filled(pages))
    error, call = MISTAKES[name]
    with pytest.raises(error):
        call(attention)
    assert not step.columns(step.past, step.past + 2)[0].any()


@needs_numba
@pytest.mark.parametrize(
    ("shift", "error"),
    [
        ([1.0], BadArgument),
        (torch.zeros(2 * LAYERS, 1, HEADS, 4, SIZE), BadShape),  # shorter than the windows
        (torch.zeros(2 * LAYERS, 3, HEADS, 5, SIZE), BadShape),
        (torch.zeros(5), BadShape),
        (torch.zeros(2 * LAYERS, 1, HEADS, 5, SIZE).half(), BadDtype),
    ],
)
def test_a_shift_that_does_not_fit_is_refused(shift: Any, error: type[PagedKVError]) -> None:
    pages = cache()
    step = pages.open(filled(pages), 2, gather="later")
    with pytest.raises(error):
        step.in_pages(shift)


@needs_numba
def test_tokens_may_lie_in_any_order_and_have_a_graph() -> None:
    pages = cache()
    _, attention = opened(pages, filled(pages))
    tokens = torch.randn(3, 3, HEADS, SIZE, requires_grad=True).transpose(1, 2)
    seen = attention.see(0, 0, tokens)
    assert not seen.requires_grad
    assert torch.equal(seen, attention.see(0, 0, tokens.detach().contiguous()))


@needs_numba
def test_tokens_are_as_many_as_they_say() -> None:
    class Liar(torch.Tensor):
        @property
        def shape(self) -> Any:  # type: ignore[override]
            return TOKENS.shape

    pages = cache()
    _, attention = opened(pages, filled(pages))
    with pytest.raises(BadShape):
        attention.see(0, 0, torch.zeros(1, SIZE).as_subclass(Liar))


@needs_numba
def test_copies_are_refused() -> None:
    pages = cache()
    _, attention = opened(pages, filled(pages))
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(NotCopyable):
            duplicate(attention)


@needs_numba
def test_the_default_device_does_not_matter() -> None:
    pages = cache()
    _, attention = opened(pages, filled(pages))
    wanted = attention.see(0, 0, TOKENS)
    with torch.device("meta"):
        assert torch.equal(attention.see(0, 0, TOKENS), wanted)


@needs_numba
def test_a_number_that_ends_the_step_comes_too_late() -> None:
    pages = cache()
    step, attention = opened(pages, filled(pages))

    class Ends:
        def __index__(self) -> int:
            step.close()
            return 0

    with pytest.raises(PagedKVError):
        attention.see(Ends(), 0, TOKENS)  # type: ignore[arg-type]


def test_a_hook_may_bring_tokens_along() -> None:
    pages = cache()
    seqs = filled(pages)
    keys, values = torch.randn(2, LAYERS, 3, HEADS, 1, SIZE).unbind(0)

    def rebase(step: Step) -> None:
        for layer in range(LAYERS):
            step.update(layer, keys[layer], values[layer])

    children = []
    for gather in ("now", "later"):
        with pages.open(seqs, 2, gather=gather, rebase=rebase) as step:
            assert step.planes[0].shape[3] == 7
            children.append(step.commit())
    one, other = map(pages.gather, children)
    assert torch.equal(one.keys, other.keys)
    assert torch.equal(one.values, other.values)


@needs_numba
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_signal_that_asks_for_windows_while_others_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pages = cache()
    first, second = filled(pages), filled(pages)
    step = pages.open(first, 1, gather="later")
    found: list[object] = []
    read = Pool.read

    def look(*_: object) -> None:
        try:
            found.append(step.keys(0).clone())
        except NestedCall as refused:
            found.append(refused)

    def interrupted(self: Pool, *args: Any, **options: Any) -> Any:
        monkeypatch.setattr(Pool, "read", read)
        signal.raise_signal(signal.SIGUSR1)
        return read(self, *args, **options)

    before = signal.signal(signal.SIGUSR1, look)
    try:
        monkeypatch.setattr(Pool, "read", interrupted)
        other = pages.open(second, 1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert type(found[0]) is NestedCall
    assert torch.equal(step.keys(0), pages.gather(first).keys[0])
    assert torch.equal(other.keys(0), pages.gather(second).keys[0])


def test_where_windows_are_copied_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({"dtype": torch.bfloat16}, {"value_head_size": 3}, {"storage": "int8"}):
        pages = cache(**options)
        with pages.open(pages.new(2), 2, gather="later") as step:
            assert step.in_pages() is None
    pages = cache()
    seqs = filled(pages, 1, 3)
    with pages.open(seqs[:1], 2) as step:
        assert step.in_pages() is None, "they were copied already"
    monkeypatch.setattr(in_pages, "loop", lambda: None)
    with pages.open(seqs[:1], 2, gather="later") as step:
        assert step.in_pages() is None
        assert step.keys(0).shape[2] == 3
    assert "pip install" in str(why_not(CPU, torch.float32))


def test_why_not_names_what_is_in_the_way() -> None:
    assert "cuda" in str(why_not(torch.device("cuda"), torch.float32))
    assert "float16" in str(why_not(CPU, torch.float16))


def test_when_windows_are_copied_is_one_of_two_words() -> None:
    pages = cache()
    with pytest.raises(BadArgument, match='"now" or "later"'):
        pages.open(pages.new(1), 1, gather="never")

"""Attention over pages: what it takes and refuses, its memory, and one layer of storage."""

from __future__ import annotations

import pytest
import torch
from paged_rows import Scene, assert_close

from paged_kv.attention import Rows, Scratch, make_attention, may_pay
from paged_kv.errors import BadArgument, BadCount, BadDevice, BadDtype, BadShape

BACKENDS = ["auto", "dense", "tree"]


def forked(device: str = "cpu", **options: object) -> Scene:
    """A cache for steps of several rows."""
    torch.manual_seed(0)
    return Scene(page_size=4, device=device, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value_head_size", [None, 8])
def test_backends_agree_with_float64(
    device: str, backend: str, dtype: torch.dtype, value_head_size: int | None
) -> None:
    scene = forked(device, dtype=dtype, head_size=16, value_head_size=value_head_size)
    root = scene.new(1, 40)
    left = scene.fork(root)
    scene.append(left, 30)
    step = scene.step([root, left, left, root], [2, 1, 3, 0])
    queries = step.queries(2)
    attention = make_attention(scene.storage, step.rows, backend=backend)
    for layer in range(2):
        step.write(layer)
        found = attention.attend(layer, queries)
        assert found.dtype == dtype
        assert_close(found, step.expected(layer, queries, scale=0.25))
        assert found[0, :, 2:].eq(0).all()
        assert found[3].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_without_queries_has_an_empty_answer(backend: str) -> None:
    scene = forked(value_head_size=3)
    step = scene.step([scene.new(0, 5)] * 2, [0, 0])
    attention = make_attention(scene.storage, step.rows, backend=backend)
    assert attention.attend(0, step.queries(1)).shape == (2, 2, 0, 3)
    nobody = make_attention(scene.storage, Rows([], [], [], []), backend=backend)
    assert nobody.attend(0, torch.empty(0, 2, 0, 4)).shape == (0, 2, 0, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_new_tokens_are_attended_in_order(backend: str) -> None:
    """A prefill beside rows of one token."""
    scene = forked()
    root = scene.new(0, 20)
    step = scene.step([root, root, scene.new(2, 0)], [70, 1, 33])
    queries = step.queries(3)
    step.write(1)
    attention = make_attention(scene.storage, step.rows, backend=backend)
    assert_close(attention.attend(1, queries), step.expected(1, queries, scale=0.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_mode_of_torch_is_fine(backend: str) -> None:
    """Gradients do not pass, and memory made in one mode is used in all."""
    scene = forked()
    step = scene.step([scene.new(0, 40)] * 3, [1] * 3)
    step.write(0)
    queries = step.queries(1)
    expected = step.expected(0, queries, scale=0.5)
    attention = make_attention(scene.storage, step.rows, backend=backend)
    with torch.inference_mode():
        assert_close(attention.attend(0, queries), expected)
    found = attention.attend(0, queries.clone().requires_grad_())
    assert not found.requires_grad
    assert_close(found, expected)
    with torch.no_grad():
        assert_close(attention.attend(0, queries), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attention.attend(0, queries)
        assert_close(attention.attend(0, queries, soft_cap=1e9), expected)
    assert found.dtype == torch.float32
    assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_answers_are_the_callers_own(backend: str) -> None:
    scene = forked()
    scratch = Scratch(torch.device("cpu"))
    step = scene.step([scene.new(0, 40)] * 3, [1] * 3)
    step.write(0)
    step.write(1)
    queries = step.queries(1)
    before = queries.clone()
    attention = make_attention(scene.storage, step.rows, backend=backend, scratch=scratch)
    first = attention.attend(0, queries)
    kept = first.clone()
    attention.attend(1, queries)
    assert torch.equal(first, kept)
    assert torch.equal(queries, before)


def test_memory_is_used_again_and_counted() -> None:
    """Far less than the K/V of the trunk, whatever the number of layers."""
    scene = forked(layers=8, heads=2, head_size=32)
    scratch = Scratch(torch.device("cpu"))
    root = scene.new(0, 1200)
    held = []
    for _ in range(3):
        step = scene.step([root] * 8, [1] * 8)
        attention = make_attention(scene.storage, step.rows, backend="tree", scratch=scratch)
        queries = step.queries(1)
        for layer in range(8):
            step.write(layer)
            attention.attend(layer, queries)
        held.append(scratch.nbytes)
        step.end()
    trunk = 1200 * scene.cache.page_bytes // 4
    assert held[0] == held[1] == held[2] < trunk / 8
    scratch.trim()
    assert scratch.nbytes == 0


def test_steps_that_share_memory_may_alternate() -> None:
    """The larger one replaces memory, and the smaller one follows."""
    scene = forked()
    scratch = Scratch(torch.device("cpu"))
    small = scene.step([scene.new(0, 9)] * 2, [1] * 2)
    large = scene.step([scene.new(0, 200)] * 9, [2] * 9)
    pairs = [
        (
            step,
            step.queries(1),
            make_attention(scene.storage, step.rows, backend=backend, scratch=scratch),
        )
        for step in (small, large)
        for backend in ("tree", "dense")
    ]
    for step, _, _ in pairs:
        step.write(0)
    for step, queries, attention in (*pairs, *pairs):
        assert_close(attention.attend(0, queries), step.expected(0, queries, scale=0.5))


def test_the_pool_may_grow_meanwhile() -> None:
    from paged_kv import PagedKVCache

    cache = PagedKVCache(layers=1, heads=1, head_size=4, page_size=2, num_pages=8)
    (root,) = cache.new()
    kv = torch.randn(1, 1, 1, 8, 4)
    cache.append([root], kv, kv)
    tables, starts, lengths = cache._pool.books.windows([root])
    rows = Rows(tables, starts, [lengths[0] - 1], [1])
    attention = make_attention(cache._pool.storage, rows, backend="tree")
    queries = torch.randn(1, 1, 1, 4)
    before = attention.attend(0, queries)
    cache.append(cache.new(9), *[torch.randn(1, 9, 1, 8, 4)] * 2)
    assert torch.equal(attention.attend(0, queries), before)


def test_a_dense_step_is_named_where_it_is_as_fast() -> None:
    unizero = Scene(page_size=2, heads=8, head_size=96)
    assert not may_pay(unizero.storage, [12] * 8, [2] * 8)
    assert may_pay(unizero.storage, [120] * 8, [2] * 8)
    assert not may_pay(unizero.storage, [120] * 8, [2] * 8, window=12)
    assert not may_pay(unizero.storage, [], [])


# -- what is refused


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 4, 1), BadShape),
        ((2, 3, 1, 4), BadShape),  # not a multiple of two heads
        ((3, 4, 1, 4), BadShape),
        ((2, 4, 2, 4), BadShape),
        ((2, 4, 1, 5), BadShape),
        ((2, 0, 1, 4), BadShape),
    ],
)
def test_queries_of_another_shape_are_refused(
    backend: str, shape: tuple[int, ...], expected: type[Exception]
) -> None:
    scene = forked()
    step = scene.step([scene.new(0, 5)] * 2, [1, 1])
    attention = make_attention(scene.storage, step.rows, backend=backend)
    with pytest.raises(expected, match=r"queries has shape .*expected \(2, "):
        attention.attend(0, torch.zeros(shape))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("options", "expected", "message"),
    [
        ({"window": 0}, BadCount, "window is 0, allowed is an int >= 1"),
        ({"window": 1.5}, BadCount, "window is 1.5"),
        ({"soft_cap": 0.0}, BadArgument, "soft_cap is 0.0, allowed is None or a number above 0"),
        ({"soft_cap": "x"}, BadArgument, "soft_cap is 'x', allowed is a finite number"),
        ({"scale": float("nan")}, BadArgument, "scale is nan, allowed is a finite number"),
        ({"scale": True}, BadArgument, "scale is True"),
    ],
)
def test_options_out_of_range_are_refused(
    backend: str, options: dict[str, object], expected: type[Exception], message: str
) -> None:
    scene = forked()
    step = scene.step([scene.new(0, 5)] * 2, [1, 1])
    attention = make_attention(scene.storage, step.rows, backend=backend)
    with pytest.raises(expected, match=message):
        attention.attend(0, step.queries(1), **options)


@pytest.mark.parametrize("layer", [-1, 2, 0.5, True])
def test_a_layer_that_is_not_there_is_refused(layer: object) -> None:
    scene = forked()
    step = scene.step([scene.new(0, 5)], [1])
    attention = make_attention(scene.storage, step.rows)
    with pytest.raises(BadCount, match=r"layer is .*, allowed is an int from 0 to 1"):
        attention.attend(layer, step.queries(1))


def test_queries_of_another_kind_are_refused() -> None:
    scene = forked()
    step = scene.step([scene.new(0, 5)], [1])
    attention = make_attention(scene.storage, step.rows)
    queries = step.queries(1)
    with pytest.raises(BadDtype, match=r"queries has dtype torch.float64"):
        attention.attend(0, queries.double())
    with pytest.raises(BadDevice, match="queries is on device meta"):
        attention.attend(0, queries.to("meta"))
    with pytest.raises(BadArgument, match=r"queries is .*, allowed is a tensor"):
        attention.attend(0, queries.tolist())


def test_an_unknown_backend_is_refused() -> None:
    scene = forked()
    rows = Rows([], [], [], [])
    with pytest.raises(
        BadArgument, match=r'backend is .flash., allowed is "auto" or "dense" or "tree"'
    ):
        make_attention(scene.storage, rows, backend="flash")
    with pytest.raises(BadCount, match="depth is -1"):
        make_attention(scene.storage, rows, depth=-1)


# -- one layer of the storage


@pytest.mark.parametrize("value_head_size", [None, 3])
def test_a_layer_is_written_and_read_alone(device: str, value_head_size: int | None) -> None:
    scene = forked(device, layers=3, value_head_size=value_head_size)
    seq = scene.new(0, 8)
    before = scene.cache.gather([seq])
    ((pages,), _, _) = scene.cache._pool.books.windows([seq])
    slots = torch.tensor([pages[1] * 4 + 3, pages[0] * 4 + 1], device=device)
    keys = torch.randn(2, 2, 4, device=device, requires_grad=True)
    values = torch.randn(2, 2, scene.cache.value_head_size, device=device)
    scene.storage.write_tokens(1, scene.storage.slot_index(slots), keys, values)
    after = scene.cache.gather([seq])
    for found, old, new in zip(after[:2], before[:2], (keys, values)):
        assert not found.requires_grad
        expected = old.clone()
        expected[1, 0, :, [7, 1]] = new.detach().transpose(0, 1)
        assert torch.equal(found, expected)
    index = scene.storage.layer_index(scene.cache.block_tables([seq])[0].numpy().reshape(-1))
    for read, expected in (
        (scene.storage.read_keys, after.keys),
        (scene.storage.read_values, after.values),
    ):
        size = expected.shape[-1]
        out = torch.empty(2, 2, 4, size, device=device)
        read(1, index.reshape(-1), scene.storage.as_rows(out))
        assert torch.equal(out.view(2, 8, size), expected[1, 0])
        one = torch.empty(1, 4, size, device=device)
        # one head of one page
        read(2, index[1:, 1:].reshape(-1), scene.storage.as_rows(one))
        assert torch.equal(one[0], expected[2, 0, 1, 4:])

"""Inside a scope the layers of a model are packed; outside nothing is left of it."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import pytest
import torch
from torch import nn

from paged_kv.linears import PackedLinears, packing, scope

SIZE = 512
ROWS = 8
KERNELS = packing.has_kernels(torch.float32)


class Own(nn.Linear):
    """A layer that is computed otherwise."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 1


def make_model() -> nn.Sequential:
    """Four layers: one of them of another class, one with a forward of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(SIZE, SIZE), nn.Tanh(), Own(SIZE, SIZE), nn.Linear(SIZE, SIZE, bias=False)
    )
    special = nn.Linear(SIZE, SIZE)
    special.forward = lambda input: input * 2  # type: ignore[method-assign]
    model.append(special)
    return model.requires_grad_(False)


def looks(model: nn.Module) -> list[dict[str, object]]:
    """All attributes of all modules."""
    return [dict(part.__dict__) for part in model.modules()]


def patched(model: nn.Module) -> int:
    """How many layers have a forward of their own."""
    return sum("forward" in part.__dict__ for part in model.modules())


def test_the_model_computes_the_same_and_is_as_before() -> None:
    model, linears = make_model(), PackedLinears()
    before = looks(model)
    x = torch.randn(ROWS, SIZE)
    with torch.no_grad():
        plain = model(x)
        for _ in range(2):
            with linears.scope(model):
                assert patched(model) == 3
                found = model(x)
            torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
            assert looks(model) == before
            assert torch.equal(model(x), plain)
    if KERNELS:
        assert 2 * SIZE * SIZE * 4 <= linears.nbytes < 3 * SIZE * SIZE * 4


def test_hooks_run() -> None:
    model, linears = make_model(), PackedLinears()
    seen = []
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model[3].register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(ROWS, SIZE)
    with torch.no_grad():
        plain = model(x)
        with linears.scope(model):
            torch.testing.assert_close(model(x), plain, rtol=1e-5, atol=1e-5)
    assert len(seen) == 2


def test_gradients_flow_inside() -> None:
    model, linears = make_model().requires_grad_(), PackedLinears()
    with linears.scope(model):
        model(torch.randn(ROWS, SIZE)).sum().backward()
    assert model[0].weight.grad is not None
    assert linears.nbytes == 0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_nothing_behind(error: type[BaseException]) -> None:
    model, linears = make_model(), PackedLinears()
    before = looks(model)
    with pytest.raises(error), linears.scope(model):
        raise error
    assert looks(model) == before


def test_scopes_of_one_model_nest() -> None:
    model, linears, others = make_model(), PackedLinears(), PackedLinears()
    before = looks(model)
    with linears.scope(model), others.scope(model):
        with linears.scope(model):
            pass
        assert patched(model) == 3
        with torch.no_grad():
            model(torch.randn(ROWS, SIZE))
    assert looks(model) == before
    assert others.nbytes == 0


def test_scopes_may_end_in_any_order() -> None:
    model, linears = make_model(), PackedLinears()
    first, second = linears.scope(model), linears.scope(model)
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert patched(model) == 3
    second.__exit__()
    assert patched(model) == 1


def test_a_scope_that_is_dropped_ends() -> None:
    model, linears = make_model(), PackedLinears()
    linears.scope(model).__enter__()
    gc.collect()
    assert patched(model) == 1


def dropping(frame: FrameType | None) -> bool:
    """Whether a frame runs on behalf of a finalizer: what is raised there interrupts nobody."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


def interrupted(linears: PackedLinears, model: nn.Module, line: int) -> bool:
    """Enters and leaves a scope, interrupted before the line of that number, if so many run."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> object:
        nonlocal count
        if frame.f_code.co_filename != scope.__file__ or dropping(frame):
            return None
        count += event in ("line", "call")
        if count == line:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with linears.scope(model):
            pass
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return count >= line


def test_an_interrupt_at_any_line_leaves_nothing_behind() -> None:
    model, linears = make_model(), PackedLinears()
    before = looks(model)
    line = 1
    while interrupted(linears, model, line):
        assert looks(model) == before, f"interrupted at line {line} of those that run"
        line += 1
    assert line > 20


def test_a_forward_that_is_set_inside_stays() -> None:
    model, linears = make_model(), PackedLinears()
    with linears.scope(model):
        model[0].forward = lambda input: input
    assert patched(model) == 2


def test_layers_that_change_are_left_alone() -> None:
    model, linears = make_model(), PackedLinears()
    with linears.scope(model):
        assert patched(model) == 3
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
    model[3] = nn.Linear(SIZE, SIZE)
    with linears.scope(model), torch.no_grad():
        assert patched(model) == 1
        model(torch.randn(ROWS, SIZE))
    assert linears.nbytes == 0


def test_a_copy_that_is_made_inside_computes_with_its_own_weights() -> None:
    model, linears = make_model(), PackedLinears()
    x = torch.randn(ROWS, SIZE)
    with torch.no_grad(), linears.scope(model):
        model(x)
        other = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.zero_()
        assert other[0](x).any()
        assert not model[0](x).any()


def test_a_model_is_not_kept_alive() -> None:
    linears = PackedLinears()
    model = nn.Linear(SIZE, SIZE)
    with linears.scope(model), torch.no_grad():
        model(torch.randn(ROWS, SIZE))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert linears.nbytes == 0


def test_threads_share_a_scope() -> None:
    model, linears = make_model(), PackedLinears()
    before = looks(model)
    x = torch.randn(ROWS, SIZE)
    with torch.no_grad():
        plain = model(x)
    start = threading.Barrier(2)

    def work(_: int) -> None:
        start.wait()
        for _ in range(100):
            with linears.scope(model), torch.no_grad():
                torch.testing.assert_close(model(x), plain, rtol=1e-5, atol=1e-5)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    assert looks(model) == before

"""Packed linears compute what F.linear does, whatever happens to the weights meanwhile."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from paged_kv.linears import PackedLinears, packing

OUTPUTS, INPUTS = 512, 512
ROWS = 8
KERNELS = packing.has_kernels(torch.float32)
BFLOAT16 = packing.has_kernels(torch.bfloat16)
PACKED = torch.float32, torch.bfloat16
needs_kernels = pytest.mark.skipif(not KERNELS, reason="this torch has no packed linears")


def test_kernels_are_there_where_torch_has_onednn() -> None:
    """Else what needs them would be skipped, and nobody would know."""
    assert packing.has_kernels(torch.float32) == torch.backends.mkldnn.is_available()


def works(call: Callable[[], object]) -> bool:
    """Whether this torch can do it."""
    try:
        call()
    except RuntimeError:
        return False
    return True


# Older torch multiplies no float16 on a CPU, and has no fused optimizers there.
DTYPES = [
    dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if works(lambda: F.linear(torch.ones(1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype)))  # noqa: B023
]
FUSED = [
    fused
    for fused in (False, True)
    if works(lambda: torch.optim.Adam([torch.nn.Parameter(torch.ones(1))], fused=fused))  # noqa: B023
]


def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Numbers between -1 and 1."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(*shape, generator=generator) * 2 - 1).to(dtype)


def layer(outputs: int = OUTPUTS, inputs: int = INPUTS, *, seed: int = 0) -> torch.nn.Linear:
    """A layer whose weights are those of a seed."""
    made = torch.nn.Linear(inputs, outputs)
    made.load_state_dict(
        {"weight": make(outputs, inputs, seed=seed), "bias": make(outputs, seed=seed + 1)}
    )
    return made


def exact(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """A linear in double precision."""
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


def check(
    found: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor
) -> None:
    """That it is what F.linear computes, but for rounding: at most eight units of the sum
    of all terms without their signs.
    """
    plain = F.linear(x, weight, bias)
    assert found.shape == plain.shape
    assert found.dtype is plain.dtype
    assert found.device == plain.device
    assert found.layout is plain.layout
    terms = exact(weight.abs(), None if bias is None else bias.abs(), x.abs())
    bound = terms * 8 * torch.finfo(x.dtype).eps
    assert ((found.double() - exact(weight, bias, x)).abs() <= bound).all()


SHAPES = [
    (1, INPUTS),
    (2, INPUTS),
    (ROWS, INPUTS),
    (64, INPUTS),
    (700, INPUTS),
    (0, INPUTS),
    (INPUTS,),
    (ROWS, 1, INPUTS),
    (2, 3, 4, INPUTS),
    (3, 0, INPUTS),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_computes_what_a_linear_computes(
    shape: tuple[int, ...], biased: bool, dtype: torch.dtype
) -> None:
    weight = make(OUTPUTS, INPUTS, dtype=dtype)
    bias = make(OUTPUTS, dtype=dtype, seed=1) if biased else None
    x = make(*shape, dtype=dtype, seed=2)
    with torch.no_grad():
        check(PackedLinears()(weight, bias, x), weight, bias, x)


@needs_kernels
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x[:, :INPUTS].t().contiguous().t(),
        lambda x: x[:1, :INPUTS].expand(ROWS, INPUTS),
        lambda x: x.flatten()[1 : ROWS * INPUTS + 1].view(ROWS, INPUTS),
        lambda x: x.view(ROWS, 2, INPUTS)[:, 1],
        lambda x: x.view(ROWS, 2, INPUTS).transpose(0, 1),
    ],
)
def test_rows_may_lie_anyhow(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = view(make(ROWS, 2 * INPUTS))
    weight = make(OUTPUTS, INPUTS)
    linears = PackedLinears()
    with torch.no_grad():
        check(linears(weight, None, x), weight, None, x)
    assert linears.nbytes >= weight.nbytes


@needs_kernels
def test_what_is_not_finite_stays_where_it_is() -> None:
    x = make(ROWS, INPUTS)
    x[0, 0] = float("nan")
    x[1, 1] = float("inf")
    weight = make(OUTPUTS, INPUTS)
    with torch.no_grad():
        found = PackedLinears()(weight, None, x)
    assert found[0].isnan().all()
    assert torch.equal(found.isfinite(), F.linear(x, weight).isfinite())


@pytest.mark.skipif(not BFLOAT16, reason="this processor multiplies no bfloat16")
def test_bfloat16_is_packed_and_rounds_no_worse() -> None:
    linears = PackedLinears()
    for inputs in (INPUTS, 3 * INPUTS):
        weight = make(OUTPUTS, inputs, dtype=torch.bfloat16)
        for rows in (1, 2, ROWS, 64):
            x = make(rows, inputs, dtype=torch.bfloat16, seed=rows)
            right = exact(weight, None, x)
            with torch.no_grad():
                ours = (linears(weight, None, x).double() - right).abs().max()
                plain = (F.linear(x, weight).double() - right).abs().max()
            assert ours <= plain * 1.001
        assert linears.nbytes >= weight.nbytes


def packed_bytes(use: Callable[[PackedLinears], object]) -> int:
    """Bytes that are packed after one use."""
    linears = PackedLinears()
    use(linears)
    return linears.nbytes


def with_grad(linears: PackedLinears) -> None:
    weight = make(OUTPUTS, INPUTS).requires_grad_()
    linears(weight, None, make(ROWS, INPUTS)).sum().backward()
    assert weight.grad is not None


def with_tangents(linears: PackedLinears) -> None:
    forward = torch.autograd.forward_ad
    weight = make(OUTPUTS, INPUTS)
    with torch.no_grad(), forward.dual_level():
        x = forward.make_dual(make(ROWS, INPUTS), make(ROWS, INPUTS, seed=1))
        tangent = forward.unpack_dual(linears(weight, None, x)).tangent
    torch.testing.assert_close(tangent, F.linear(make(ROWS, INPUTS, seed=1), weight))


def with_vmap(linears: PackedLinears) -> None:
    weight, x = make(OUTPUTS, INPUTS), make(3, ROWS, INPUTS)
    with torch.no_grad():
        found = torch.func.vmap(lambda rows: linears(weight, None, rows))(x)
    torch.testing.assert_close(found, F.linear(x, weight))


def with_autocast(linears: PackedLinears) -> None:
    with torch.no_grad(), torch.autocast("cpu"):
        found = linears(make(OUTPUTS, INPUTS), None, make(ROWS, INPUTS))
    assert found.dtype is torch.bfloat16


def with_trace(linears: PackedLinears) -> None:
    weight = make(OUTPUTS, INPUTS)
    with torch.no_grad():
        traced = torch.jit.trace(
            lambda x: linears(weight, None, x), make(ROWS, INPUTS), check_trace=False
        )
        weight.zero_()
        assert not traced(make(ROWS, INPUTS)).any()


def with_transposed(linears: PackedLinears) -> None:
    weight = make(INPUTS, INPUTS).t()
    with torch.no_grad():
        check(linears(weight, None, make(ROWS, INPUTS)), weight, None, make(ROWS, INPUTS))


def with_subclass(linears: PackedLinears) -> None:
    class Named(torch.Tensor):
        pass

    weight = make(OUTPUTS, INPUTS).as_subclass(Named)
    with torch.no_grad():
        assert type(linears(weight, None, make(ROWS, INPUTS))) is Named


def without_kernels(linears: PackedLinears) -> None:
    with torch.backends.mkldnn.flags(enabled=False), torch.no_grad():
        linears(make(OUTPUTS, INPUTS), None, make(ROWS, INPUTS))


def in_inference_mode(linears: PackedLinears) -> None:
    x = make(ROWS, INPUTS)
    with torch.inference_mode():
        weight = make(OUTPUTS, INPUTS)
        check(linears(weight, None, x), weight, None, x)
        weight.zero_()
        assert not linears(weight, None, x).any()


def of_little(linears: PackedLinears) -> None:
    with torch.no_grad():
        linears(make(64, 64), None, make(ROWS, 64))


def on_meta(linears: PackedLinears) -> None:
    with torch.no_grad():
        linears(make(OUTPUTS, INPUTS).to("meta"), None, make(ROWS, INPUTS).to("meta"))


FALLBACKS = [
    with_grad,
    with_tangents,
    with_vmap,
    with_autocast,
    with_trace,
    with_transposed,
    with_subclass,
    without_kernels,
    in_inference_mode,
    of_little,
    on_meta,
]


@pytest.mark.parametrize("use", FALLBACKS, ids=lambda use: use.__name__)
def test_leaves_to_torch_what_it_cannot_do(use: Callable[[PackedLinears], object]) -> None:
    assert packed_bytes(use) == 0


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype not in PACKED])
def test_other_types_are_not_packed(dtype: torch.dtype) -> None:
    weight = make(OUTPUTS, INPUTS, dtype=dtype)
    with torch.no_grad():
        assert packed_bytes(lambda linears: linears(weight, None, weight[:ROWS])) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_other_devices_are_left_alone() -> None:
    weight = make(OUTPUTS, INPUTS).cuda()
    with torch.no_grad():
        assert packed_bytes(lambda linears: linears(weight, None, weight[:ROWS])) == 0


@pytest.mark.parametrize(
    ("bias", "x"),
    [
        (make(OUTPUTS), make(ROWS, INPUTS + 1)),
        (make(OUTPUTS - 1), make(ROWS, INPUTS)),
        (make(OUTPUTS), make(ROWS, INPUTS, dtype=torch.float64)),
        (make(OUTPUTS, dtype=torch.float64), make(ROWS, INPUTS)),
        (None, torch.ones(())),
    ],
)
def test_mistakes_are_those_of_a_linear(bias: torch.Tensor | None, x: torch.Tensor) -> None:
    weight = make(OUTPUTS, INPUTS)
    with torch.no_grad():
        with pytest.raises(RuntimeError) as plain:
            F.linear(x, weight, bias)
        with pytest.raises(RuntimeError) as ours:
            PackedLinears()(weight, bias, x)
    assert str(ours.value) == str(plain.value)


@needs_kernels
def test_a_weight_that_dies_takes_its_copy_along() -> None:
    linears = PackedLinears()
    kept, dropped = layer(), layer()
    with torch.no_grad():
        linears(dropped.weight, None, make(ROWS, INPUTS))
        one = linears.nbytes
        linears(kept.weight, None, make(ROWS, INPUTS))
    assert linears.nbytes == 2 * one
    assert "2 weights" in repr(linears)
    del dropped
    gc.collect()
    assert linears.nbytes == one


@needs_kernels
def test_what_leaves_no_trace_needs_a_call() -> None:
    linears = PackedLinears()
    weight, x = make(OUTPUTS, INPUTS), make(ROWS, INPUTS)
    with torch.no_grad():
        before = linears(weight, None, x)
        weight.data.zero_()
        assert torch.equal(linears(weight, None, x), before)
        linears.repack()
        assert linears.nbytes == 0
        assert not linears(weight, None, x).any()


def test_copies_begin_empty() -> None:
    linears = PackedLinears()
    with torch.no_grad():
        linears(make(OUTPUTS, INPUTS), None, make(ROWS, INPUTS))
    assert copy.deepcopy(linears).nbytes == 0
    assert pickle.loads(pickle.dumps(linears)).nbytes == 0


@needs_kernels
def test_threads_share_it() -> None:
    linears = PackedLinears()
    layers = [layer(seed=seed) for seed in range(3)]
    xs = [make(ROWS, INPUTS, seed=seed) for seed in range(3)]
    start = threading.Barrier(4)

    def work(index: int) -> None:
        start.wait()
        with torch.no_grad():
            for turn in range(30):
                one = layers[(index + turn) % 3]
                check(
                    linears(one.weight, one.bias, xs[turn % 3]), one.weight, one.bias, xs[turn % 3]
                )
                if turn % 10 == index:
                    linears.repack()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert linears.nbytes >= layers[0].weight.nbytes


class Weights(RuleBasedStateMachine):
    """All ways to change a weight that torch lets one see, between uses by 1 to 9 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = PackedLinears()
        self.layers = [layer(seed=seed) for seed in range(2)]
        self.seed = 0

    def numbers(self) -> torch.Tensor:
        """Another weight."""
        self.seed += 1
        return make(OUTPUTS, INPUTS, seed=self.seed)

    @rule(index=st.integers(0, 1), rows=st.integers(1, 9))
    def use(self, index: int, rows: int) -> None:
        module = self.layers[index]
        x = make(rows, INPUTS, seed=rows)
        with torch.no_grad():
            check(self.linears(module.weight, module.bias, x), module.weight, module.bias, x)

    @rule(index=st.integers(0, 1))
    def write(self, index: int) -> None:
        with torch.no_grad():
            self.layers[index].weight.copy_(self.numbers())

    @rule(index=st.integers(0, 1))
    def write_a_view(self, index: int) -> None:
        with torch.no_grad():
            self.layers[index].weight[3].neg_()

    @rule(index=st.integers(0, 1))
    def load(self, index: int) -> None:
        self.layers[index].load_state_dict({"weight": self.numbers(), "bias": make(OUTPUTS)})

    @rule(index=st.integers(0, 1), assigned=st.booleans())
    def replace(self, index: int, assigned: bool) -> None:
        if assigned:
            self.layers[index].weight = torch.nn.Parameter(self.numbers())
        else:
            self.layers[index] = layer(seed=self.seed)
            self.seed += 1

    @rule(index=st.integers(0, 1), times=st.integers(1, 3))
    def put_data(self, index: int, times: int) -> None:
        """Storage that was freed may be taken again: at the same address lies another weight."""
        for _ in range(times):
            self.layers[index].weight.data = self.numbers()

    @rule(index=st.integers(0, 1), fused=st.sampled_from(FUSED))
    def learn(self, index: int, fused: bool) -> None:
        module = self.layers[index]
        optimizer = torch.optim.Adam([module.weight], lr=0.1, fused=fused)
        with torch.enable_grad():
            F.linear(make(1, INPUTS), module.weight).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    @rule(index=st.integers(0, 1))
    def swap_halves_of_memory(self, index: int) -> None:
        """The same storage from another place on."""
        weight = self.layers[index].weight
        twice = torch.cat([weight.data, -weight.data])
        weight.data = twice[OUTPUTS:] if self.seed % 2 else twice[:OUTPUTS]
        self.seed += 1

    @rule()
    def repack(self) -> None:
        self.linears.repack()

    @invariant()
    def holds_no_more_than_there_are(self) -> None:
        one = packing.nbytes(packing.pack(make(OUTPUTS, INPUTS))) if KERNELS else 0
        gc.collect(0)
        assert self.linears.nbytes <= 2 * one


TestWeights = Weights.TestCase
TestWeights.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)

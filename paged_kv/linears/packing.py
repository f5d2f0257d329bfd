"""When a packed weight pays, and the kernels that pack and multiply.

The kernels are those of oneDNN, in the layout that `torch.compile` uses too. `docs/linears.md` says
what was measured.
"""

from __future__ import annotations

from functools import cache, partial

import torch
from torch.autograd import forward_ad

try:
    from torch.compiler import is_compiling
except ImportError:  # torch < 2.3
    from torch._dynamo import is_compiling

# One row: F.linear is as fast in float32. In bfloat16 one row gains as well.
_LEAST_ROWS = {torch.float32: 2, torch.bfloat16: 1}
# At 512 rows 1.1 times as fast, beyond it nothing is gained.
_MOST_ROWS = 512
# A call costs some 15 us more than F.linear, up to 40 amid other work; that takes 100 for these.
_LEAST_NUMBERS = 1 << 17
_TENSORS = (torch.Tensor, torch.nn.Parameter)
try:
    torch.is_autocast_enabled("cpu")
    _autocast = partial(torch.is_autocast_enabled, "cpu")
except TypeError:  # torch < 2.4
    _autocast = torch.is_autocast_cpu_enabled  # type: ignore[assignment]
_HINT = 64  # rows; the layout for 8 is as fast or slower, that for 1 gains nothing


def suits(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> bool:
    """Whether a packed copy of the weight computes this linear, and faster than F.linear.

    weight: [M, N]; bias: [M] or None; x: [..., N]. About two microseconds.
    """
    if is_compiling() or torch._C._is_tracing():
        return False
    dtype = weight.dtype
    least = _LEAST_ROWS.get(dtype)
    if least is None or weight.numel() < _LEAST_NUMBERS or x.dtype is not dtype:
        return False
    if type(weight) not in _TENSORS or type(x) not in _TENSORS or weight.ndim != 2:
        return False
    if not (weight.is_cpu and x.is_cpu and weight.is_contiguous() and x.layout is torch.strided):
        return False
    if bias is not None and (type(bias) not in _TENSORS or bias.dtype is not dtype):
        return False
    outputs, inputs = weight.shape
    if x.ndim == 0 or x.shape[-1] != inputs or (bias is not None and bias.shape != (outputs,)):
        return False  # what is wrong with it, F.linear says
    rows = x.numel() // inputs
    return least <= rows <= _MOST_ROWS and _plain() and has_kernels(dtype)


def _plain() -> bool:
    """Whether tensors are only computed with: nothing records, casts or wraps them."""
    return not (
        torch.is_grad_enabled()
        or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or _autocast()
        or not torch._C._get_mkldnn_enabled()
    )


@cache
def has_kernels(dtype: torch.dtype) -> bool:
    """Whether this torch, on this processor, packs weights of a type and multiplies with them."""
    try:
        if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        packed = pack(torch.ones(16, 16, dtype=dtype))
        product = multiply(packed, None, torch.ones(2, 16, dtype=dtype))
    except (AttributeError, RuntimeError):  # built without oneDNN, or without these kernels
        return False
    return bool((product == 16).all())


def pack(weight: torch.Tensor) -> torch.Tensor:
    """The weight in the layout that `multiply` reads: a copy, opaque to other kernels."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _HINT)
    return packed


def multiply(packed: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """What F.linear computes, with a packed weight; x: [..., N]."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product


def nbytes(packed: torch.Tensor) -> int:
    """Bytes of a packed weight, padding included where torch can tell."""
    try:
        return int(torch.ops.mkldnn._nbytes(packed))
    except AttributeError:  # an older torch
        return packed.numel() * packed.element_size()

"""Packed copies of weights, each as long as its weight lives and stays what it was."""

from __future__ import annotations

from collections.abc import Callable
from weakref import ref

import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

from paged_kv.linears import packing
from paged_kv.linears.scope import LinearScope, Patches
from paged_kv.weights import StepsSeen


class _Packed:
    """A packed copy of a weight, and how the weight looked when it was made."""

    __slots__ = (
        "_address",
        "_shape",
        "_steps",
        "_storage",
        "_version",
        "_weight",
        "copy",
        "nbytes",
    )

    def __init__(self, weight: torch.Tensor, gone: Callable[[object], object]) -> None:
        self._weight = ref(weight, gone)
        # Before the copy: what is written meanwhile by another thread makes it outdated.
        self._version = weight._version
        self._steps = StepsSeen(weight)
        self._address = weight.data_ptr()
        self._shape = weight.shape
        # An address tells nothing once its storage is gone: another one may lie there by now.
        self._storage = StorageWeakRef(weight.untyped_storage())  # type: ignore[no-untyped-call]
        self.copy = packing.pack(weight)
        self.nbytes = packing.nbytes(self.copy)

    def matches(self, weight: torch.Tensor) -> bool:
        """Whether the weight is what was packed, as far as can be seen without reading it."""
        return (
            self._weight() is weight
            and self._version == weight._version
            and self._address == weight.data_ptr()
            and self._shape == weight.shape
            and self._steps.match(weight)
            and not self._storage.expired()  # type: ignore[no-untyped-call]
        )


class PackedLinears:
    """Linear layers whose weights are packed at first use: `linears(weight, bias, x)` is F.linear.

    A packed weight takes its size once more, as long as the weight lives. It is packed again when
    the weight was written in place, by an optimizer, or got another storage. What writes through
    `.data`, a detached alias or a kernel of its own leaves no trace: call `repack` after that. A
    weight is known by its tensor object: one that is made for each call is packed at each call.

    Results differ from those of F.linear by rounding. F.linear itself is used where packing gains
    nothing (one row in float32, more than 512, weights of less than 128 Ki numbers), where
    gradients are recorded, tensors are traced, wrapped or cast, for weights that were made in
    inference mode, and on processors, devices and builds of torch that have no such kernels.

    Threads may share it. A copy of it, also a pickled one, begins empty.

    >>> import torch
    >>> linears = PackedLinears()
    >>> weight, x = torch.ones(512, 512), torch.ones(8, 512)
    >>> with torch.no_grad():
    ...     bool((linears(weight, None, x) == 512).all())
    True
    """

    def __init__(self) -> None:
        self._packed: dict[int, _Packed] = {}  # by id of the weight, which has no hash of its own
        self._patches = Patches(self.forward)

    def __call__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor
    ) -> torch.Tensor:
        """x @ weight.T + bias; weight: [M, N], bias: [M] or None, x: [..., N]; returns [..., M].

        Cost: about four microseconds more than the kernel; the first call packs, which takes as
        long as some five calls of F.linear.
        """
        if not packing.suits(weight, bias, x):
            return F.linear(x, weight, bias)
        store = self._packed  # the one of now: another thread may call `repack`
        key = id(weight)
        packed = store.get(key)
        if packed is None or not packed.matches(weight):
            if weight.is_inference():  # no version would tell that it was written
                return F.linear(x, weight, bias)
            packed = _Packed(weight, lambda _: store.pop(key, None))
            store[key] = packed
        return packing.multiply(packed.copy, bias, x)

    def __reduce__(self) -> tuple[type[PackedLinears], tuple[()]]:
        return PackedLinears, ()

    def __repr__(self) -> str:
        return f"<PackedLinears of {len(self._packed)} weights, {self.nbytes:,} bytes>"

    @property
    def nbytes(self) -> int:
        """Bytes of all packed copies."""
        return sum(packed.nbytes for packed in list(self._packed.values()))

    def repack(self) -> None:
        """Drop all packed copies: each weight is packed again at its next use."""
        self._packed = {}

    def forward(self, module: torch.nn.Linear, input: torch.Tensor) -> torch.Tensor:
        """What the `forward` of a linear module computes; its hooks do not run."""
        return self(module.weight, module.bias, input)

    def scope(self, model: torch.nn.Module) -> LinearScope:
        """A context manager: inside, the linear layers of the model compute with packed weights.

        Their attribute `forward` is set inside, for all threads, and gone afterwards, whatever was
        raised. Hooks run as before. Subclasses of nn.Linear, and modules that have a `forward` of
        their own, are left alone. What is a part of the model is found out once; layers that it
        gets later compute as ever.

        Cost: half a microsecond for each linear layer; the first time, a walk over all modules.
        """
        return self._patches.scope(model)

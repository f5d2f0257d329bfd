"""What is measured: time per region of the code, tensor kernels, device-to-host copies,
bytes held.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CACHE = "cache"
LAYER = "layer"
MODEL = "model"
HEADS = "heads"
TRANSFORMS = "transforms"
TREE = "tree"
REST = "rest"
_ALLOCATIONS = (
    "aten.empty",
    "aten.new_empty",
    "aten.empty_like",
    "aten.lift_fresh",
    "aten.detach",
    "aten.alias",
)


class Probe(NamedTuple):
    """A method whose time is charged to a region; the owner may be an object or a class."""

    owner: Any
    name: str
    region: str


class Regions:
    """Which part of the program is running, and for how long each part did.

    A region suspends the one around it: a model call inside a cache lookup is not cache time.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self.now = REST
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self._synchronize = synchronize
        self._since = time.perf_counter()

    def wrap(self, function: Callable[..., Any], region: str) -> Callable[..., Any]:
        """The same function, its time charged to `region`. Costs about half a
        microsecond a call.
        """
        clock = time.perf_counter
        seconds = self.seconds
        synchronize = self._synchronize

        def timed(*args: Any, **kwargs: Any) -> Any:
            around = self.now
            if around == region:
                return function(*args, **kwargs)
            if synchronize is not None:
                synchronize()
            start = clock()
            seconds[around] += start - self._since
            self.now = region
            self._since = start
            self.calls[region] += 1
            try:
                return function(*args, **kwargs)
            finally:
                if synchronize is not None:
                    synchronize()
                end = clock()
                seconds[region] += end - self._since
                self.now = around
                self._since = end

        return timed

    def stop(self) -> None:
        """Charge the time until now to the region that is running: all of them add up to the time
        since the last `reset`.
        """
        now = time.perf_counter()
        self.seconds[self.now] += now - self._since
        self._since = now

    def reset(self) -> None:
        """Forget everything measured so far."""
        self.seconds.clear()
        self.calls.clear()
        self.now = REST
        self._since = time.perf_counter()


def wrap_overhead(repeats: int = 4000) -> float:
    """Seconds that one wrapped call adds to its own region, measured with a function that does
    nothing.
    """
    regions = Regions()
    nothing = regions.wrap(lambda: None, LAYER)
    for _ in range(repeats):
        nothing()
    return regions.seconds[LAYER] / repeats


class Probes:
    """Wraps methods in place, and takes the wrappers off again."""

    def __init__(self, targets: Iterable[Probe], regions: Regions) -> None:
        self._targets = list(targets)
        self._regions = regions

    def __enter__(self) -> Regions:
        self._before = [vars(probe.owner).get(probe.name) for probe in self._targets]
        for probe in self._targets:
            bare = getattr(probe.owner, probe.name)
            setattr(probe.owner, probe.name, self._regions.wrap(bare, probe.region))
        self._regions.reset()
        return self._regions

    def __exit__(self, *_: object) -> None:
        for probe, before in zip(self._targets, self._before, strict=True):
            if before is None:
                delattr(probe.owner, probe.name)
            else:
                setattr(probe.owner, probe.name, before)


class KernelCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts tensor operations that would launch on a GPU, by region. Views and allocations are not
    counted.
    """

    def __init__(self, regions: Regions) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self.names: Counter[tuple[str, str]] = Counter()
        self._regions = regions
        self._launches: dict[Any, bool] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        launches = self._launches.get(func)
        if launches is None:
            launches = self._launches[func] = _launches(func)
        if launches:
            self.counts[self._regions.now] += 1
            self.names[self._regions.now, str(func)] += 1
        return func(*args, **(kwargs or {}))


def _launches(func: Any) -> bool:
    if str(func).rsplit(".", 1)[0] in _ALLOCATIONS or str(func).startswith("aten.empty"):
        return False
    returns = func._schema.returns
    view = bool(returns) and all(
        r.alias_info is not None and not r.alias_info.is_write for r in returns
    )
    return not view


class HostCopyCounter(TorchFunctionMode):
    """Counts copies of tensors to the host, by region.

    `cpu`, `item`, `tolist`, `to("cpu")`, and `numpy` of a tensor that was not just copied. On a CPU
    these cost little; on a GPU each one waits for the device.
    """

    def __init__(self, regions: Regions) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._regions = regions
        self._copied: Any = None
        self._always = {
            torch.Tensor.cpu,
            torch.Tensor.item,
            torch.Tensor.tolist,
            torch.Tensor.__bool__,
            torch.Tensor.__int__,
            torch.Tensor.__float__,
            torch.Tensor.__index__,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # Only the literal: `to(device)` with the model's device is an upload, and on a CPU it looks
        # the same.
        named = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, str)]
        to_host = func is torch.Tensor.to and "cpu" in named
        if func in self._always or to_host:
            self.counts[self._regions.now] += 1
            self._copied = result
        elif func is torch.Tensor.numpy:
            self.counts[self._regions.now] += args[0] is not self._copied
            self._copied = None
        return result


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind some tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())

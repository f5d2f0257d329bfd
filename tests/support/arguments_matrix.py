"""What callers may hand over, rightly or not: a scene, and values by the text that makes them.

What is right where stands in arguments_cases.py; test_arguments.py tries every value everywhere.
"""

from __future__ import annotations

import array
import enum
import warnings
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import torch
from small_caches import books

from paged_kv import CacheIndex, KVCacheManager, PagedKVCache
from paged_kv.eviction import LRU

OPTIONS: dict[str, Any] = {
    "layers": 2,
    "heads": 1,
    "head_size": 2,
    "page_size": 2,
    "num_pages": 8,
}
KV = torch.arange(24, dtype=torch.float32).reshape(2, 2, 1, 3, 2)
STEP = torch.ones(2, 1, 1, 2)
NO_INDEX = "this is no index today"


class Boom(Exception):
    """What objects of the caller raise."""


class Whole(enum.IntEnum):
    ONE = 1


class Index:
    """A whole number of the caller's own."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __index__(self) -> int:
        return self.number


class NoIndex:
    def __index__(self) -> int:
        raise Boom


class WrongIndex:
    def __index__(self) -> int:
        raise TypeError(NO_INDEX)


class NoHash:
    def __hash__(self) -> int:
        raise Boom


class NoEq:
    """Falls into the place of a stored key, and cannot be compared."""

    def __hash__(self) -> int:
        return hash("kept")

    def __eq__(self, other: object) -> bool:
        raise Boom


class NoRepr:
    def __repr__(self) -> str:
        raise Boom


class Anything:
    """Can be made of anything, and does nothing."""

    def __init__(self, *args: object) -> None:
        pass


class Scene:
    """Sequences of all sorts, an index, a manager, and an open step with a new token."""

    def __init__(self) -> None:
        self.cache = PagedKVCache(**OPTIONS)
        seqs = self.cache.new(4)
        self.one, self.two, self.owned, self.pinned = seqs
        self.cache.append(seqs, KV.repeat(1, 2, 1, 1, 1), KV.repeat(1, 2, 1, 1, 1))
        (self.gone,) = self.cache.fork([self.one])
        self.cache.release([self.gone])
        self.alien = elsewhere()
        self.index = CacheIndex(self.cache, "lru", 4)
        self.index.put("kept", self.owned)
        self.index.put("pinned", self.pinned)
        self.index.pin("pinned")
        self.batch = self.cache.open([self.one, self.two], 3)
        for layer in range(2):
            self.batch.update(layer, STEP, STEP)
        self.mark = self.cache.mark()
        self.manager: KVCacheManager | None = None

    def managed(self) -> KVCacheManager:
        """A manager with an entry of its own."""
        self.manager = KVCacheManager(self.cache, 3)
        (seq,) = self.cache.new()
        self.manager.set_recur_cache("old", seq)
        return self.manager

    def indexes(self) -> list[CacheIndex]:
        return [self.index, *(self.manager.pools if self.manager else ())]

    def state(self) -> dict[str, Any]:
        """All that can be seen from outside, and the free stack."""
        found = books(self.cache.books)
        live = self.cache.live()
        gathered = self.cache.gather(live)
        found["contents"] = [
            part.tolist() for part in (gathered.keys, gathered.values, gathered.positions)
        ]
        found["listeners"] = list(self.cache.turns.listeners)
        found["reclaimer"] = self.cache.reclaimer
        found["batch"] = self.batch.closed, [layer.size for layer in self.batch.layers]
        if not self.batch.closed:
            found["batch contents"] = [
                part.tolist() for layer in range(2) for part in self.batch.get(layer)
            ]
        found["indexes"] = [indexed(index) for index in self.indexes()]
        return found

    def check(self) -> None:
        self.cache.check()
        for index in self.indexes():
            index.check()


def indexed(index: CacheIndex) -> list[Any]:
    entries = [
        (e.key, e.handle, e.pins, e.priority, e.added, e.used)
        for e in index.entries.by_key.values()
    ]
    return [entries, index.victims(), index.stats]


@cache
def other_cache() -> PagedKVCache:
    return PagedKVCache(**OPTIONS)


@cache
def elsewhere() -> int:
    """A sequence of another cache."""
    return other_cache().new(1)[0]


@cache
def other_index() -> CacheIndex:
    index = CacheIndex(other_cache())
    index.put("elsewhere", other_cache().new(1)[0])
    return index


def halfway(*items: object) -> Iterator[object]:
    yield from items
    raise Boom


def nested(tensors: list[torch.Tensor]) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it may change
        return torch.nested.nested_tensor(tensors)


def jagged(tensors: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor([*tensors], layout=torch.jagged)


Maker = Callable[[Scene], Any]

PLAIN: dict[str, Any] = {
    "None": None,
    "True": True,
    "False": False,
    "np.True_": np.True_,
    "torch.tensor(True)": torch.tensor(True),
    '""': "",
    '"x"': "x",
    '"kept"': "kept",
    '"left"': "left",
    '"lru"': "lru",
    '"cpu"': "cpu",
    '"meta"': "meta",
    '"cuda:99"': "cuda:99",
    '"float32"': "float32",
    'b""': b"",
    'b"x"': b"x",
    "bytearray": bytearray(b"x"),
    "memoryview": memoryview(b"xy"),
    "{}": {},
    "{1: 2}": {1: 2},
    "set()": set(),
    "{1}": {1},
    "object()": object(),
    "...": ...,
    "0.0": 0.0,
    "1.0": 1.0,
    "96.0": 96.0,
    "nan": float("nan"),
    "inf": float("inf"),
    "np.float64(2.0)": np.float64(2.0),
    "np.float32(nan)": np.float32("nan"),
    "torch.tensor(2.0)": torch.tensor(2.0),
    "torch.tensor(nan)": torch.tensor(float("nan")),
    "complex(1)": complex(1),
    "Fraction(1)": Fraction(1),
    "Decimal(1)": Decimal(1),
    "Decimal(nan)": Decimal("nan"),
    "Decimal(sNaN)": Decimal("sNaN"),
    "np.timedelta64(1)": np.timedelta64(1, "ns"),
    "np.datetime64(NaT)": np.datetime64("NaT", "ns"),
    "0": 0,
    "1": 1,
    "-1": -1,
    "2**63": 2**63,
    "10**30": 10**30,
    "-10**30": -(10**30),
    "10**5000": 10**5000,
    "np.int8(-1)": np.int8(-1),
    "np.int64(1)": np.int64(1),
    "np.uint8(1)": np.uint8(1),
    "np.array(1)": np.array(1),
    "torch.tensor(1)": torch.tensor(1),
    "Whole.ONE": Whole.ONE,
    "Index(1)": Index(1),
    "[]": [],
    "()": (),
    "[None]": [None],
    "[None, None]": [None, None],
    '["a"]': ["a"],
    '["a", "b"]': ["a", "b"],
    "[1]": [1],
    "[1.5]": [1.5],
    "[1.0, 1.0]": [1.0, 1.0],
    "[[1]]": [[1]],
    "[True]": [True],
    "[True, True]": [True, True],
    "[-1, -1]": [-1, -1],
    "[{}, {}]": [{}, {}],
    "[1, 1]": [1, 1],
    "(1, 1)": (1, 1),
    "range(1, 3)": range(1, 3),
    "(nan,)": (float("nan"),),
    "(tensor,)": (torch.tensor(1),),
    "([1],)": ([1],),
    "frozenset({nan})": frozenset({float("nan")}),
    "array.array(1, 1)": array.array("q", [1, 1]),
    "np.array([])": np.array([]),
    "np.array([1, 1])": np.array([1, 1]),
    "np.array([1.0, 1.0])": np.array([1.0, 1.0]),
    "np.array([True, True])": np.array([True, True]),
    "np.array([[1]])": np.array([[1]]),
    "np.array([1, None])": np.array([1, None]),
    "np.array(timedelta64)": np.array([1, 1], dtype="m8[ns]"),
    "torch.tensor([])": torch.tensor([]),
    "torch.tensor([1])": torch.tensor([1]),
    "torch.tensor([1, 1])": torch.tensor([1, 1]),
    "torch.tensor([1.0, 1.0])": torch.tensor([1.0, 1.0]),
    "torch.tensor([[1, 1]])": torch.tensor([[1, 1]]),
    "a meta tensor": torch.zeros(2, dtype=torch.int64, device="meta"),
    "a meta number": torch.zeros((), dtype=torch.int64, device="meta"),
    "[meta numbers]": [torch.zeros((), dtype=torch.int64, device="meta")] * 2,
    "a sparse tensor": torch.tensor([1, 1]).to_sparse(),
    "a nested tensor": nested([torch.zeros(2), torch.zeros(3)]),
    "a class": Anything,
    "torch.Tensor": torch.Tensor,
    "a lambda": lambda *_: None,
    "a lambda of two": lambda one, two: None,
    "__index__ raises": NoIndex(),
    "__index__ raises TypeError": WrongIndex(),
    "[__index__ raises]": [NoIndex(), NoIndex()],
    "[__index__ raises TypeError]": [WrongIndex(), WrongIndex()],
    "__hash__ raises": NoHash(),
    "__eq__ raises": NoEq(),
    "__repr__ raises": NoRepr(),
    "[__repr__ raises]": [NoRepr(), NoRepr()],
    "torch.float16": torch.float16,
    "torch.int64": torch.int64,
    "torch.float8_e4m3fn": torch.float8_e4m3fn,
    "torch.complex64": torch.complex64,
    "np.float32": np.float32,
    "np.dtype(float32)": np.dtype("float32"),
    "torch.device(cpu)": torch.device("cpu"),
    "torch.device(meta)": torch.device("meta"),
    "[right tensor]": [KV],
    "LRU": LRU,
    "LRU()": LRU(),
}
OF_SCENE: dict[str, Maker] = {
    "one": lambda s: s.one,
    "str(one)": lambda s: str(s.one),
    "float(one)": lambda s: float(s.one),
    "np.int64(one)": lambda s: np.int64(s.one),
    "np.array(one)": lambda s: np.array(s.one),
    "torch.tensor(one)": lambda s: torch.tensor(s.one),
    "torch.tensor([one])": lambda s: torch.tensor([s.one]),
    "Index(one)": lambda s: Index(s.one),
    "stale": lambda s: s.gone,
    "alien": lambda s: s.alien,
    "owned": lambda s: s.owned,
    "pinned": lambda s: s.pinned,
    "[one]": lambda s: [s.one],
    "[one, two]": lambda s: [s.one, s.two],
    "(one, two)": lambda s: (s.one, s.two),
    "{one, two}": lambda s: {s.one, s.two},
    "frozenset({one, two})": lambda s: frozenset({s.one, s.two}),
    "{one: 1, two: 2}": lambda s: {s.one: 1, s.two: 2},
    "{one: 1, two: 2}.keys()": lambda s: {s.one: 1, s.two: 2}.keys(),
    "iter([one, two])": lambda s: iter([s.one, s.two]),
    "a generator": lambda s: (seq for seq in (s.one, s.two)),
    "an empty generator": lambda s: (seq for seq in ()),
    "an iterator that raises": lambda s: halfway(s.one),
    "an iterator of numbers that raises": lambda s: halfway(1, 1),
    "np.array([one, two])": lambda s: np.array([s.one, s.two]),
    "np.array([one, two], object)": lambda s: np.array([s.one, s.two], dtype=object),
    "torch.tensor([one, two])": lambda s: torch.tensor([s.one, s.two]),
    "[np.int64(one), torch.tensor(two)]": lambda s: [np.int64(s.one), torch.tensor(s.two)],
    "[Index(one), Index(two)]": lambda s: [Index(s.one), Index(s.two)],
    "[one, one]": lambda s: [s.one, s.one],
    "[one, stale]": lambda s: [s.one, s.gone],
    "[one, alien]": lambda s: [s.one, s.alien],
    "[one, owned]": lambda s: [s.one, s.owned],
    "[one, pinned]": lambda s: [s.one, s.pinned],
    '[one, "a"]': lambda s: [s.one, "a"],
    "[one, None]": lambda s: [s.one, None],
    "[float(one), float(two)]": lambda s: [float(s.one), float(s.two)],
    "np.array(floats of handles)": lambda s: np.array([s.one, s.two], dtype=np.float64),
    "[str(one), str(two)]": lambda s: [str(s.one), str(s.two)],
    "[[one, two]]": lambda s: [[s.one, s.two]],
    "the cache": lambda s: s.cache,
    "the class of the cache": lambda s: PagedKVCache,
    "another cache": lambda s: other_cache(),
    "the index": lambda s: s.index,
    "the class of the index": lambda s: CacheIndex,
    "another index": lambda s: other_index(),
    "the batch": lambda s: s.batch,
    "a batch of another cache": lambda s: other_cache().open([elsewhere(), elsewhere()], 1),
    "the mark": lambda s: s.mark,
    "a mark of another cache": lambda s: other_cache().mark(),
    "a mark to come": lambda s: (s.mark[0] + 1, s.mark[1]),
    "a list as mark": lambda s: list(s.mark),
}
VALUES: dict[str, Maker] = {
    **{name: lambda _, value=value: value for name, value in PLAIN.items()},
    **OF_SCENE,
}
OWN = {name for name in VALUES if "raises" in name}  # may raise an error of their own

# Tensors, made of the one that is right.
TENSORS: dict[str, Callable[[torch.Tensor], Any]] = {
    "right": lambda t: t,
    "not contiguous": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda t: t[..., :1, :1].expand(t.shape),
    "NaN": lambda t: t * float("nan"),
    "Parameter": lambda t: torch.nn.Parameter(t.clone()),
    "requires_grad": lambda t: t.clone().requires_grad_(),
    "made with grad": lambda t: t.clone().requires_grad_() * 2,
    "inference": lambda t: inference(t),
    "float64": lambda t: t.double(),
    "bfloat16": lambda t: t.bfloat16(),
    "int64": lambda t: t.long(),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "nested": lambda t: nested([*t]),
    **({"jagged": jagged} if hasattr(torch, "jagged") else {}),  # not before torch 2.2
    "a row less": lambda t: t[:-1],
    "a token more": lambda t: torch.cat([t, t[..., :1, :]], -2),
    "wider": lambda t: torch.cat([t, t], -1),
    "one dimension less": lambda t: t[0],
    "one dimension more": lambda t: t[None],
    "flat": lambda t: t.reshape(-1),
    "transposed": lambda t: t.transpose(-1, -3),
    "0-d": lambda t: t.sum(),
    "empty": lambda t: t[:0],
    "numpy": lambda t: t.numpy(),
    "list": lambda t: t.tolist(),
    "a list of one": lambda t: [t],
    "a tuple of two": lambda t: (t, t),
}
POSITIONS: dict[str, Callable[[torch.Tensor], Any]] = {
    "right": lambda t: t,
    "numpy": lambda t: t.numpy(),
    "negative": lambda t: -t - 1,
    "not contiguous": lambda t: t.t().contiguous().t(),
    "expanded": lambda t: t[:, :1].expand(t.shape),
    "int32": lambda t: t.int(),
    "uint8": lambda t: t.byte(),
    "float32": lambda t: t.float(),
    "bool": lambda t: t.bool(),
    "numpy int32": lambda t: t.int().numpy(),
    "numpy float": lambda t: t.double().numpy(),
    "numpy object": lambda t: t.numpy().astype(object),
    "numpy big-endian": lambda t: t.numpy().astype(">i8"),
    "numpy timedelta": lambda t: t.numpy().astype("m8[ns]"),
    "numpy text": lambda t: t.numpy().astype(str),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "nested": lambda t: nested([*t]),
    "flat": lambda t: t.reshape(-1),
    "a row less": lambda t: t[:-1],
    "a token more": lambda t: torch.cat([t, t[:, :1]], 1),
    "0-d": lambda t: t.sum(),
    "list": lambda t: t.tolist(),
    "a list of one": lambda t: [t],
    "a tuple of two": lambda t: (t, t),
}


def inference(tensor: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return tensor.clone()

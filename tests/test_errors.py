"""One test for each message: it quotes what was given and what was allowed, and nothing changed."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from paged_kv import PagedKVCache, PagedKVError, errors

MIXED = torch.float64


def made(**options: Any) -> PagedKVCache:
    return PagedKVCache(
        **{"layers": 2, "heads": 3, "head_size": 4, "page_size": 2, "num_pages": 4, "grow": False, **options}
    )


class Scene:
    """A full cache of two sequences, an open batch, and tensors that fit."""

    def __init__(self, device: str) -> None:
        self.cache = made(device=device)
        self.one, self.two = self.cache.new(2)
        self.kv = torch.ones(2, 2, 3, 4, 4, device=device)
        self.cache.append([self.one, self.two], self.kv, self.kv)
        (self.gone,) = self.cache.fork([self.one])
        self.cache.release([self.gone])
        self.batch = self.cache.open([self.one, self.two], 2)
        self.step = torch.ones(2, 3, 1, 4, device=device)

    def update(self, keys: torch.Tensor, values: torch.Tensor | None = None, layer: int = 0) -> None:
        self.batch.update(layer, keys, keys if values is None else values)

    def commit(self, **options: Any) -> None:
        for layer in range(2):
            self.update(self.step, layer=layer)
        try:
            self.batch.commit(**options)
        finally:
            for layer in self.batch.layers:
                layer.size = 4

    def state(self) -> list[Any]:
        cache, tables = self.cache, self.cache._tables
        contents = [part.tolist() for part in cache.gather([self.one, self.two])]
        bookkeeping = [
            repr(vars(tables)),
            cache._pages.refs[:],
            cache._pages.free[:],
            repr(cache.stats),
            [layer.size for layer in self.batch.layers],
        ]
        return [contents, bookkeeping, cache.pages_reserved, cache.live_sequences]


Case = tuple[type[PagedKVError], str, Callable[[Scene], Any]]
COUNT, SHAPE, DTYPE, DEVICE = errors.BadCount, errors.BadShape, errors.BadDtype, errors.BadDevice
CASES: dict[str, Case] = {
    "out of pages": (
        errors.OutOfPages,
        "2 pages requested, 0 free, 0 pinned: release sequences",
        lambda s: s.cache.append([s.one, s.two], s.kv[:, :, :, :1], s.kv[:, :, :, :1]),
    ),
    "less of another shape": (
        SHAPE,
        "less has shape (4, 1, 3, 2, 4), expected (4, 2, 3, 1, 4)",
        lambda s: s.commit(less=[torch.zeros(4, 1, 3, 2, 4)]),
    ),
    "less for another number of planes": (
        COUNT,
        "less (one a plane) is 2, allowed is 1 tensors",
        lambda s: s.commit(less=[torch.zeros(1)] * 2),
    ),
    "less of rewritten rows": (
        COUNT,
        "less is 'given', allowed is None where rows are rewritten",
        lambda s: s.commit(less=[torch.zeros(1)], rewrite=[0, 0]),
    ),
    "commit out of pages": (errors.OutOfPages, "2 pages requested, 0 free", lambda s: s.commit()),
    "stale": (
        errors.StaleHandle,
        "was released: its handle can no longer be used",
        lambda s: s.cache.fork([s.one, s.gone]),
    ),
    "double release": (errors.StaleHandle, "was released", lambda s: s.cache.release([s.one, s.gone])),
    "foreign": (
        errors.ForeignHandle,
        "7 is not a sequence of this cache: use the handles",
        lambda s: s.cache.lengths([s.one, 7]),
    ),
    "no handle": (errors.ForeignHandle, "'a' is not a sequence", lambda s: s.cache.release(["a"])),  # type: ignore[list-item]
    "other cache": (errors.ForeignHandle, "is not a sequence of this cache", lambda s: s.cache.fork(made().new(1))),
    "nested list": (errors.ForeignHandle, "is not a sequence", lambda s: s.cache.fork([[s.one]])),  # type: ignore[list-item]
    "release twice in a call": (
        errors.DuplicateSequence,
        "stands twice in one batch",
        lambda s: s.cache.release([s.one, s.one]),
    ),
    "append twice in a call": (
        errors.DuplicateSequence,
        "fork it first, or name it once",
        lambda s: s.cache.append([s.one, s.one], s.kv, s.kv),
    ),
    "freed twice in a call": (errors.DuplicateSequence, "twice", lambda s: s.cache.pages_freed_by([s.one, s.one])),
    "negative new": (COUNT, "count is -1, allowed is an int >= 0", lambda s: s.cache.new(-1)),
    "start": (COUNT, "start is 2, allowed is an int from 0 to 1", lambda s: s.cache.new(1, start=2)),
    "slide too far": (
        COUNT,
        "slide is 5, allowed is an int from 0 to 4",
        lambda s: s.cache.slide([s.one, s.two], [4, 5]),
    ),
    "slide all too far": (COUNT, "slide is 5, allowed is an int from 0 to 4", lambda s: s.cache.slide([s.one], 5)),
    "slide back": (COUNT, "slide is -1, allowed is an int from 0 to 4", lambda s: s.cache.slide([s.one], -1)),
    "truncate too far": (COUNT, "count is 5, allowed is an int from 0 to 4", lambda s: s.cache.truncate([s.one], 5)),
    "fork past the end": (COUNT, "at is 5, allowed is an int from 0 to 4", lambda s: s.cache.fork([s.one], at=5)),
    "fork before the start": (
        COUNT,
        "at is -1, allowed is an int from 0 to 4",
        lambda s: s.cache.fork([s.one], at=[-1]),
    ),
    "too few counts": (
        COUNT,
        r"count (one a sequence) is [1], allowed is 2 numbers",
        lambda s: s.cache.truncate([s.one, s.two], [1]),
    ),
    "float count": (COUNT, "count is 1.0, allowed is an int from 0 to 4", lambda s: s.cache.truncate([s.one], 1.0)),  # type: ignore[arg-type]
    "bool count": (COUNT, "count is True", lambda s: s.cache.truncate([s.one], True)),
    "numpy count": (COUNT, "allowed is an int from 0 to 4", lambda s: s.cache.slide([s.one], np.int64(1))),  # type: ignore[arg-type]
    "needed": (COUNT, "count is -2, allowed is an int >= 0", lambda s: s.cache.pages_needed([s.one], -2)),
    "room": (COUNT, "room is -1, allowed is an int >= 0", lambda s: s.cache.open([s.one], -1)),
    "pad": (
        COUNT,
        """pad is 'middle', allowed is "left" or "right\"""",
        lambda s: s.cache.open([s.one], 1, pad="middle"),
    ),
    "pad of gather": (COUNT, "pad is 'up'", lambda s: s.cache.gather([s.one], pad="up")),
    "room used up": (
        COUNT,
        "new tokens is 3, allowed is 0 to the room of 2",
        lambda s: s.update(s.step.expand(2, 3, 3, 4)),
    ),
    "layer": (COUNT, "layer is 2, allowed is an int from 0 to 1", lambda s: s.update(s.step, layer=2)),
    "layer to read": (COUNT, "layer is 9, allowed is an int from 0 to 1", lambda s: s.batch.keys(9)),
    "commit slides too far": (COUNT, "slide is 5, allowed is an int from 0 to 4", lambda s: s.commit(slide=5)),
    "too few rewrites": (
        COUNT,
        "rewrite (one a row) is [None], allowed is 2 columns or None",
        lambda s: s.commit(rewrite=[None]),
    ),
    "rewrite": (COUNT, "rewrite is 6, allowed is an int from 0 to 5", lambda s: s.commit(rewrite=[None, 6])),
    "keys shape": (
        SHAPE,
        "keys has shape (2, 2, 3, 4, 2), expected (2, 2, 3, 4, 4)",
        lambda s: s.cache.append([s.one, s.two], s.kv[..., :2], s.kv),
    ),
    "values shape": (
        SHAPE,
        "values has shape (2, 2, 3, 3, 4), expected (2, 2, 3, 4, 4)",
        lambda s: s.cache.append([s.one, s.two], s.kv, s.kv[:, :, :, :3]),
    ),
    "head count": (
        SHAPE,
        "keys has shape (2, 2, 1, 4, 4), expected (2, 2, 3, 4, 4)",
        lambda s: s.cache.append([s.one, s.two], s.kv[:, :, :1], s.kv),
    ),
    "batch size": (
        SHAPE,
        "keys has shape (2, 2, 3, 4, 4), expected (2, 1, 3, 4, 4)",
        lambda s: s.cache.append([s.one], s.kv, s.kv),
    ),
    "too few dimensions": (
        SHAPE,
        "keys has shape (2,), expected",
        lambda s: s.cache.append([s.one], torch.ones(2), s.kv),
    ),
    "positions shape": (
        SHAPE,
        "positions has shape (2,), expected (2, 4)",
        lambda s: s.cache.append([s.one, s.two], s.kv, s.kv, torch.zeros(2, dtype=torch.int64)),
    ),
    "update shape": (
        SHAPE,
        "keys has shape (2, 1, 1, 4), expected (2, 3, 1, 4)",
        lambda s: s.update(s.step[:, :1], s.step),
    ),
    "update values shape": (
        SHAPE,
        "values has shape (2, 3, 2, 4), expected (2, 3, 1, 4)",
        lambda s: s.update(s.step, s.step.repeat(1, 1, 2, 1)),
    ),
    "update dimensions": (SHAPE, "keys has shape (), expected", lambda s: s.update(torch.tensor(1.0))),
    "commit positions": (
        SHAPE,
        "positions has shape (2, 2), expected (2, 1)",
        lambda s: s.commit(positions=np.zeros((2, 2), dtype=np.int64)),
    ),
    "keys dtype": (
        DTYPE,
        "keys has dtype torch.float64, expected torch.float32",
        lambda s: s.cache.append([s.one, s.two], s.kv.to(MIXED), s.kv),
    ),
    "values dtype": (
        DTYPE,
        "values has dtype torch.float64, expected torch.float32",
        lambda s: s.cache.append([s.one, s.two], s.kv, s.kv.to(MIXED)),
    ),
    "positions dtype": (
        DTYPE,
        "positions has dtype torch.float32, expected int64",
        lambda s: s.cache.append([s.one, s.two], s.kv, s.kv, torch.zeros(2, 4)),
    ),
    "update dtype": (
        DTYPE,
        "keys has dtype torch.float64, expected torch.float32",
        lambda s: s.update(s.step.to(MIXED)),
    ),
    "update values dtype": (DTYPE, "values has dtype torch.float64", lambda s: s.update(s.step, s.step.to(MIXED))),
    "device": (
        DEVICE,
        "keys is on device meta, expected",
        lambda s: s.cache.append([s.one, s.two], s.kv.to("meta"), s.kv),
    ),
    "update device": (DEVICE, "values is on device meta, expected", lambda s: s.update(s.step, s.step.to("meta"))),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_named_and_changes_nothing(device: str, name: str) -> None:
    kind, message, call = CASES[name]
    scene = Scene(device)
    before = scene.state()
    with pytest.raises(kind, match=re.escape(message)) as caught:
        call(scene)
    assert isinstance(caught.value, ValueError | RuntimeError)
    assert scene.state() == before
    scene.cache.check()
    scene.cache.release([scene.two])
    assert scene.cache.pages_free == 2


OPTIONS: dict[str, tuple[type[PagedKVError], str, dict[str, Any]]] = {
    "layers": (COUNT, "layers is 0, allowed is an int >= 1", {"layers": 0}),
    "heads": (COUNT, "heads is -1, allowed is an int >= 1", {"heads": -1}),
    "head size": (COUNT, "head_size is 1.5, allowed is an int >= 1", {"head_size": 1.5}),
    "value head size": (COUNT, "value_head_size is 0, allowed is an int >= 1", {"value_head_size": 0}),
    "page size": (COUNT, "page_size is 0, allowed is an int >= 1", {"page_size": 0}),
    "pages": (COUNT, "num_pages is 0, allowed is an int >= 1", {"num_pages": 0}),
    "page limit": (COUNT, "max_pages is 3, allowed is an int >= 4", {"max_pages": 3}),
    "growing page limit": (COUNT, "max_pages is 3, allowed is an int >= 4", {"max_pages": 3, "grow": True}),
    "byte limit": (COUNT, "max_bytes is 9, allowed is >= num_pages * page_bytes = 1536", {"max_bytes": 9}),
    "dtype": (DTYPE, "the cache has dtype torch.int64, expected a floating point dtype", {"dtype": torch.int64}),
    "no dtype": (DTYPE, "the cache has dtype float32, expected a floating point dtype", {"dtype": "float32"}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_cache_that_cannot_be_is_refused(name: str) -> None:
    kind, message, options = OPTIONS[name]
    with pytest.raises(kind, match=re.escape(message)):
        made(**options)


def test_rewrite_needs_left_padding(device: str) -> None:
    scene = Scene(device)
    scene.batch = scene.cache.open([scene.one, scene.two], 2, pad="right")
    before = scene.state()
    with pytest.raises(
        COUNT, match=re.escape("""rewrite is [0, None], allowed is None in a batch opened with pad="right\"""")
    ):
        scene.commit(rewrite=[0, None])
    assert scene.state() == before


def test_errors_carry_their_data() -> None:
    out = errors.OutOfPages(3, 1, 2)
    assert (out.requested, out.free, out.pinned) == (3, 1, 2)
    bad = errors.BadCount("at", 5, "an int")
    assert (bad.name, bad.value, bad.allowed) == ("at", 5, "an int")
    shape = errors.BadShape("keys", (1,), (2,))
    assert (shape.name, shape.got, shape.expected) == ("keys", (1,), (2,))
    assert (errors.BadDtype("k", 1, 2).got, errors.BadDevice("k", 1, 2).expected) == (1, 2)
    assert errors.ForeignHandle("x").handle == "x"
    assert errors.StaleHandle(16).handle == errors.DuplicateSequence(16).handle == 16
    assert errors.ParentChanged([1]).parents == [1]


@pytest.mark.parametrize("kind", [kind for kind in vars(errors).values() if isinstance(kind, type)])
def test_every_error_is_one_of_this_package_and_a_builtin_one(kind: type) -> None:
    if issubclass(kind, Exception) and kind is not PagedKVError:
        assert issubclass(kind, PagedKVError)
        assert issubclass(kind, ValueError) != issubclass(kind, RuntimeError)
        assert kind.__doc__


class Slow:
    """Holds a cache inside a call until another thread had its try."""

    def __init__(self, cache: PagedKVCache, monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> None:
        self.caught: list[BaseException] = []
        real = cache._storage.gather

        def gather(*args: Any) -> None:
            thread = threading.Thread(target=self.run, args=(call,))
            thread.start()
            thread.join()
            real(*args)

        monkeypatch.setattr(cache._storage, "gather", gather)

    def run(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except BaseException as error:
            self.caught.append(error)


@pytest.mark.parametrize("name", ["new", "fork", "release", "gather", "check", "commit"])
def test_a_second_thread_is_refused(device: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(device)
    cache, before = scene.cache, scene.state()
    calls: dict[str, Callable[[], Any]] = {
        "new": cache.new,
        "fork": lambda: cache.fork([scene.one]),
        "release": lambda: cache.release([scene.one]),
        "gather": lambda: cache.gather([scene.one]),
        "check": cache.check,
        "commit": scene.batch.commit,
    }
    slow = Slow(cache, monkeypatch, calls[name])
    cache.gather([scene.one])
    monkeypatch.undo()
    (error,) = slow.caught
    assert isinstance(error, errors.ConcurrentCall)
    assert str(error).startswith(f"{name}() was called from a second thread while a call is running")
    assert scene.state() == before
    other = threading.Thread(target=cache.check)  # one after the other is fine
    other.start()
    other.join()


def test_the_same_thread_may_nest_calls(device: str) -> None:
    scene = Scene(device)
    seen: list[int] = []
    scene.cache.slide([scene.one], 1)
    scene.cache.open([scene.one], 1, rebase=lambda batch: seen.extend(scene.cache.lengths(batch.parents)))
    assert seen == [3]

"""Mistakes that callers make with sequences, counts, keys and entries, and what each raises."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from small_caches import state

from paged_kv import CacheIndex, PagedKVCache, PagedKVError, errors

MIXED = torch.float64


def made(**options: Any) -> PagedKVCache:
    return PagedKVCache(
        **{
            "layers": 2,
            "heads": 3,
            "head_size": 4,
            "page_size": 2,
            "num_pages": 4,
            "grow": False,
            **options,
        }
    )


class Scene:
    """A full cache of two sequences, an open step, tensors that fit, and an index of two entries,
    one pinned.
    """

    def __init__(self, device: str) -> None:
        self.cache = made(device=device, num_pages=6)
        self.one, self.two = self.cache.new(2)
        self.kv = torch.ones(2, 2, 3, 4, 4, device=device)
        self.cache.append([self.one, self.two], self.kv, self.kv)
        (self.gone,) = self.cache.fork([self.one])
        self.cache.release([self.gone])
        self.index = CacheIndex(self.cache)
        family = self.cache.fork([self.two, self.one, self.one], at=0)
        self.owned, self.pinned, self.beside = family
        self.index.put_batch(["k", "p"], [self.owned, self.pinned])
        self.index.pin("p")
        self.batch = self.cache.open([self.one, self.two], 2)
        self.step = torch.ones(2, 3, 1, 4, device=device)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor | None = None, layer: int = 0
    ) -> None:
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
        contents = [part.tolist() for part in self.cache.gather([self.one, self.two])]
        filled = [layer.size for layer in self.batch.layers]
        return [contents, filled, self.batch.closed, state(self.index)]


Case = tuple[type[PagedKVError], str, Callable[[Scene], Any]]
ARGUMENT = errors.BadArgument
COUNT = errors.BadCount
SHAPE = errors.BadShape
DTYPE = errors.BadDtype
DEVICE = errors.BadDevice
MISTAKES: dict[str, Case] = {
    "out of pages": (
        errors.OutOfPages,
        "2 pages requested, 0 free, 0 pinned, 2 held by open steps: release sequences, close steps",
        lambda s: s.cache.append([s.one, s.two], s.kv[:, :, :, :1], s.kv[:, :, :, :1]),
    ),
    "open out of pages": (
        errors.OutOfPages,
        "1 pages requested, 0 free, 0 pinned, 2 held by open steps",
        lambda s: s.cache.open([s.one], 1),
    ),
    "stale": (
        errors.StaleHandle,
        "was released: its handle can no longer be used",
        lambda s: s.cache.fork([s.one, s.gone]),
    ),
    "double release": (
        errors.StaleHandle,
        "was released",
        lambda s: s.cache.release([s.one, s.gone]),
    ),
    "foreign": (
        errors.ForeignHandle,
        "7 is not a sequence of this cache: use the handles",
        lambda s: s.cache.lengths([s.one, 7]),
    ),
    "no handle": (errors.ForeignHandle, "'a' is not a sequence", lambda s: s.cache.release(["a"])),
    "other cache": (
        errors.ForeignHandle,
        "is not a sequence of this cache",
        lambda s: s.cache.fork(made().new(1)),
    ),
    "nested list": (errors.ForeignHandle, "is not a sequence", lambda s: s.cache.fork([[s.one]])),
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
    "freed twice in a call": (
        errors.DuplicateSequence,
        "twice",
        lambda s: s.cache.pages_freed_by([s.one, s.one]),
    ),
    "negative new": (COUNT, "count is -1, allowed is an int >= 0", lambda s: s.cache.new(-1)),
    "start": (
        COUNT,
        "start is 2, allowed is an int from 0 to 1",
        lambda s: s.cache.new(1, start=2),
    ),
    "slide too far": (
        COUNT,
        "slide is 5, allowed is an int from 0 to 4",
        lambda s: s.cache.slide([s.one, s.two], [4, 5]),
    ),
    "slide all too far": (
        COUNT,
        "slide is 5, allowed is an int from 0 to 4",
        lambda s: s.cache.slide([s.one], 5),
    ),
    "slide back": (
        COUNT,
        "slide is -1, allowed is an int from 0 to 4",
        lambda s: s.cache.slide([s.one], -1),
    ),
    "truncate too far": (
        COUNT,
        "count is 5, allowed is an int from 0 to 4",
        lambda s: s.cache.truncate([s.one], 5),
    ),
    "fork past the end": (
        COUNT,
        "at is 5, allowed is an int from 0 to 4",
        lambda s: s.cache.fork([s.one], at=5),
    ),
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
    "float count": (
        COUNT,
        "count is 1.0, allowed is an int from 0 to 4",
        lambda s: s.cache.truncate([s.one], 1.0),
    ),  # type: ignore[arg-type]
    "bool count": (COUNT, "count is True", lambda s: s.cache.truncate([s.one], True)),
    "needed": (
        COUNT,
        "count is -2, allowed is an int >= 0",
        lambda s: s.cache.pages_needed([s.one], -2),
    ),
    "rebase": (
        ARGUMENT,
        "rebase is 3, allowed is None or a function of the step",
        lambda s: s.cache.open([s.one], 1, rebase=3),
    ),
    "missing_ok": (
        ARGUMENT,
        "missing_ok is 1, allowed is True or False",
        lambda s: s.cache.release([s.gone], missing_ok=1),
    ),
    "missing_ok of a foreign one": (
        errors.ForeignHandle,
        "7 is not a sequence",
        lambda s: s.cache.release([s.one, 7], missing_ok=True),
    ),
    "root": (
        ARGUMENT,
        "root is 1, allowed is True or False",
        lambda s: s.cache.fork([s.one], root=1),
    ),
    "reuse": (
        ARGUMENT,
        "reuse is None, allowed is True or False",
        lambda s: s.cache.gather([s.one], reuse=None),
    ),
    "parent of one that is gone": (
        errors.StaleHandle,
        "was released",
        lambda s: s.cache.parent(s.gone),
    ),
    "children of nothing": (
        errors.ForeignHandle,
        "'a' is not a sequence",
        lambda s: s.cache.children("a"),
    ),
    "fork of a dry run": (
        ARGUMENT,
        "fork is None, allowed is True or False",
        lambda s: s.cache.pages_needed([s.one], 1, fork=None),
    ),
    "one sequence for a list": (
        ARGUMENT,
        "allowed is a list of sequences",
        lambda s: s.cache.lengths(s.one),
    ),
    "text for a list": (
        ARGUMENT,
        "parents is 'ab', allowed is a list of sequences",
        lambda s: s.cache.fork("ab"),
    ),
    "a key that cannot be hashed": (
        errors.BadKey,
        "['k'] is no key: it cannot be hashed",
        lambda s: s.index.get(["k"]),
    ),
    "a key that equals nothing": (
        errors.BadKey,
        "nan is no key: NaN equals nothing",
        lambda s: s.index.put((0, float("nan")), s.one),
    ),
    "append to an entry": (
        errors.OwnedSequence,
        "belongs to an index, under key 'k': fork() it to change it, remove() the key to end it",
        lambda s: s.cache.append([s.one, s.owned], s.kv[:, :, :, :0], s.kv[:, :, :, :0]),
    ),
    "slide of an entry": (
        errors.OwnedSequence,
        "belongs to an index, under key 'k'",
        lambda s: s.cache.slide([s.one, s.owned], 0),
    ),
    "truncate of an entry": (
        errors.OwnedSequence,
        "belongs to an index, under key 'k'",
        lambda s: s.cache.truncate([s.owned], 0),
    ),
    "release of an entry": (
        errors.OwnedSequence,
        "belongs to an index, under key 'p'",
        lambda s: s.cache.release([s.one, s.pinned]),
    ),
    "promote beside a pinned entry": (
        errors.PinnedEntry,
        "the entry with key 'p' is pinned 1 times: unpin() it, or clear() the index",
        lambda s: s.cache.promote(s.beside),
    ),
    "end of a subtree with a pinned entry": (
        errors.PinnedEntry,
        "the entry with key 'p' is pinned 1 times",
        lambda s: s.cache.release_subtree(s.one),
    ),
    "copy of a cache": (
        errors.NotCopyable,
        "a PagedKVCache cannot be copied or pickled: its sequences would have two owners",
        lambda s: copy.copy(s.cache),
    ),
    "deepcopy of a list with a cache": (
        errors.NotCopyable,
        "a PagedKVCache cannot be copied or pickled",
        lambda s: copy.deepcopy([s.cache]),
    ),
    "unheard listener": (
        ARGUMENT,
        "allowed is one that listens",
        lambda s: s.cache.unlisten(print),
    ),
    "commit slides too far": (
        COUNT,
        "slide is 5, allowed is an int from 0 to 4",
        lambda s: s.commit(slide=5),
    ),
    "no moment": (
        ARGUMENT,
        "mark is 'now', allowed is what mark() of this cache returned",
        lambda s: s.cache.made_since("now"),
    ),
    "a moment to come": (
        ARGUMENT,
        "mark is (9, 0), allowed is what mark() of this cache returned",
        lambda s: s.cache.made_since((9, 0)),
    ),
}

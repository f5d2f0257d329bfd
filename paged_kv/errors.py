"""Every error that a caller can meet, with the data to act on it.

Caller mistakes quote the value and what was allowed, and are raised before anything changed.
"""

from __future__ import annotations

from typing import Any


class PagedKVError(Exception):
    """Base of all errors of this package."""


class OutOfPages(PagedKVError, RuntimeError):
    """The pool has no page left, cannot grow and nothing can be evicted.

    `requested`, `free` and `pinned` count pages.
    """

    def __init__(self, requested: int, free: int, pinned: int = 0) -> None:
        super().__init__(
            f"{requested} pages requested, {free} free, {pinned} pinned: release sequences, unpin entries, "
            "or raise max_pages / max_bytes"
        )
        self.requested, self.free, self.pinned = requested, free, pinned


class StaleHandle(PagedKVError, ValueError):
    """A sequence that was released, perhaps with its row in use by another one since."""

    def __init__(self, handle: int) -> None:
        super().__init__(f"sequence {handle:#x} was released: its handle can no longer be used")
        self.handle = handle


class ForeignHandle(PagedKVError, ValueError):
    """A value that this cache never handed out as a sequence."""

    def __init__(self, handle: object) -> None:
        super().__init__(f"{handle!r} is not a sequence of this cache: use the handles that new() and fork() return")
        self.handle = handle


class DuplicateSequence(PagedKVError, ValueError):
    """One sequence twice in a batch whose rows must differ."""

    def __init__(self, handle: int) -> None:
        super().__init__(f"sequence {handle:#x} stands twice in one batch: fork it first, or name it once")
        self.handle = handle


class BadCount(PagedKVError, ValueError):
    """A number out of its range."""

    def __init__(self, name: str, value: object, allowed: str) -> None:
        super().__init__(f"{name} is {value!r}, allowed is {allowed}")
        self.name, self.value, self.allowed = name, value, allowed


class BadShape(PagedKVError, ValueError):
    """A tensor of another shape than the cache holds."""

    def __init__(self, name: str, got: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
        super().__init__(f"{name} has shape {tuple(got)}, expected {tuple(expected)}")
        self.name, self.got, self.expected = name, tuple(got), tuple(expected)


class BadDtype(PagedKVError, ValueError):
    """A tensor of another dtype than the cache holds."""

    def __init__(self, name: str, got: object, expected: object) -> None:
        super().__init__(f"{name} has dtype {got}, expected {expected}")
        self.name, self.got, self.expected = name, got, expected


class BadDevice(PagedKVError, ValueError):
    """A tensor on another device than the cache."""

    def __init__(self, name: str, got: object, expected: object) -> None:
        super().__init__(f"{name} is on device {got}, expected {expected}")
        self.name, self.got, self.expected = name, got, expected


class ClosedBatch(PagedKVError, RuntimeError):
    """Use of a staging batch after commit(), close(), or a later open()."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}() on a closed staging batch: call open() again")


class ParentChanged(PagedKVError, RuntimeError):
    """A sequence of a staging batch that grew, slid or shrank between open() and commit()."""

    def __init__(self, parents: list[int]) -> None:
        names = ", ".join(f"{parent:#x}" for parent in parents)
        super().__init__(f"commit() of a batch whose parents ({names}) changed since open(): open() again")
        self.parents = parents


class ConcurrentCall(PagedKVError, RuntimeError):
    """A call from a second thread while another one is running."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}() was called from a second thread while a call is running: use one thread, or a lock")


class CorruptCache(PagedKVError, RuntimeError):
    """`check()` found a broken invariant: a bug of this package."""


class UnknownKey(PagedKVError, ValueError):
    """A key that the index does not hold."""

    def __init__(self, key: object, entries: int) -> None:
        super().__init__(f"no entry with key {key!r} among {entries} entries: get() and `in` ask without raising")
        self.key, self.entries = key, entries


class HandleInUse(PagedKVError, ValueError):
    """A sequence stored under a second key: an index owns its sequences, and would release this one twice."""

    def __init__(self, handle: int, key: object) -> None:
        super().__init__(f"sequence {handle:#x} is already stored under key {key!r}: fork it to store it twice")
        self.handle, self.key = handle, key


class NotPinned(PagedKVError, ValueError):
    """`unpin` of an entry that nobody pinned, or more often than it was pinned."""

    def __init__(self, key: object) -> None:
        super().__init__(f"the entry with key {key!r} is not pinned: unpin() undoes one pin()")
        self.key = key


class PinnedEntry(PagedKVError, ValueError):
    """`remove` of a pinned entry. `pins` counts the pins to undo."""

    def __init__(self, key: object, pins: int) -> None:
        super().__init__(f"the entry with key {key!r} is pinned {pins} times: unpin() it, or clear() the index")
        self.key, self.pins = key, pins


class CapacityExceeded(PagedKVError, RuntimeError):
    """An entry that does not fit beside the pinned ones. `unit` is "entries" or "bytes"; `pinned` counts entries."""

    def __init__(self, unit: str, needed: int, limit: int, pinned: int) -> None:
        super().__init__(
            f"the new entry and the {pinned} pinned ones need {needed} {unit}, allowed is {limit}: "
            f"unpin entries, or raise max_{unit}"
        )
        self.unit, self.needed, self.limit, self.pinned = unit, needed, limit, pinned


class UnknownPolicy(PagedKVError, ValueError):
    """An eviction policy that is neither a known name nor a fresh object with the four hooks."""

    def __init__(self, policy: object, allowed: str) -> None:
        super().__init__(f"eviction policy {policy!r} is not usable, allowed is {allowed}")
        self.policy, self.allowed = policy, allowed


class BadPriority(PagedKVError, ValueError):
    """A priority without a place in the order."""

    def __init__(self, priority: object) -> None:
        super().__init__(f"priority is {priority!r}, allowed is any real number except NaN, or None")
        self.priority = priority


class UnknownEnv(PagedKVError, ValueError):
    """An environment id out of range."""

    def __init__(self, env_id: object, count: int) -> None:
        super().__init__(f"environment id is {env_id!r}, allowed is an integer from 0 to {count - 1}")
        self.env_id, self.count = env_id, count


class UnsupportedVersion(PagedKVError, RuntimeError):
    """A package in a version whose internals an integration does not know."""

    def __init__(self, package: str, found: str, tested: tuple[str, ...]) -> None:
        super().__init__(f"{package} {found} is installed; this integration was tested with {', '.join(tested)} only")
        self.package, self.found, self.tested = package, found, tested


class BadConfig(PagedKVError, ValueError):
    """A configuration file that cannot be read, or is of another kind."""

    def __init__(self, path: object, reason: str) -> None:
        line = " ".join(reason.split())  # what others raise may have many lines
        super().__init__(f"cannot use {str(path)!r}: {line if len(line) <= 300 else line[:300] + '...'}")
        self.path, self.reason = path, reason


class UnannouncedNode(PagedKVError, RuntimeError):
    """A step of a search that did not say which nodes it starts from."""

    def __init__(self, rows: int, announced: int | None) -> None:
        super().__init__(
            f"a step of {rows} search nodes, of which {announced or 0} were announced: keys=\"node\" works within the "
            'search of UniZeroMCTSCtree and SampledUniZeroMCTSCtree, attach(..., keys="latent") with any caller'
        )
        self.rows, self.announced = rows, announced


class BadRecording(PagedKVError, ValueError):
    """A file that is no recording, or cannot be read."""

    def __init__(self, path: object, why: str) -> None:
        super().__init__(f"{str(path)!r} is not a recording that can be read: {why}")
        self.path, self.why = path, why


class AlreadyRecording(PagedKVError, RuntimeError):
    """A second recording of a cache that is being recorded."""

    def __init__(self, path: object) -> None:
        super().__init__(f"this cache is already being recorded, to {str(path)!r}: end that recording first")
        self.path = path


class NothingToRecord(PagedKVError, ValueError):
    """A target that has no paged cache."""

    def __init__(self, target: object) -> None:
        super().__init__(
            f"{type(target).__name__} has no paged cache to record, allowed is a PagedKVCache, a KVCacheManager, or a "
            "world model, model or policy that runs on pages"
        )
        self.target = target


class MissingPackage(PagedKVError, ImportError, RuntimeError):
    """Something that an optional part needs is not installed."""

    def __init__(self, what: str, needs: str, install: str) -> None:
        super().__init__(f"{what} needs {needs}: pip install {install}")
        self.what, self.needs = what, needs

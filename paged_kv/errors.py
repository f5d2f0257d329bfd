"""Every error that a caller can meet, with the data to act on it.

Caller mistakes quote the value and what was allowed, and are raised before anything changed.
"""

from __future__ import annotations

import pickle
from typing import Any


class PagedKVError(Exception):
    """Base of all errors of this package.

    They cross processes: what cannot be pickled of their data travels as text.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (
            type(self),
            str(self),
            {name: _sendable(value) for name, value in vars(self).items()},
        )


def _restored(kind: type[PagedKVError], message: str, data: dict[str, Any]) -> PagedKVError:
    error = kind.__new__(kind)
    error.args = (message,)
    vars(error).update(data)
    return error


def _sendable(value: Any) -> Any:
    try:
        pickle.dumps(value)
    except Exception:  # whatever a caller's own object raises
        return _told(value)
    return value


class OutOfPages(PagedKVError, RuntimeError):
    """The pool has no page left, cannot grow and nothing can be evicted.

    `requested`, `free`, `pinned` and `pending` (held by open steps) count pages.
    """

    def __init__(self, requested: int, free: int, pinned: int = 0, pending: int = 0) -> None:
        super().__init__(
            f"{requested} pages requested, {free} free, {pinned} pinned, {pending} held by open "
            "steps: release sequences, close steps, unpin entries, or raise max_pages / max_bytes"
        )
        self.requested = requested
        self.free = free
        self.pending = pending
        self.pinned = pinned


class StaleHandle(PagedKVError, ValueError):
    """A sequence that was released, perhaps with its row in use by another one since."""

    def __init__(self, handle: int) -> None:
        super().__init__(f"sequence {handle:#x} was released: its handle can no longer be used")
        self.handle = handle


class ForeignHandle(PagedKVError, ValueError):
    """A value that this cache never handed out as a sequence."""

    def __init__(self, handle: object) -> None:
        super().__init__(
            f"{_quoted(handle)} is not a sequence of this cache: use the handles that new() and "
            "fork() return"
        )
        self.handle = handle


class DuplicateSequence(PagedKVError, ValueError):
    """One sequence twice in a batch whose rows must differ."""

    def __init__(self, handle: int) -> None:
        super().__init__(
            f"sequence {handle:#x} stands twice in one batch: fork it first, or name it once"
        )
        self.handle = handle


class BadArgument(PagedKVError, ValueError):
    """A value of another kind than the call takes."""

    def __init__(self, name: str, value: object, allowed: str) -> None:
        super().__init__(f"{name} is {_quoted(value)}, allowed is {allowed}")
        self.name = name
        self.value = value
        self.allowed = allowed


class BadCount(BadArgument):
    """A number out of its range, or no number."""


class BadKey(PagedKVError, ValueError):
    """A key under which an entry would not be found again."""

    def __init__(self, key: object, why: str) -> None:
        super().__init__(f"{_quoted(key)} is no key: {why}")
        self.key = key
        self.why = why


class BadShape(PagedKVError, ValueError):
    """A tensor of another shape than the cache holds."""

    def __init__(self, name: str, got: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
        super().__init__(f"{name} has shape {tuple(got)}, expected {tuple(expected)}")
        self.name = name
        self.got = tuple(got)
        self.expected = tuple(expected)


class BadDtype(PagedKVError, ValueError):
    """A tensor of another dtype than the cache holds."""

    def __init__(self, name: str, got: object, expected: object) -> None:
        super().__init__(f"{name} has dtype {_named(got)}, expected {expected}")
        self.name = name
        self.got = got
        self.expected = expected


class BadDevice(PagedKVError, ValueError):
    """A tensor on another device than the cache."""

    def __init__(self, name: str, got: object, expected: object) -> None:
        super().__init__(f"{name} is on device {_named(got)}, expected {expected}")
        self.name = name
        self.got = got
        self.expected = expected


class ClosedStep(PagedKVError, RuntimeError):
    """Use of a step after commit() or close()."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}() of a closed step: call open() again")


class UnfitForKernel(PagedKVError, ValueError):
    """Pages that the format of a kernel has no place for."""

    def __init__(self, kernel: str, found: str, allowed: str) -> None:
        super().__init__(f"{kernel} cannot read these pages: {found}, allowed is {allowed}")
        self.kernel = kernel
        self.found = found
        self.allowed = allowed


class ConcurrentCall(PagedKVError, RuntimeError):
    """A call from a second thread while another one is running."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}() was called from a second thread while a call is running: use one thread, "
            "or a lock"
        )
        self.what = what


class NestedCall(PagedKVError, RuntimeError):
    """A call from inside another one of the same cache: from a finalizer, a signal handler or a
    policy.
    """

    def __init__(self, what: str, running: str) -> None:
        super().__init__(
            f"{what}() was called inside of {running}(), by a finalizer, a signal handler or a "
            "callback: only release() may be, which is carried out afterwards"
        )
        self.what = what
        self.running = running


class NotCopyable(PagedKVError, TypeError):
    """`copy`, `deepcopy` or `pickle` of an object that holds pages."""

    def __init__(self, kind: str) -> None:
        super().__init__(
            f"a {kind} cannot be copied or pickled: its sequences would have two owners. "
            "export() and adopt() take sequences to another cache, snapshots keep them in a folder"
        )
        self.kind = kind


class OwnedSequence(PagedKVError, ValueError):
    """A verb that would end or change a sequence which an index owns."""

    def __init__(self, handle: int, key: object) -> None:
        super().__init__(
            f"sequence {handle:#x} belongs to an index, under key {_quoted(key)}: "
            "fork() it to change it, remove() the key to end it"
        )
        self.handle = handle
        self.key = key


class CorruptCache(PagedKVError, RuntimeError):
    """`check()` found a broken invariant: a bug of this package."""


class UnknownKey(PagedKVError, ValueError):
    """A key that the index does not hold."""

    def __init__(self, key: object, entries: int) -> None:
        super().__init__(
            f"no entry with key {_quoted(key)} among {entries} entries: get() and `in` ask "
            "without raising"
        )
        self.key = key
        self.entries = entries


class HandleInUse(PagedKVError, ValueError):
    """A sequence stored under a second key: an index owns its sequences, and would release this one
    twice.
    """

    def __init__(self, handle: int, key: object) -> None:
        super().__init__(
            f"sequence {handle:#x} is already stored under key {_quoted(key)}: fork it to store "
            "it twice"
        )
        self.handle = handle
        self.key = key


class NotPinned(PagedKVError, ValueError):
    """`unpin` of an entry that nobody pinned, or more often than it was pinned."""

    def __init__(self, key: object) -> None:
        super().__init__(
            f"the entry with key {_quoted(key)} is not pinned: unpin() undoes one pin()"
        )
        self.key = key


class PinnedEntry(PagedKVError, ValueError):
    """`remove` of a pinned entry. `pins` counts the pins to undo."""

    def __init__(self, key: object, pins: int) -> None:
        super().__init__(
            f"the entry with key {_quoted(key)} is pinned {pins} times: unpin() it, or clear() "
            "the index"
        )
        self.key = key
        self.pins = pins


class CapacityExceeded(PagedKVError, RuntimeError):
    """An entry that does not fit beside the pinned ones. `unit` is "entries" or "bytes"; `pinned`
    counts entries.
    """

    def __init__(self, unit: str, needed: int, limit: int, pinned: int) -> None:
        super().__init__(
            f"the new entry and the {pinned} pinned ones need {needed} {unit}, allowed is {limit}: "
            f"unpin entries, or raise max_{unit}"
        )
        self.unit = unit
        self.needed = needed
        self.limit = limit
        self.pinned = pinned


class UnknownPolicy(PagedKVError, ValueError):
    """An eviction policy that is neither a known name nor a fresh object with the five hooks."""

    def __init__(self, policy: object, allowed: str) -> None:
        super().__init__(f"eviction policy {_quoted(policy)} is not usable, allowed is {allowed}")
        self.policy = policy
        self.allowed = allowed


class BadPriority(PagedKVError, ValueError):
    """A priority without a place in the order."""

    def __init__(self, priority: object) -> None:
        super().__init__(
            f"priority is {_quoted(priority)}, allowed is any real number except NaN, or None"
        )
        self.priority = priority


class UnknownEnv(PagedKVError, ValueError):
    """An environment id out of range."""

    def __init__(self, env_id: object, count: int) -> None:
        super().__init__(
            f"environment id is {_quoted(env_id)}, allowed is an integer from 0 to {count - 1}"
        )
        self.env_id = env_id
        self.count = count


class UnsupportedVersion(PagedKVError, RuntimeError):
    """A package in a version whose internals an integration does not know."""

    def __init__(self, package: str, found: str, tested: tuple[str, ...]) -> None:
        super().__init__(
            f"{package} {found} is installed; this integration was tested with "
            f"{', '.join(tested)} only"
        )
        self.package = package
        self.found = found
        self.tested = tested


class BadConfig(PagedKVError, ValueError):
    """A configuration file that cannot be read, or is of another kind."""

    def __init__(self, path: object, reason: str) -> None:
        line = " ".join(reason.split())  # what others raise may have many lines
        super().__init__(
            f"cannot use {str(path)!r}: {line if len(line) <= 300 else line[:300] + '...'}"
        )
        self.path = path
        self.reason = reason


class UnannouncedNode(PagedKVError, RuntimeError):
    """A step of a search that did not say which nodes it starts from."""

    def __init__(self, rows: int, announced: int | None) -> None:
        super().__init__(
            f"a step of {rows} search nodes, of which {announced or 0} were announced: "
            'keys="node" works within the '
            'search of UniZeroMCTSCtree and SampledUniZeroMCTSCtree, attach(..., keys="latent") '
            "with any caller"
        )
        self.rows = rows
        self.announced = announced


class WeightsChanged(PagedKVError, RuntimeError):
    """A search that would go on from contexts of other weights than the model has now, where that
    is refused. `contexts` counts them; `ways` says what to do.
    """

    def __init__(self, contexts: int, ways: str) -> None:
        super().__init__(
            f"the weights of the model changed, and {contexts} contexts of the old ones are held: "
            f"{ways}"
        )
        self.contexts = contexts


class WorkerLost(PagedKVError, RuntimeError):
    """A worker that could not be made, or brought back where it had died."""

    def __init__(self, worker: int, restarts: int, why: str) -> None:
        super().__init__(f"worker {worker} is lost after {restarts} restarts: {why}")
        self.worker = worker
        self.restarts = restarts
        self.why = why


class ClosedPool(PagedKVError, RuntimeError):
    """A call of a pool of workers that cannot have any more."""

    def __init__(self, why: str) -> None:
        super().__init__(f"this pool has no workers: {why}")
        self.why = why


class BadRecording(PagedKVError, ValueError):
    """A file that is no recording, or cannot be read."""

    def __init__(self, path: object, why: str) -> None:
        super().__init__(f"{str(path)!r} is not a recording that can be read: {why}")
        self.path = path
        self.why = why


class AlreadyRecording(PagedKVError, RuntimeError):
    """A second recording of a cache that is being recorded."""

    def __init__(self, path: object) -> None:
        super().__init__(
            f"this cache is already being recorded, to {str(path)!r}: end that recording first"
        )
        self.path = path


class NothingToRecord(PagedKVError, ValueError):
    """A target that has no paged cache."""

    def __init__(self, target: object) -> None:
        super().__init__(
            f"{type(target).__name__} has no paged cache to record, allowed is a PagedKVCache, a "
            "KVCacheManager, or a "
            "world model, model or policy that runs on pages"
        )
        self.target = target


class BadBundle(PagedKVError, ValueError):
    """Exported sequences that do not fit together, or not what they are adopted into."""

    def __init__(self, why: str) -> None:
        super().__init__(f"this bundle cannot be adopted: {why}")
        self.why = why


class OtherFingerprint(PagedKVError, ValueError):
    """Contents of another shape, kind or model.

    `differences` has what was found and what was expected, by name.
    """

    def __init__(self, differences: dict[str, tuple[object, object]]) -> None:
        told = [
            f"{name} is {_quoted(found)}, expected {_quoted(expected)}"
            for name, (found, expected) in differences.items()
        ]
        super().__init__(f"contents of another kind: {'; '.join(told)}")
        self.differences = differences


class BadSnapshot(PagedKVError, ValueError):
    """A folder that is no snapshot, or one that was damaged."""

    def __init__(self, path: object, why: str) -> None:
        super().__init__(f"{str(path)!r} is not a snapshot that can be read: {why}")
        self.path = path
        self.why = why


class SnapshotFailed(PagedKVError, RuntimeError):
    """The system refused to write or to read a file of a snapshot. `errno` is its number."""

    def __init__(self, path: object, what: str, errno: int | None = None) -> None:
        super().__init__(f"snapshot {str(path)!r}: {what}")
        self.path = path
        self.what = what
        self.errno = errno


class OutOfFrames(PagedKVError, RuntimeError):
    """A call needs more pages in memory at once than there are frames for.

    `needed` and `allowed` count pages; `held` the frames that open steps keep from it.
    """

    def __init__(self, needed: int, allowed: int, held: int = 0) -> None:
        super().__init__(
            f"{needed} pages are needed in memory at once, allowed are {allowed}, open steps hold "
            f"{held} frames: take fewer sequences, close steps, or raise frames"
        )
        self.needed = needed
        self.allowed = allowed
        self.held = held


class TierFailed(PagedKVError, RuntimeError):
    """Cold pages could not be written or read. `errno` is the number of the system's error."""

    def __init__(self, tier: str, what: str, errno: int | None = None) -> None:
        super().__init__(f"the {tier} tier of cold pages: {what}")
        self.tier = tier
        self.what = what
        self.errno = errno


class MissingPackage(PagedKVError, ImportError, RuntimeError):
    """Something that an optional part needs is not installed."""

    def __init__(self, what: str, needs: str, install: str) -> None:
        super().__init__(f"{what} needs {needs}: pip install {install}")
        self.what = what
        self.needs = needs


class UnsupportedModel(PagedKVError, ValueError):
    """A Hugging Face model whose contexts cannot be held in pages."""

    def __init__(self, model: object, why: str) -> None:
        kind = type(model).__name__
        super().__init__(f"{kind} cannot run on pages: {why}")
        self.model = kind
        self.why = why


class ForeignNode(PagedKVError, ValueError):
    """A value that is no node of this lm."""

    def __init__(self, node: object) -> None:
        super().__init__(f"{_quoted(node)} is not a node of this PagedLM")
        self.node = node


class ReleasedNode(PagedKVError, ValueError):
    """A node that was released."""

    def __init__(self, number: int) -> None:
        super().__init__(f"node {number} was released and can no longer be used")
        self.number = number


class UnpagedAttention(PagedKVError, RuntimeError):
    """A forward whose attention cannot be carried out over pages."""

    def __init__(self, why: str) -> None:
        super().__init__(
            f'attn_implementation="paged_kv" cannot attend here: {why}. Dense attention can: '
            'model.set_attn_implementation("sdpa")'
        )
        self.why = why


def _told(value: object) -> str:
    """The value as text; its kind where it cannot say."""
    try:
        return repr(value)
    except Exception:  # whatever a caller's own object raises
        return f"a {type(value).__name__}"


def _quoted(value: object) -> str:
    """The value as text of bearable length."""
    return _shortened(_told(value))


def _named(value: object) -> str:
    """A dtype or a device by its name; what is neither, as it says itself."""
    try:
        return _shortened(str(value) or "''")
    except Exception:  # whatever a caller's own object raises
        return _quoted(value)


def _shortened(text: str) -> str:
    line = " ".join(text.split()) if "\n" in text else text  # tensors have many lines
    return line if len(line) <= 200 else f"{line[:200]}..."


class _Unheard:
    """Raises its error where nobody can catch it: Python hands that to `sys.unraisablehook`."""

    def __init__(self, error: BaseException) -> None:
        self.error: BaseException | None = error

    def __del__(self) -> None:
        error = self.error
        self.error = None
        if error is not None:
            raise error


def unraisable(error: BaseException) -> None:
    """Tell of an error that nobody can catch, as Python tells of one in a finalizer."""
    _Unheard(error)

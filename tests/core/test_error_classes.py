"""The error classes: their data, and that they come back from another process as they were."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
import traceback
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from paged_kv import PagedKVError, errors

EXAMPLES: list[PagedKVError] = [
    errors.OutOfPages(3, 1, 2, 4),
    errors.StaleHandle(2**52 + 1),
    errors.ForeignHandle("seq"),
    errors.DuplicateSequence(16),
    errors.BadArgument("pad", "up", '"left" or "right"'),
    errors.BadCount("at", 5, "an int from 0 to 4"),
    errors.BadKey(["k"], "it cannot be hashed"),
    errors.BadShape("keys", (1, 2), (3,)),
    errors.BadDtype("keys", "float64", "float32"),
    errors.BadDevice("keys", "meta", "cpu"),
    errors.ClosedStep("commit"),
    errors.UnfitForKernel("FlashInfer", "row 1 has no token", "at least one in every row"),
    errors.ConcurrentCall("new"),
    errors.NestedCall("new", "append"),
    errors.NotCopyable("PagedKVCache"),
    errors.OwnedSequence(17, ("a", 1)),
    errors.CorruptCache("page 1: 2 references, 1 holders"),
    errors.UnknownKey("k", 3),
    errors.HandleInUse(18, b"key"),
    errors.NotPinned(frozenset([1])),
    errors.PinnedEntry("k", 2),
    errors.CapacityExceeded("bytes", 9, 8, 1),
    errors.UnknownPolicy("newest", "'lru'"),
    errors.BadPriority("high"),
    errors.UnknownEnv(7, 2),
    errors.UnsupportedVersion("LightZero", "0.1", ("0.2.0",)),
    errors.BadConfig("a.py", "not\n  python"),
    errors.UnannouncedNode(3, None),
    errors.WeightsChanged(3, "forget them"),
    errors.WorkerLost(1, 3, "killed"),
    errors.ClosedPool("it was closed"),
    errors.BadRecording("a.json", "no JSON"),
    errors.AlreadyRecording("a.json"),
    errors.NothingToRecord(3),
    errors.BadBundle("two pages are one"),
    errors.OtherFingerprint({"heads": (2, 3)}),
    errors.BadSnapshot("a folder", "its manifest is torn"),
    errors.SnapshotFailed("a folder", "No space left on device", 28),
    errors.OutOfFrames(9, 4, 2),
    errors.TierFailed("file", "No space left on device", 28),
    errors.MissingPackage("a figure", "altair", "paged-kv[report]"),
    errors.UnsupportedModel(object(), "it has no layers"),
    errors.UnpagedAttention("it adds to its scores"),
    errors.ForeignNode("a node"),
    errors.ReleasedNode(3),
]
CLASSES = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)
]


def same(error: BaseException, other: BaseException) -> bool:
    return type(error) is type(other) and str(error) == str(other) and vars(error) == vars(other)


def test_there_is_an_example_of_every_class() -> None:
    assert {type(error) for error in EXAMPLES} == set(CLASSES) - {PagedKVError}


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_is_one_of_this_package_and_a_builtin_one(kind: type) -> None:
    assert issubclass(kind, PagedKVError)
    assert kind.__doc__
    if kind is not PagedKVError:
        builtin = [issubclass(kind, base) for base in (ValueError, RuntimeError, TypeError)]
        assert sum(builtin) == 1
        assert kind.__name__ in vars(errors)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_every_error_is_pickled_and_comes_back_equal(error: PagedKVError) -> None:
    assert str(error)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert same(pickle.loads(pickle.dumps(error, protocol)), error)
    assert same(copy.copy(error), error)
    assert same(copy.deepcopy(error), error)
    again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(error))))
    assert same(again, error)
    assert again.args == (str(error),)
    assert str(error) in "".join(traceback.format_exception(again))


class Awkward:
    """A value that cannot be pickled."""

    def __repr__(self) -> str:
        return "an awkward value"

    def __reduce__(self) -> Any:
        raise ValueError("not me")


AWKWARD: dict[str, Any] = {
    "object": Awkward(),
    "lambda": lambda: None,
    "lock": threading.Lock(),
    "generator": (number for number in ()),
    "nested": ("a", [Awkward()]),
    "module": sys,
}


@pytest.mark.parametrize("name", AWKWARD)
def test_what_cannot_be_pickled_travels_as_text(name: str) -> None:
    value = AWKWARD[name]
    for error, field in (
        (errors.ForeignHandle(value), "handle"),
        (errors.BadArgument("seqs", value, "a list"), "value"),
        (errors.UnknownKey(value, 3), "key"),
        (errors.OwnedSequence(3, value), "key"),
        (errors.BadPriority(value), "priority"),
    ):
        found = pickle.loads(pickle.dumps(error))
        assert type(found) is type(error)
        assert str(found) == str(error)
        assert vars(found) == {**vars(error), field: repr(value)}
        assert same(pickle.loads(pickle.dumps(found)), found)


def test_notes_travel_with_an_error() -> None:
    error = errors.StaleHandle(3)
    error.__notes__ = ["in the third step"]  # what add_note does, from Python 3.11 on
    assert pickle.loads(pickle.dumps(error)).__notes__ == ["in the third step"]


def stumble() -> None:
    raise errors.CapacityExceeded("bytes", 9, 8, 1)


def test_an_error_of_a_worker_arrives() -> None:
    with ProcessPoolExecutor(1) as workers, pytest.raises(errors.CapacityExceeded) as caught:
        workers.submit(stumble).result()
    assert same(caught.value, errors.CapacityExceeded("bytes", 9, 8, 1))


def test_an_error_is_read_without_torch() -> None:
    code = (
        "import pickle, sys; error = pickle.loads(bytes.fromhex(sys.argv[1])); "
        "print(type(error).__name__, error.requested, 'torch' in sys.modules)"
    )
    sent = pickle.dumps(errors.OutOfPages(3, 1, 2)).hex()
    out = subprocess.run(
        [sys.executable, "-c", code, sent], capture_output=True, text=True, check=True
    )
    assert out.stdout.split() == ["OutOfPages", "3", "False"]


def test_errors_carry_their_data() -> None:
    out = errors.OutOfPages(3, 1, 2, 4)
    assert (out.requested, out.free, out.pinned, out.pending) == (3, 1, 2, 4)
    assert "4 held by open steps" in str(out)
    bad = errors.BadCount("at", 5, "an int")
    assert (bad.name, bad.value, bad.allowed) == ("at", 5, "an int")
    shape = errors.BadShape("keys", (1,), (2,))
    assert (shape.name, shape.got, shape.expected) == ("keys", (1,), (2,))
    assert (errors.BadDtype("k", 1, 2).got, errors.BadDevice("k", 1, 2).expected) == (1, 2)
    assert errors.ForeignHandle("x").handle == "x"
    assert errors.StaleHandle(16).handle == errors.DuplicateSequence(16).handle == 16
    key = errors.BadKey([1], "it cannot be hashed")
    assert (key.key, key.why) == ([1], "it cannot be hashed")
    nested = errors.NestedCall("new", "append")
    assert (nested.what, nested.running) == ("new", "append")
    assert errors.ConcurrentCall("new").what == "new"
    assert errors.NotCopyable("CacheIndex").kind == "CacheIndex"
    owned = errors.OwnedSequence(16, "k")
    assert (owned.handle, owned.key) == (16, "k")


class Mute:
    """A value that cannot say what it is, and cannot be pickled."""

    def __repr__(self) -> str:
        raise ValueError("not today")

    __reduce__ = __repr__  # type: ignore[assignment]


VALUES: dict[str, Any] = {
    "ForeignHandle": errors.ForeignHandle,
    "BadArgument": lambda value: errors.BadArgument("seqs", value, "a list"),
    "BadCount": lambda value: errors.BadCount("at", value, "an int"),
    "BadKey": lambda value: errors.BadKey(value, "it cannot be hashed"),
    "OwnedSequence": lambda value: errors.OwnedSequence(3, value),
    "UnknownKey": lambda value: errors.UnknownKey(value, 3),
    "HandleInUse": lambda value: errors.HandleInUse(3, value),
    "NotPinned": errors.NotPinned,
    "PinnedEntry": lambda value: errors.PinnedEntry(value, 1),
    "UnknownPolicy": lambda value: errors.UnknownPolicy(value, "'lru'"),
    "BadPriority": errors.BadPriority,
    "UnknownEnv": lambda value: errors.UnknownEnv(value, 2),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_are_quoted_at_bearable_length(name: str) -> None:
    long = VALUES[name]("x" * 10_000)
    assert "'xxxxx" in str(long)
    assert len(str(long)) < 400
    assert "x" * 10_000 in vars(long).values(), "the error has all of it"
    mute = VALUES[name](Mute())
    assert "a Mute" in str(mute)
    found = pickle.loads(pickle.dumps(mute))
    assert str(found) == str(mute)
    assert "a Mute" in vars(found).values()


def test_what_nobody_can_catch_goes_to_the_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    error = errors.StaleHandle(3)
    errors.unraisable(error)
    (told,) = heard
    assert (told.exc_type, told.exc_value) == (errors.StaleHandle, error)

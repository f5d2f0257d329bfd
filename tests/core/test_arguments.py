"""Every argument of the public surface takes what is right, and refuses all else.

All values of arguments_matrix.py are tried for all arguments of arguments_cases.py. Each must be
taken where it is legitimate, and refused elsewhere: by an error of this package that quotes it, or
by what an object of the caller's own raises. Then nothing has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, KeysView
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from arguments_cases import CASES, KINDS, Case
from arguments_matrix import NO_INDEX, OWN, VALUES, Boom, Index, Scene

from paged_kv import CacheIndex, KVCacheManager, PagedKVCache, PagedKVError, Step

CALLS = list(dict.fromkeys(case.call for case in CASES))
# Changes where a function of the caller's raises: by then open() has taken and given pages.
OUTSIDE = {"figures", "free", "unsorted", "peak", "capacity", "growths", "refs"}
HINTS = ("allowed is", "expected", "is not a sequence", "is no key", "call open()")
HINTS += ("was released", "belongs to an index", "is already stored", "stands twice", "is pinned")
HINTS += ("no entry with key", "is not pinned")


class Trial(NamedTuple):
    """One value for one argument."""

    case: Case
    name: str
    right: bool
    make: Callable[[Scene], Any]

    def __str__(self) -> str:
        return f"{self.case.call}({self.case.argument}={self.name})"


def trials(call: str) -> Iterator[Trial]:
    """All values for all arguments of one callable."""
    for case in CASES:
        if case.call == call:
            kind = KINDS[case.kind]
            for name, make in VALUES.items():
                yield Trial(case, name, name in kind.right, make)
            for name, changed in kind.tensors.items():
                yield Trial(
                    *(case, f"tensor: {name}", name in kind.right_tensors),
                    lambda _, case=case, changed=changed: changed(case.right),
                )


class Stage:
    """A scene, and what can be seen of it. What changed nothing leaves it to the next value."""

    def __init__(self, case: Case) -> None:
        self.scene = Scene()
        if case.managed:
            self.scene.managed()
        self.state = self.scene.state()

    def changed(self) -> set[str]:
        after = self.scene.state()
        return {field for field in self.state if self.state[field] != after.get(field)}


def tried(trial: Trial, stage: Stage) -> tuple[str | None, bool]:
    """What is wrong with how a value is taken, if anything; and whether the scene is as it was."""
    scene = stage.scene
    value = trial.make(scene)
    try:
        trial.case.run(scene, value)
    except Exception as error:
        wrong = wrongly_refused(trial, value, error)
        changed = stage.changed()
        if trial.case.calls and trial.right and changed <= OUTSIDE:
            return wrong, not changed
        return wrong or (f"changed {sorted(changed)}" if changed else None), not changed
    return None if trial.right else "taken", False


def wrongly_refused(trial: Trial, value: Any, error: Exception) -> str | None:
    what = f"{type(error).__name__}: {error}"
    own = trial.name in OWN and (isinstance(error, Boom) or str(error) == NO_INDEX)
    if trial.right:  # it may still raise an error of its own, or be called and do so
        return None if own or trial.case.calls else f"refused: {what}"
    if own and trial.name != "__repr__ raises":
        return None
    if not isinstance(error, KINDS[trial.case.kind].refused):
        return what
    return unreadable(trial.name, value, str(error))


def unreadable(name: str, value: Any, text: str) -> str | None:
    """What is wrong with a message."""
    if "\n" in text or len(text) > 500:
        return f"message too long: {text}"
    if not any(hint in text for hint in HINTS):
        return f"says nothing of what is allowed: {text}"
    if "iter" in name or "generator" in name:  # used up by now
        return None
    if "with key" in text:  # of the entry that the sequence belongs to
        return None
    told = any(part in text for part in quotations(value))
    return None if told else f"quotes nothing of the value: {text}"


def quotations(value: Any) -> Iterator[str]:
    """What may stand for a value in a message: its own text, or that of a part or property."""
    try:
        yield " ".join(repr(value).split())[:100]
        yield " ".join(str(value).split())[:100] or "''"
    except (Boom, ValueError):  # too many digits
        yield f"a {type(value).__name__}"
    if isinstance(value, int):
        yield hex(value)
        yield str(int(value == True))  # noqa: E712
    if isinstance(value, Index):
        yield str(value.number)
    if isinstance(value, torch.Tensor) and str(value.layout) == "torch.jagged":
        yield str(tuple(value.shape))
    if isinstance(value, torch.Tensor) and not value.is_nested:
        yield from (str(tuple(value.shape)), str(value.dtype), str(value.device))
    if isinstance(value, np.ndarray):
        yield from (str(value.shape), str(value.dtype))
    if isinstance(value, list | tuple | range | set | frozenset | KeysView | CacheIndex):
        yield str(len(value))
        for part in value:
            yield from quotations(part)
    if hasattr(type(value), "tolist") and not getattr(value, "is_nested", False):
        yield from quotations_of_array(value)


def quotations_of_array(value: Any) -> Iterator[str]:
    try:
        found = value.tolist()
    except RuntimeError:  # it has no contents
        return
    if not hasattr(type(found), "tolist"):
        yield from quotations(found)


@pytest.mark.parametrize("call", CALLS)
def test_every_value_is_taken_or_refused(call: str) -> None:
    wrong = []
    stage: Stage | None = None
    for trial in trials(call):
        stage = stage or Stage(trial.case)
        found, again = tried(trial, stage)
        if not again:
            found = found or broken(trial, stage.scene)
            stage = None
        if found:
            wrong.append(f"{trial}: {found}")
    assert not wrong, "\n".join([f"{len(wrong)} values are taken or refused wrongly:", *wrong])


def broken(trial: Trial, scene: Scene) -> str | None:
    """What `check` finds, after a value was taken."""
    try:
        scene.check()
    except PagedKVError as error:
        return str(error)
    except Boom:
        assert trial.name in OWN, trial
    return None


# -- what is right does what a plain int does

SAME = {
    "1": [
        *("np.int64(1)", "np.uint8(1)", "np.array(1)", "torch.tensor(1)", "Whole.ONE", "Index(1)"),
        *("[1, 1]", "(1, 1)", "array.array(1, 1)", "np.array([1, 1])", "torch.tensor([1, 1])"),
    ],
    "one": ["np.int64(one)", "np.array(one)", "torch.tensor(one)", "Index(one)"],
    "[one, two]": [
        *("(one, two)", "{one: 1, two: 2}.keys()"),
        *("iter([one, two])", "a generator", "np.array([one, two])", "torch.tensor([one, two])"),
        *("np.array([one, two], object)", "[Index(one), Index(two)]"),
        "[np.int64(one), torch.tensor(two)]",
    ],
    "[one]": ["torch.tensor([one])"],
    "[]": ["()", "np.array([])", "torch.tensor([])", "an empty generator", "set()"],
    "[1]": ["{1}", "(tensor,)", "torch.tensor([1])"],
    "True": ["np.True_", "torch.tensor(True)"],
    '"cpu"': ["torch.device(cpu)"],
}
# Kinds of arguments for which "one" is a sequence; elsewhere it is a number, never the same.
SEQ = {"seq", "any seq", "to put", "to put again"}
KEYS = {"key", "two keys", "two priorities"}  # are kept as they are


def outcome(case: Case, name: str) -> Any:
    """What a value does, and what comes of it, with sequences by their rank."""
    scene = Scene()
    if case.managed:
        scene.managed()
    seen = scene.cache.live()
    result = case.run(scene, VALUES[name](scene))
    seen += [seq for seq in scene.cache.live() if seq not in seen]
    ranks = {seq: f"#{rank}" for rank, seq in enumerate(seen)}
    state = scene.state()
    del state["mark"]
    return ranked(result, ranks), ranked(state, ranks)


def ranked(value: Any, ranks: dict[int, str]) -> Any:
    """A result or a state as plain data, in which sequences of two scenes are alike."""
    if isinstance(value, Step):
        return ranked((value.parents, value.past, value.room, value.get(0), value.get(1)), ranks)
    if isinstance(value, PagedKVCache | CacheIndex | KVCacheManager):
        return {name: number for name, number in vars(value).items() if isinstance(number, int)}
    if isinstance(value, dict):
        return {ranked(key, ranks): ranked(part, ranks) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [ranked(part, ranks) for part in value]
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, int):
        assert type(value) in (int, bool)
        return ranks.get(value, value)
    return value


def equals() -> Iterator[tuple[Case, str, str]]:
    for case in CASES:
        right = KINDS[case.kind].right
        for plain, others in SAME.items():
            if plain in right and case.kind not in KEYS and (plain != "one" or case.kind in SEQ):
                yield from ((case, plain, other) for other in others if other in right)


@pytest.mark.parametrize("call", CALLS)
def test_whatever_is_right_does_what_plain_ints_and_lists_do(call: str) -> None:
    wrong = []
    plain_outcomes: dict[tuple[str, str], Any] = {}
    for case, plain, other in equals():
        if case.call == call:
            at = case.argument, plain
            if at not in plain_outcomes:
                plain_outcomes[at] = outcome(case, plain)
            if outcome(case, other) != plain_outcomes[at]:
                wrong.append(f"{call}({case.argument}={other}) is not as with {plain}")
    assert not wrong, "\n".join(wrong)

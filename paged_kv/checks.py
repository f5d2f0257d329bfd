"""Checks of what callers hand over: one rule for whole numbers, counts, handles and keys.

A whole number is what Python takes as an index: an int, one of numpy or torch, one of a caller's
own class; never a bool, a float or text. Arrays and tensors without dimensions are numbers, those
of one dimension are lists of numbers. All else is refused, before anything changes. What a
caller's own object raises while it is looked at passes through. No tensors are imported here.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Mapping, Sequence
from math import inf
from numbers import Number
from typing import Any

from paged_kv.errors import BadArgument, BadCount, BadKey, BadPriority, ForeignHandle

Counts = int | Sequence[int]
TEXT = (str, bytes, bytearray, memoryview)
PLAIN = (int, str, bytes)  # kinds of keys that need no further look
ALL_PLAIN = frozenset(PLAIN)
MOST = 2**31 - 1  # of anything that memory is taken for; far more than a machine has room for


def whole(name: str, value: object, low: int, high: int | None = None) -> int:
    """`value` as an int from `low` to `high`. Raises BadCount.

    >>> whole("rows", 3, 1)
    3
    """
    number = value if type(value) is int else _as_int(value)
    if number is None or number < low or (high is not None and number > high):
        allowed = f"an int >= {low}" if high is None else f"an int from {low} to {high}"
        raise BadCount(name, value, allowed)
    return number


def amount(name: str, value: object, low: int) -> int:
    """As `whole`, where memory is taken for so many: up to `MOST`."""
    if type(value) is int and low <= value <= MOST:
        return value
    whole(name, value, low)
    return whole(name, value, low, MOST)


def limit(name: str, value: object, low: int, allowed: str) -> int | None:
    """None, or `value` as an int of at least `low`. Raises BadCount, which says what is allowed."""
    if value is None:
        return None
    number = value if type(value) is int else _as_int(value)
    if number is None or number < low:
        raise BadCount(name, value, allowed)
    return number


def _as_int(value: object) -> int | None:
    """A whole number of any library; None for all else, bools included."""
    found = _unpacked(value)
    if isinstance(found, bool) or not hasattr(type(found), "__index__"):
        return None
    return operator.index(found)  # type: ignore[arg-type]


def _unpacked(value: object) -> object:
    """What numpy, torch and their like hold, as numbers and lists of Python; all else as it is.

    None where they hold times, or nothing that can be read: on the meta device, sparse, nested.
    """
    array: Any = value
    if not hasattr(type(value), "tolist") or isinstance(value, TEXT):
        return value
    if getattr(getattr(value, "dtype", None), "kind", "") in ("m", "M"):
        return None
    try:
        return array.tolist()
    except Exception:
        if hasattr(type(value), "__dlpack__"):
            return None
        raise  # an object of the caller's own


def seconds(name: str, value: Any) -> float:
    """A span of time above 0, and no endless one. Raises BadArgument."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < inf:
        raise BadArgument(name, value, "a number of seconds above 0")
    return float(value)


def counts(name: str, value: object, limits: int | list[int]) -> list[int]:
    """One count a row, each from 0 to its limit; one number stands for every row. Raises BadCount.

    An int as `limits` is the number of rows. Lists, tuples, ranges, arrays and tensors of counts
    do; sets and iterators do not.
    """
    if isinstance(limits, int):
        if type(value) is int and value >= 0:
            return [value] * limits
        return [whole(name, number, 0) for number in _a_row(name, value, limits)]
    if type(value) is int and 0 <= value <= min(limits, default=value):
        return [value] * len(limits)
    rows = _a_row(name, value, len(limits))
    return [whole(name, number, 0, most) for number, most in zip(rows, limits)]


def _a_row(name: str, value: object, rows: int) -> list[object]:
    """A list of one value a row."""
    found = value if type(value) is int else _unpacked(value)
    if not isinstance(found, Sequence) or isinstance(found, TEXT):
        if not rows:  # else it is looked at with its rows
            whole(name, value, 0)
        return [value] * rows
    if len(found) != rows:
        raise BadCount(f"{name} (one a sequence)", value, f"{rows} numbers")
    return list(found)


def handles(seqs: object, name: str = "seqs", *, ordered: bool = True) -> list[int]:
    """Sequences as a list of ints of its own. Raises BadArgument or ForeignHandle.

    Whatever lists them does: lists, tuples, ranges, iterators, keys of a dictionary, arrays and
    tensors. A set has no order: it does where none is needed. One sequence is no list of them, nor
    is a dictionary or text.
    """
    if type(seqs) is not list:
        seqs = listed(name, seqs, "a list of sequences", ordered=ordered)
    try:
        return list(map(operator.index, seqs))
    except Exception:  # what is wrong, or raises on its own, does so again
        pass
    return [handle(seq) for seq in seqs]


def handle(seq: object) -> int:
    """One sequence as an int. Raises ForeignHandle."""
    number = seq if type(seq) is int else _as_int(seq)
    if number is None:
        raise ForeignHandle(seq)
    return number


def handle_set(seqs: object, name: str) -> frozenset[int]:
    """Sequences that may be released or unknown, in any order. Raises as `handles` does."""
    found = listed(name, seqs, "a list of sequences", ordered=False)
    return frozenset([handle(seq) for seq in found])


def listed(name: str, values: object, allowed: str, *, ordered: bool = True) -> list[object]:
    """What lists values, as a list of its own; a set where no order is needed. Raises
    BadArgument.
    """
    if ordered and isinstance(values, (set, frozenset)):
        raise BadArgument(name, values, f"{allowed}: a set has no order")
    found = _unpacked(values)
    if not isinstance(found, Iterable) or isinstance(found, (*TEXT, Mapping)):
        raise BadArgument(name, values, allowed)
    return list(found)


def flag(name: str, value: object) -> bool:
    """A bool, of any library. Raises BadArgument."""
    found = value if isinstance(value, bool) else _unpacked(value)
    if isinstance(found, bool):
        return found
    raise BadArgument(name, value, "True or False")


def choice(name: str, value: object, allowed: tuple[str, ...]) -> str:
    """One of a few words. Raises BadArgument."""
    if isinstance(value, str) and value in allowed:
        return value
    raise BadArgument(name, value, " or ".join(f'"{word}"' for word in allowed))


def function(name: str, value: object, allowed: str) -> None:
    """Raise BadArgument unless it can be called."""
    if not callable(value):
        raise BadArgument(name, value, allowed)


def key(value: Hashable) -> None:
    """Raise BadKey unless equal keys are found under each other.

    Tensors and arrays are not: they hash by identity, or not at all. What a caller's own `__hash__`
    raises passes through, but for a TypeError: so Python says that something cannot be hashed.
    """
    kind = type(value)
    if kind in PLAIN or (type(value) is tuple and ALL_PLAIN.issuperset(map(type, value))):
        return
    if hasattr(kind, "__dlpack__"):
        why = "a tensor is found under itself only: use its bytes, x.numpy().tobytes()"
        raise BadKey(value, why)
    if kind is memoryview:
        raise BadKey(value, "what it shows may change: use its bytes, bytes(x)")
    if kind.__hash__ is None:
        raise BadKey(value, "it cannot be hashed")
    if isinstance(value, (tuple, frozenset)):
        for part in value:
            key(part)
    try:
        hash(value)
    except TypeError as error:
        raise BadKey(value, "it cannot be hashed") from error
    if (isinstance(value, Number) or hasattr(kind, "dtype")) and value != value:
        raise BadKey(value, "NaN equals nothing")


def priority(value: object) -> float | None:
    """None, or a real number of any library but NaN. Raises BadPriority."""
    if value is None:
        return None
    found: Any = _unpacked(value)
    kind = type(found)
    if kind is bool or not (hasattr(kind, "__float__") or hasattr(kind, "__index__")):
        raise BadPriority(value)
    try:
        number = float(found)
    except (OverflowError, ValueError):
        if isinstance(found, Number):
            raise BadPriority(value) from None
        raise  # an object of the caller's own
    if number != number:
        raise BadPriority(value)
    return number

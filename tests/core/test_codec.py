"""Keys and data as text: what goes in comes out, of the same type; all else is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paged_kv.bundles.codec import from_json, to_json
from paged_kv.errors import BadArgument

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.sampled_from(["tuple", "list", "dict", "codec"])
)
KEYS = st.none() | st.integers() | st.text() | st.binary() | st.tuples(st.integers(), st.text())
VALUES = st.recursive(
    LEAVES,
    lambda part: (
        st.lists(part)
        | st.lists(part).map(tuple)
        | st.dictionaries(st.text(), part)
        | st.dictionaries(KEYS, part)
    ),
    max_leaves=12,
)


def kinds(value: Any) -> Any:
    """A value with the types of all its parts."""
    if isinstance(value, dict):
        return dict, [(kinds(key), kinds(part)) for key, part in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [kinds(part) for part in value]
    return type(value), repr(value)


@given(VALUES)
def test_what_goes_in_comes_out(value: object) -> None:
    text = to_json(value)
    assert kinds(from_json(text)) == kinds(value)
    json.loads(text)


def test_no_number_is_lost() -> None:
    found = from_json(to_json([float("nan"), float("inf"), -float("inf"), -0.0, 2**70]))
    assert repr(found) == repr([float("nan"), float("inf"), -float("inf"), -0.0, 2**70])


class Point:
    """A value of a caller's own."""

    def __init__(self, *at: int) -> None:
        self.at = at


class Points:
    """What writes it."""

    def encode(self, value: Any) -> object:
        if not isinstance(value, Point):
            raise TypeError(value)
        return value.at

    def decode(self, found: Any) -> Point:
        return Point(*found)


def test_a_codec_writes_what_is_a_callers_own() -> None:
    text = to_json({"moves": [Point(1, 2)], "list": ["codec", 3]}, Points())
    found = from_json(text, Points())
    assert found["moves"][0].at == (1, 2)
    assert found["list"] == ["codec", 3]
    with pytest.raises(ValueError, match="give that one"):
        from_json(text)
    with pytest.raises(TypeError):
        to_json({1, 2}, Points())


@pytest.mark.parametrize("value", [{1, 2}, object(), [frozenset()], {"a": bytearray(b"x")}, 1j])
def test_what_cannot_be_written_is_refused(value: object) -> None:
    with pytest.raises(BadArgument, match="a codec takes all else"):
        to_json(value)


def test_what_holds_itself_is_refused() -> None:
    value: list[Any] = [1]
    value.append(value)
    with pytest.raises(BadArgument, match="does not hold itself"):
        to_json(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "NaN",
        "Infinity",
        '["tuple"]',
        '["tuple",1]',
        '["tuple",[1],2]',
        '["set",[1]]',
        '["int",3]',
        '["int","x"]',
        '["bytes","?"]',
        '["float","1"]',
        '["dict",[1]]',
        '["dict",[[["list",["a"]],1]]]',
        "[" * 100_000,
        "9" * 100_000,
    ],
)
def test_what_was_never_written_is_refused(text: str) -> None:
    with pytest.raises((ValueError, TypeError)):
        from_json(text)

"""Keys and data of a caller as JSON, and back: the same values, of the same types. No tensors.

None, bools, numbers, text, lists and dictionaries with text as keys are JSON as they are. What JSON
does not know stands in a list that begins with a mark; so does a list that could be taken for one.
"""

from __future__ import annotations

import json
import math
from base64 import b64decode, b64encode
from typing import Any, NoReturn, Protocol

from paged_kv.errors import BadArgument

PLAIN = (type(None), bool, str)
FLAT = frozenset((*PLAIN, int, float))  # what JSON has in a list, and no mark makes another one
ALLOWED = (
    "None, a bool, a number, text, bytes, or a list, tuple or dictionary of these; a codec takes "
    "all else"
)
WIDE = 1 << 63  # whole numbers beyond it are written as text


class Codec(Protocol):
    """What makes values of a caller's own such that can be written, and makes them again."""

    def encode(self, value: Any) -> object:
        """The value as JSON types, bytes and tuples."""

    def decode(self, found: Any) -> object:
        """The value that `encode` was given."""


def to_json(value: object, codec: Codec | None = None) -> str:
    """A value as text. Raises BadArgument for what cannot be written.

    >>> to_json({"moves": (1, b"x")})
    '{"moves":["tuple",[1,["bytes","eA=="]]]}'
    """
    try:
        return json.dumps(_encoded(value, codec), separators=(",", ":"), allow_nan=False)
    except RecursionError:
        raise BadArgument("data", "a value", "what does not hold itself") from None


def from_json(text: str, codec: Codec | None = None) -> Any:
    """The value that was written. Raises ValueError for all that `to_json` never writes.

    >>> from_json(to_json({"moves": (1, b"x")}))
    {'moves': (1, b'x')}
    """
    try:
        return _decoded(json.loads(text, parse_constant=_refuse), codec)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _encoded(value: Any, codec: Codec | None) -> object:
    kind = type(value)
    if kind in PLAIN:
        return value
    if kind is int:
        return value if -WIDE <= value < WIDE else ["int", hex(value)]
    if kind is float:
        return value if math.isfinite(value) else ["float", str(value)]
    if kind is bytes:
        return ["bytes", b64encode(value).decode()]
    if kind is tuple:
        return ["tuple", [_encoded(part, codec) for part in value]]
    if kind is list:
        if _as_they_are(value):
            return value
        parts = [_encoded(part, codec) for part in value]
        return ["list", parts] if parts and type(parts[0]) is str else parts
    if kind is dict:
        pairs = [(key, _encoded(part, codec)) for key, part in value.items()]
        if all(type(key) is str for key, _ in pairs):
            return dict(pairs)
        return ["dict", [[_encoded(key, codec), part] for key, part in pairs]]
    if codec is None:
        raise BadArgument("data", value, ALLOWED)
    return ["codec", _encoded(codec.encode(value), None)]


def _as_they_are(values: list[Any]) -> bool:
    """Whether a list can be written as it is: long ones mostly hold one kind of numbers."""
    kinds = set(map(type, values))
    if kinds == {int}:
        return bool(-WIDE <= min(values) <= max(values) < WIDE)
    if kinds == {float}:
        return all(map(math.isfinite, values))
    return kinds <= {type(None), bool}


def _decoded(found: Any, codec: Codec | None) -> Any:
    if type(found) is dict:
        return {key: _decoded(part, codec) for key, part in found.items()}
    if type(found) is not list:
        return found
    if not found or type(found[0]) is not str:
        if FLAT.issuperset(map(type, found)):
            return found
        return [_decoded(part, codec) for part in found]
    if len(found) != 2:
        raise ValueError(f"{found[0]!r} marks one value, not {len(found) - 1}")
    return _unmarked(found[0], found[1], codec)


def _unmarked(mark: str, found: Any, codec: Codec | None) -> Any:
    """What stands behind a mark."""
    text = type(found) is str
    if mark == "int" and text:
        return int(found, 16)
    if mark == "float" and text and found in ("inf", "-inf", "nan"):
        return float(found)
    if mark == "bytes" and text:
        return b64decode(found, validate=True)
    if mark == "codec":
        if codec is None:
            raise ValueError("it holds values that were written by a codec: give that one")
        return codec.decode(_decoded(found, None))
    if type(found) is not list:
        raise ValueError(f"{mark!r} is no mark, or not of this")
    if mark == "tuple":
        return tuple([_decoded(part, codec) for part in found])
    if mark == "list":
        return [_decoded(part, codec) for part in found]
    if mark == "dict" and all(type(pair) is list and len(pair) == 2 for pair in found):
        return {_decoded(key, codec): _decoded(part, codec) for key, part in found}
    raise ValueError(f"{mark!r} is no mark, or not of this")


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")

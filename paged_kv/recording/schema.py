"""What each line of a recording holds, as types that msgspec checks while it reads.

Fields that no type names are left out, and so are lines of other kinds: a later version may have
written them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypedDict

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=0, le=2**62)]
Change = Annotated[int, Meta(ge=-(2**62), le=2**62)]
Seconds = Annotated[float, Meta(ge=0, le=1e12)]
Moment = Annotated[float, Meta(ge=-1e12, le=1e12)]
Size = Annotated[int, Meta(ge=1, le=2**62)]
Slots = Annotated[int, Meta(ge=1, le=2**20)]


class Sizes(TypedDict, total=False):
    """What never changes of a cache."""

    layers: Size
    heads: Size
    head_size: Size
    value_head_size: Size
    page_size: Slots
    dtype: str
    device: str
    token_bytes: Size
    page_bytes: Size
    max_pages: Size | None


class _Header(TypedDict):
    format: str
    version: int
    title: str
    labels: dict[str, str]
    started: Moment
    cache: Sizes | None


class Header(_Header, total=False):
    """The first line."""

    package: str


class Line(TypedDict):
    """What all other lines have."""

    kind: str
    t: Moment


class Cache(Line):
    """A cache that began during the recording."""

    cache: Sizes


class Tier(TypedDict, total=False):
    """A place for pages: see `paged_kv.stats.TierStats`."""

    name: str
    pages: Count
    bytes: Count
    hits: Count
    demotions: Count
    read: Count
    written: Count
    bytes_read: Count
    bytes_written: Count
    seconds_read: Seconds
    seconds_written: Seconds


class Sample(Line, total=False):
    """How the cache stands."""

    bytes_in_use: Count
    bytes_reserved: Count
    bytes_shared: Count
    bytes_unique: Count
    bytes_dense: Count
    bytes_peak: Count
    sequences: Count
    sequences_peak: Count
    pages_by_refs: dict[str, Count]
    dead_slots: Change
    usage: Seconds
    forks: Change
    appends: Change
    copied_pages: Change
    freed_pages: Change
    queries: Change
    hits: Change
    evictions: Change
    cache_s: Seconds
    tiers: list[Tier]
    simulation: Count
    root: Count


class _Event(Line):
    name: str


class Event(_Event, total=False):
    """Calls of one verb, or a mark."""

    s: Seconds
    span: Seconds
    most: Seconds
    count: Count
    sequences: Count
    pages: Change
    mark: bool


class Node(TypedDict):
    """A sequence of a tree."""

    id: Count
    parent: Count | None
    tokens: Count
    pages: list[Count]


class _Tree(Line):
    nodes: list[Node]


class Tree(_Tree, total=False):
    """The sequences that live at one moment."""

    title: str
    left_out: Count


class _Pages(Line):
    refs: list[Count]
    filled: list[Count]
    owner: list[Count | None]


class Pages(_Pages, total=False):
    """The pages at one moment, page 1 first."""

    title: str
    left_out: Count


class Lives(Line):
    """How long pages lived; an edge that is null has no end."""

    edges: list[Seconds | None]
    counts: list[Count]


class Accesses(Line):
    """Which sequences began, were read or ended, each moment a place of all four lists."""

    times: list[Moment]
    what: list[Literal["begin", "open", "hit", "end"]]
    ids: list[list[Count]]
    parents: list[list[Count | None]]


class End(Line):
    """Why a recording ended."""

    reason: str


class _Kind(TypedDict):
    kind: str


KINDS: dict[str, Any] = {
    "sample": Sample,
    "event": Event,
    "tree": Tree,
    "pages": Pages,
    "lives": Lives,
    "accesses": Accesses,
    "cache": Cache,
    "end": End,
}
_any = msgspec.json.Decoder()
_headers = msgspec.json.Decoder(Header)
_kinds = msgspec.json.Decoder(_Kind)
_lines = {kind: msgspec.json.Decoder(type_) for kind, type_ in KINDS.items()}


class Malformed(Exception):
    """What is wrong with a line."""


def read_any(text: bytes) -> Any:
    """Whatever JSON this is. Raises Malformed where it is none, as a line that was cut off."""
    return _decoded(_any, text)


def read_header(text: bytes) -> dict[str, Any]:
    """The first line. Raises Malformed."""
    found: dict[str, Any] = _decoded(_headers, text)
    return found


def read_line(text: bytes) -> dict[str, Any] | None:
    """Any other line; None where nobody here knows its kind. Raises Malformed."""
    decoder = _lines.get(_decoded(_kinds, text)["kind"])
    if decoder is None:
        return None
    line: dict[str, Any] = _decoded(decoder, text)
    if line["kind"] == "tree":
        ids = {node["id"] for node in line["nodes"]}
        _check(len(ids) == len(line["nodes"]), "an id is there twice")
    elif line["kind"] == "pages":
        lengths = {len(line[name]) for name in ("refs", "filled", "owner")}
        _check(len(lengths) == 1, "refs, filled and owner are not of one length")
    elif line["kind"] == "accesses":
        lengths = {len(line[name]) for name in ("times", "what", "ids", "parents")}
        _check(len(lengths) == 1, "times, what, ids and parents are not of one length")
        for what, ids, parents in zip(line["what"], line["ids"], line["parents"]):
            wanted = len(ids) if what == "begin" else 0
            _check(len(parents) == wanted, "what begins has one parent each, all else has none")
    return line


def _decoded(decoder: msgspec.json.Decoder[Any], text: bytes) -> Any:
    try:
        return decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(str(error)) from None


def _check(sound: bool, otherwise: str) -> None:
    if not sound:
        raise Malformed(otherwise)

"""The file of a recording: torn at any byte, damaged, or somebody else's."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from recording_tools import Memory, State, search

import paged_kv.recording as recording_package
from paged_kv.errors import BadRecording, MissingPackage
from paged_kv.recording import Recording, read_recording, record
from paged_kv.recording.tensorboard import scalars
from paged_kv.recording.trace import trace
from paged_kv.tools.summary import summarize, verbs


@pytest.fixture(scope="module")
def whole() -> bytes:
    """A short recording with lines of every kind."""
    state = State()
    file = Memory()
    options: dict[str, Any] = {"opener": lambda path: file, "interval": 1000.0}
    with record(state, "run.jsonl", title="größe", accesses=True, **options) as recorder:
        recorder.mark("begin")
        state.start()
        search(state.cache, steps=1, rows=1)
    return file.data


def prefix(short: Recording, long: Recording) -> Iterator[bool]:
    for name, lines in vars(short).items():
        if isinstance(lines, list):
            yield lines == getattr(long, name)[: len(lines)]


def test_files_torn_at_every_byte(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "torn.jsonl"
    path.write_bytes(whole)
    complete = read_recording(path)
    assert not complete.torn
    assert all(
        vars(complete)[name]
        for name in ("samples", "events", "trees", "accesses", "caches", "ends")
    )
    header = whole.index(b"\n")
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        if cut < header:
            with pytest.raises(ValueError, match="is not a recording that can be read"):
                read_recording(path)
            continue
        found = read_recording(path)
        assert all(prefix(found, complete))
        assert found.torn == (whole[cut - 1 : cut] != b"\n" and whole[cut : cut + 1] != b"\n")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (b"\x00\xff\xfe", "JSON is malformed: invalid character"),
        (b'{"kind":"sample","t":1,', "Input data was truncated"),
        (b'{"kind":"sample"}', "Object missing required field `t`"),
        (b'{"kind":"sample","t":NaN}', "JSON is malformed: invalid character"),
        (b'{"kind":"sample","t":1e999}', "Number out of range"),
        (b"[]", "Expected `object`, got `array`"),
        (b"{}", "Object missing required field `kind`"),
        (b'{"kind":"end","t":1}', "Object missing required field `reason`"),
        (b"[" * 100_000, ""),
        (b'{"kind":"end","t":1,"reason":"\xff"}', ""),
    ],
)
def test_damage_in_the_middle_is_told_with_its_line(
    damage: bytes, why: str, whole: bytes, tmp_path: Path
) -> None:
    lines = whole.splitlines()
    (tmp_path / "damaged.jsonl").write_bytes(b"\n".join([*lines[:3], damage, *lines[3:]]))
    with pytest.raises(BadRecording) as caught:
        read_recording(tmp_path / "damaged.jsonl")
    assert caught.value.why.startswith(f"line 4: {why}")


def test_what_a_later_version_adds_is_left_out(whole: bytes, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in whole.splitlines()]
    more = [{**line, "of tomorrow": [None]} for line in lines]
    more.insert(2, {"kind": "of tomorrow", "time": "none"})
    (tmp_path / "whole.jsonl").write_bytes(whole)
    (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, more)))
    assert read_recording(tmp_path / "more.jsonl") == read_recording(tmp_path / "whole.jsonl")


HEADER = {
    "format": "paged_kv recording",
    "version": 1,
    "title": "t",
    "labels": {},
    "started": 0.0,
    "cache": None,
}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "the file is empty"),
        (b"\n", "the file is empty"),
        (b"hello\n", "its first line is not the header"),
        (b"[1, 2]\n", "its first line is not the header"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "its first line is not the header"),
        (b'{"format": "another", "version": 1}\n', "its first line is not the header"),
        (
            json.dumps({**HEADER, "version": 2}).encode(),
            "it has version 2 of the format, allowed is 1",
        ),
        (
            json.dumps({**HEADER, "title": 7}).encode(),
            r"line 1: Expected `str`, got `int` - at `\$.title`",
        ),
        (
            json.dumps({**HEADER, "cache": []}).encode(),
            r"line 1: Expected `object \| null`, got `array` - at `\$.cache`",
        ),
        (None, "No such file"),
    ],
)
def test_foreign_files_are_named(content: bytes | None, why: str, tmp_path: Path) -> None:
    path = tmp_path / "foreign.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=why) as caught:
        read_recording(path)
    assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match="directory"):
        read_recording(tmp_path)


# -- every field of every kind of line, gone or of another type

STRANGE: tuple[Any, ...] = (
    None,
    True,
    -7,
    10**400,
    1e300,
    0.5,
    "x",
    [],
    ["a"],
    [[]],
    {},
    {"a": "b"},
)


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything inside of a line; of lists the first two."""
    if isinstance(value, dict):
        parts = list(value.items())
    elif isinstance(value, list):
        parts = list(enumerate(value))[:2]
    else:
        return
    for key, part in parts:
        yield (*way, key)
        yield from places(part, (*way, key))


def spoilt(line: Any, way: tuple[Any, ...]) -> Iterator[Any]:
    """The line without what is there, then with other values in its place."""
    for value in (places, *STRANGE):
        copy = json.loads(json.dumps(line))
        holder = copy
        for step in way[:-1]:
            holder = holder[step]
        if value is places:
            del holder[way[-1]]
        else:
            holder[way[-1]] = value
        yield copy


def first_of_each_kind(lines: list[Any]) -> Iterator[int]:
    """The header, and the first line of each kind."""
    kinds = [line.get("kind") for line in lines]
    yield from sorted({kinds.index(kind) for kind in kinds})


def shown(recording: Recording) -> None:
    """All that reports make of it, apart from the page, which takes long."""
    assert summarize(recording)
    verbs(recording)
    json.dumps(trace(recording))
    assert all(isinstance(value, int | float) for _, value, _ in scalars(recording))
    assert recording.seconds >= 0 or recording.samples
    assert recording.reason is None or isinstance(recording.reason, str)


def test_a_spoilt_field_is_told_or_does_no_harm(whole: bytes, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in whole.splitlines()]
    path = tmp_path / "spoilt.jsonl"
    told = harmless = 0
    for place in first_of_each_kind(lines):
        for way in places(lines[place]):
            for line in spoilt(lines[place], way):
                path.write_text(
                    "\n".join(map(json.dumps, [*lines[:place], line, *lines[place + 1 :]]))
                )
                try:
                    shown(read_recording(path))
                    harmless += 1
                except BadRecording as error:
                    told += 1
                    of_format = "its first line is not the header", "it has version"
                    assert error.why.startswith((f"line {place + 1}: ", *of_format))
    assert told > 400
    assert harmless > 100


# Values that no report could live with, by the place they stand at.
REFUSED: list[tuple[str, tuple[str | int, ...], object]] = [
    ("event", ("name",), None),
    ("event", ("s",), "long"),
    ("event", ("t",), []),
    ("sample", ("bytes_in_use",), "many"),
    ("sample", ("pages_by_refs",), [1]),
    ("sample", ("pages_by_refs", "1"), None),
    ("tree", ("nodes",), None),
    ("tree", ("nodes", 0), 5),
    ("tree", ("nodes", 0, "id"), "root"),
    ("tree", ("nodes", 0, "id"), 2),
    ("tree", ("nodes", 0, "pages"), 3),
    ("tree", ("nodes", 0, "parent"), "none"),
    ("pages", ("refs",), None),
    ("pages", ("owner",), ["a"]),
    ("pages", ("filled",), []),
    ("lives", ("edges",), 1),
    ("lives", ("counts",), ["a"]),
    ("accesses", ("times",), []),
    ("accesses", ("what", 0), "write"),
    ("accesses", ("ids", 0), [-1]),
    ("accesses", ("parents", 0), []),
    ("end", ("reason",), None),
    ("cache", ("cache", "page_size"), 0),
]


@pytest.mark.parametrize(("kind", "way", "value"), REFUSED, ids=str)
def test_lines_that_cannot_be_relied_on_are_refused(
    kind: str, way: tuple[str | int, ...], value: object, whole: bytes, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in whole.splitlines()]
    place = next(place for place, line in enumerate(lines) if line.get("kind") == kind)
    holder = lines[place]
    for step in way[:-1]:
        holder = holder[step]
    holder[way[-1]] = value
    path = tmp_path / "spoilt.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(BadRecording, match=rf": line {place + 1}: "):
        read_recording(path)


def test_without_msgspec_nothing_is_read(
    whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole.jsonl").write_bytes(whole)
    monkeypatch.setitem(sys.modules, "msgspec", None)
    monkeypatch.delitem(sys.modules, "paged_kv.recording.schema", raising=False)
    monkeypatch.delattr(recording_package, "schema", raising=False)
    with pytest.raises(
        MissingPackage, match=r"reading a recording needs msgspec: pip install 'paged"
    ):
        read_recording(tmp_path / "whole.jsonl")

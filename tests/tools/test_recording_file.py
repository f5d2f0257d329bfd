"""The file of a recording: torn at any byte, damaged, or somebody else's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from recording_tools import Memory, State, search

from paged_kv.recording import Recording, read_recording, record


@pytest.fixture(scope="module")
def whole() -> bytes:
    """A short recording with lines of every kind."""
    state = State()
    file = Memory()
    options: dict[str, Any] = {"opener": lambda path: file, "interval": 1000.0}
    with record(state, "run.jsonl", title="größe", **options) as recorder:
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
    assert complete.torn == 0
    assert all(vars(complete)[name] for name in ("samples", "events", "trees", "caches", "ends"))
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


def test_damage_in_the_middle_costs_its_own_line(whole: bytes, tmp_path: Path) -> None:
    lines = whole.splitlines()
    damaged = [
        lines[0],
        b"\x00\xff\xfe",
        *lines[1:3],
        b'{"kind":"sample"}',
        b'{"kind":"sample","t":NaN}',
        b"[]",
        b'{"kind":"of tomorrow","t":1}',
        *lines[3:],
    ]
    (tmp_path / "whole.jsonl").write_bytes(whole)
    (tmp_path / "damaged.jsonl").write_bytes(b"\n".join(damaged))
    found = read_recording(tmp_path / "damaged.jsonl")
    assert found.torn == 4
    assert found.samples == read_recording(tmp_path / "whole.jsonl").samples


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
        (json.dumps({**HEADER, "title": 7}).encode(), "the header's 'title' is 7, allowed is text"),
        (
            json.dumps({**HEADER, "cache": []}).encode(),
            r"the header's 'cache' is \[\], allowed is an object or null",
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


# One value of each kind of line, by the place it stands at, replaced by something that no reader
# expects.
SPOILT: list[tuple[str, tuple[str | int, ...], object]] = [
    ("event", ("name",), None),
    ("event", ("s",), "long"),
    ("event", ("t",), []),
    ("sample", ("bytes_in_use",), "many"),
    ("sample", ("pages_by_refs",), [1]),
    ("sample", ("pages_by_refs", "1"), None),
    ("tree", ("nodes",), None),
    ("tree", ("nodes", 0), 5),
    ("tree", ("nodes", 0, "id"), "root"),
    ("tree", ("nodes", 0, "pages"), 3),
    ("tree", ("nodes", 0, "parent"), "none"),
    ("pages", ("refs",), None),
    ("pages", ("owner",), ["a"]),
    ("pages", ("filled",), []),
    ("lives", ("edges",), 1),
    ("lives", ("counts",), ["a"]),
]


@pytest.mark.parametrize(("kind", "place", "value"), SPOILT, ids=str)
def test_lines_that_cannot_be_relied_on_are_left_out(
    kind: str, place: tuple[str | int, ...], value: object, whole: bytes, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in whole.splitlines()]
    spoilt = next(line for line in lines if line.get("kind") == kind)
    holder = spoilt
    for step in place[:-1]:
        holder = holder[step]
    holder[place[-1]] = value
    path = tmp_path / "spoilt.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_recording(path).torn == 1

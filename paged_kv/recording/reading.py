"""Reads the file of a recording. Checking it needs msgspec, which recording does not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from paged_kv.errors import BadRecording, MissingPackage
from paged_kv.recording.format import FORMAT, LISTS, VERSION, Line, Recording

Read = TypeVar("Read")


def read_recording(path: str | os.PathLike[str]) -> Recording:
    """Read a file. A last line that was cut off, as by a kill, is left out.

    Raises BadRecording, which names the line, unless all others are as docs/recording.md says; and
    MissingPackage without msgspec. Cost: some microseconds a line.
    """
    try:
        from paged_kv.recording import schema
    except ImportError:
        raise MissingPackage("reading a recording", "msgspec", "'paged-kv[cli]'") from None
    try:
        first, *rest = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise BadRecording(path, error.strerror or str(error)) from None
    lists: dict[str, list[Line]] = {name: [] for name in LISTS.values()}
    _check_format(path, first, _any(first))
    torn = bool(rest and rest[-1]) and _any(rest[-1]) is None
    header = _line(path, 1, first, schema.read_header)
    for number, text in enumerate(rest[:-1] if torn else rest, start=2):
        line = _line(path, number, text, schema.read_line) if text else None
        if line is not None:
            lists[LISTS[line["kind"]]].append(line)
    return Recording(header, torn=torn, **lists)


def _line(
    path: str | os.PathLike[str], number: int, text: bytes, read: Callable[[bytes], Read]
) -> Read:
    """What a line holds; where that is not as it should be, the error names the line."""
    from paged_kv.recording.schema import Malformed

    try:
        return read(text)
    except Malformed as error:
        raise BadRecording(path, f"line {number}: {error}") from None


def _any(text: bytes) -> Any:
    """What this is as JSON; None where it is none."""
    from paged_kv.recording import schema

    try:
        return schema.read_any(text)
    except schema.Malformed:
        return None


def _check_format(path: str | os.PathLike[str], text: bytes, first: Any) -> None:
    """Tell files of others apart from recordings that are damaged."""
    if not text:
        raise BadRecording(path, "the file is empty")
    if not isinstance(first, dict) or first.get("format") != FORMAT:
        raise BadRecording(path, f"its first line is not the header of a {FORMAT}")
    version = first.get("version")
    if version != VERSION:
        raise BadRecording(path, f"it has version {version!r} of the format, allowed is {VERSION}")

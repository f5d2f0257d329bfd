"""The file of a recording: JSON Lines, so that what a killed run had written can be read.

The first line is the header, every other line an object with its `kind` and `t`, the seconds since
the recording began. docs/recording.md has every field.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from paged_kv import __version__

FORMAT = "paged_kv recording"
VERSION = 1
Line = dict[str, Any]

# Which list of a `Recording` takes the lines of a kind; a reader leaves out kinds it does not know.
LISTS = {
    "sample": "samples",
    "event": "events",
    "tree": "trees",
    "pages": "pages",
    "lives": "lives",
    "accesses": "accesses",
    "cache": "caches",
    "end": "ends",
}


@dataclass(frozen=True)
class Recording:
    """What a file holds: its header and its lines by kind, each list in the order of time.

    `torn`: the last line was cut off, as the run was killed while it was written.
    """

    header: Line
    samples: list[Line] = field(default_factory=list)
    events: list[Line] = field(default_factory=list)
    trees: list[Line] = field(default_factory=list)
    pages: list[Line] = field(default_factory=list)
    lives: list[Line] = field(default_factory=list)
    accesses: list[Line] = field(default_factory=list)
    caches: list[Line] = field(default_factory=list)
    ends: list[Line] = field(default_factory=list)
    torn: bool = False

    @property
    def title(self) -> str:
        """What the recording is called."""
        return str(self.header["title"])

    @property
    def cache(self) -> Line:
        """Sizes of the cache that was recorded, of the first of several; empty without any."""
        sizes = self.header["cache"] or (self.caches[0]["cache"] if self.caches else {})
        return dict(sizes)

    @property
    def seconds(self) -> float:
        """From the beginning to the last line."""
        lines = (line for name in LISTS.values() for line in getattr(self, name)[-1:])
        return float(max((line["t"] for line in lines), default=0.0))

    @property
    def reason(self) -> str | None:
        """Why it ended: "done" or the name of an exception; None where it was cut off."""
        return str(self.ends[-1]["reason"]) if self.ends else None

    def lines(self) -> list[Line]:
        """All behind the header, in the order of time; the end last."""
        lists = (getattr(self, name) for kind, name in LISTS.items() if kind != "end")
        lines = (line for each in lists for line in each)
        return [*sorted(lines, key=lambda line: float(line["t"])), *self.ends]


def write_recording(recording: Recording, path: str | os.PathLike[str]) -> None:
    """Write a recording, such as a merged one; an existing file is overwritten. Raises OSError."""
    lines = [recording.header, *recording.lines()]
    Path(path).write_text("".join(map(_written, lines)), encoding="utf-8")


def header(
    title: str, cache: Mapping[str, Any] | None, labels: Mapping[str, str] | None = None
) -> Line:
    """The first line. `cache` has the sizes of the cache; None where it does not exist yet."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "started": time.time(),
        "package": __version__,
        "title": str(title),
        "cache": None if cache is None else dict(cache),
        "labels": {str(name): str(text) for name, text in (labels or {}).items()},
    }


class RecordingWriter:
    """Appends lines to a new file, the first of which is `first`; none is held back.

    An existing file is overwritten. What goes wrong while the file is opened is raised (OSError). A
    later OSError, as of a full disk, is no reason to stop the run that is recorded: it is said once
    as a RuntimeWarning, and nothing more is written.

    >>> import tempfile, pathlib
    >>> from paged_kv.recording import read_recording
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "run.jsonl"
    >>> with RecordingWriter(path, header("a run", None)) as writer:
    ...     writer.write("event", 0.5, name="search", s=0.25)
    >>> recording = read_recording(path)
    >>> recording.title, recording.events[0]["name"], recording.reason
    ('a run', 'search', 'done')
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        first: Line,
        opener: Callable[[Path], IO[bytes]] | None = None,
    ) -> None:
        self.path = Path(path)
        self.failed: OSError | None = None
        # Without a buffer: a line is written in one call, and a killed process has lost none.
        self._file = self.path.open("wb", buffering=0) if opener is None else opener(self.path)
        self._closed = False
        self._last = 0.0
        self._put([first])

    def __enter__(self) -> RecordingWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(reason="done" if kind is None else kind.__name__)

    def write(self, kind: str, t: float, **fields: Any) -> None:
        """Append one line. Cost: one system call."""
        self.write_all([{"kind": kind, "t": round(t, 6), **fields}])

    def write_all(self, lines: list[Line]) -> None:
        """Append lines that have their `kind` and `t`. Cost: one system call for all of them."""
        if lines and self.failed is None and not self._closed:
            self._last = max(self._last, lines[-1]["t"])
            self._put(lines)

    def close(self, t: float | None = None, reason: str = "done") -> None:
        """Write the last line, by default at the time of the one before. Twice is fine."""
        if self._closed:
            return
        self.write("end", self._last if t is None else t, reason=reason)
        self._closed = True
        try:
            self._file.close()
        except OSError as error:
            self._give_up(error)

    def _put(self, lines: list[Line]) -> None:
        data = "".join(map(_written, lines)).encode()
        try:
            while data:  # a raw file may take a part only
                data = data[self._file.write(data) :]
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if self.failed is None:
            self.failed = error
            warnings.warn(
                f"recording to {str(self.path)!r} stopped: {error}", RuntimeWarning, stacklevel=2
            )


def _written(line: Line) -> str:
    return json.dumps(line, separators=(",", ":")) + "\n"

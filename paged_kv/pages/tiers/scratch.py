"""Every call to the file system that a file of cold pages makes."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from typing import Any


class ScratchFiles:
    """The file system. Each method is one call, but for loops over what the system did in part.

    Nothing is ever synced: what is in these files is of no use to another process.
    """

    def create(self, folder: str) -> tuple[int, str]:
        """A new file for this process alone: its descriptor, and its name."""
        return tempfile.mkstemp(prefix="pages-", suffix=".cold", dir=folder)

    def unlink(self, path: str) -> None:
        """Take away the name of a file, which lives on as long as it is open."""
        if sys.platform != "win32":
            os.unlink(path)

    def write(self, file: int, data: Any, at: int) -> None:
        """Write bytes at a place."""
        left = memoryview(data).cast("B")
        while left:
            count = write_at(file, left, at)
            left = left[count:]
            at += count

    def read(self, file: int, into: Any, at: int) -> None:
        """Fill memory from a place. Raises EOFError where the file is too short."""
        left = memoryview(into).cast("B")
        while left:
            count = read_at(file, left, at)
            if not count:
                raise EOFError
            left = left[count:]
            at += count

    def shorten(self, file: int, size: int) -> None:
        """Cut a file to so many bytes."""
        os.ftruncate(file, size)

    def close(self, file: int, path: str) -> None:
        """Let go of a file, and so remove it."""
        os.close(file)
        if sys.platform == "win32":
            with suppress(OSError):
                os.unlink(path)


def write_at(file: int, data: memoryview, at: int) -> int:
    """Write at a place; returns how many bytes were."""
    if hasattr(os, "pwrite"):
        return os.pwrite(file, data, at)
    os.lseek(file, at, os.SEEK_SET)  # on Windows
    return os.write(file, data)


def read_at(file: int, into: memoryview, at: int) -> int:
    """Read from a place; returns how many bytes were. Where the system can, the place of the file
    stays, which processes share that were forked.
    """
    if hasattr(os, "preadv"):
        return os.preadv(file, [into], at)
    os.lseek(file, at, os.SEEK_SET)  # on Windows
    found = os.read(file, len(into))
    into[: len(found)] = found
    return len(found)


SCRATCH = ScratchFiles()


def runs(slots: Sequence[int]) -> list[tuple[int, int]]:
    """Where slots that follow on each other begin and end in a list of them."""
    found = []
    first = 0
    for at in range(1, len(slots) + 1):
        if at == len(slots) or slots[at] != slots[at - 1] + 1:
            found.append((first, at))
            first = at
    return found

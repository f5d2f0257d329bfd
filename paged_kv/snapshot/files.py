"""Every call to the file system that a snapshot makes, and the errors that come of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from paged_kv.errors import BadSnapshot, SnapshotFailed
from paged_kv.pages.tiers.scratch import read_at

if sys.platform != "win32":  # which has no such locks, and cannot sync folders
    import fcntl


class Files:
    """The file system. Each method is one call, but for loops over what the system did in part."""

    def make_folder(self, path: Path) -> bool:
        """Whether it was made: False where it was there."""
        try:
            path.mkdir()
        except FileExistsError:
            if not path.is_dir():
                raise
            return False
        return True

    def names(self, path: Path) -> list[str]:
        """What lies in a folder."""
        return os.listdir(path)

    def lock(self, path: Path) -> Lock:
        """Keep others from a folder until the lock is closed, or the process ends.

        Raises BlockingIOError where another one has it.
        """
        return Lock(path)

    def create(self, path: Path) -> FileIO:
        """A new file."""
        return FileIO(path, "x+")

    def open(self, path: Path) -> FileIO:
        """A file to read."""
        return FileIO(path, "r")

    def size(self, file: FileIO) -> int:
        """Bytes of a file."""
        return os.fstat(file.fileno()).st_size

    def write(self, file: FileIO, data: Any, at: int) -> None:
        """Write bytes at a place."""
        left = memoryview(data).cast("B")
        file.seek(at)
        while left:
            left = left[file.write(left) :]

    def read(self, file: FileIO, into: Any, at: int) -> None:
        """Fill memory from a place. Raises EOFError where the file is too short."""
        left = memoryview(into).cast("B")
        while left:
            count = read_at(file.fileno(), left, at)
            if not count:
                raise EOFError
            left = left[count:]
            at += count

    def sync(self, file: FileIO) -> None:
        """Return once the contents of a file are safe."""
        os.fsync(file.fileno())

    def sync_folder(self, path: Path) -> None:
        """Return once the names in a folder are safe."""
        if sys.platform == "win32":
            return
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def replace(self, old: Path, new: Path) -> None:
        """Give a file another name, in place of what had it."""
        os.replace(old, new)

    def remove(self, path: Path) -> None:
        """Take a name away."""
        os.unlink(path)


class Lock:
    """A lock on a folder, which the system takes back when the process ends, however it does."""

    def __init__(self, path: Path) -> None:
        self._descriptor = -1
        if sys.platform == "win32":
            return
        self._descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let others in."""
        descriptor = self._descriptor
        self._descriptor = -1
        if descriptor >= 0:
            os.close(descriptor)

    __del__ = close  # an interrupt may come before anyone holds it


FILES = Files()


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors of the file system by their names here: BadSnapshot, SnapshotFailed."""
    try:
        yield
    except EOFError as error:
        raise BadSnapshot(path, "a file of it is cut off") from error
    except BlockingIOError as error:
        raise SnapshotFailed(path, "another one is being saved into it", error.errno) from error
    except FileNotFoundError as error:
        raise BadSnapshot(path, f"{_name(error)} is missing") from error
    except OSError as error:
        what = f"{_name(error)}: {error.strerror or type(error).__name__}"
        raise SnapshotFailed(path, what, error.errno) from error


def _name(error: OSError) -> str:
    name = error.filename
    return "a file" if name is None else repr(os.path.basename(os.fsdecode(name)))

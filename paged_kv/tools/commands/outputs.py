"""Which files a command will write, checked before it does anything: that they can be written, and
that none is one it reads or writes already.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Named(NamedTuple):
    """A file, and what the command calls it."""

    name: str
    path: Path


def unusable_outputs(outputs: Iterable[Named], inputs: Iterable[Named] = ()) -> str | None:
    """Why one of these files cannot be written, or None. Nothing is created.

    A file that is read is never one to write, by whatever name: links are followed.
    """
    taken = list(inputs)
    for output in outputs:
        wrong = unusable_file(output.path)
        if wrong:
            return wrong
        for other in taken:
            if same(output.path, other.path):
                return (
                    f"{output.name} {str(output.path)!r} is the same file as "
                    f"{other.name} {str(other.path)!r}, which would be lost"
                )
        taken.append(output)
    return None


def unusable_file(path: Path) -> str | None:
    """Why a file cannot be written, or None. Nothing is created."""
    try:
        there = path.exists()
        if path.is_dir():
            reason: str | None = "it is a directory"
        elif not path.parent.is_dir():
            reason = "no such directory"
        else:
            written = path if there else path.parent
            reason = None if os.access(written, os.W_OK) else "permission denied"
    except OSError as error:  # the name is too long, or a folder on the way may not be looked into
        reason = error.strerror
    return reason and f"cannot write to {str(path)!r}: {reason}"


def unusable_folder(path: Path) -> str | None:
    """Why a folder cannot be made or written into, or None. Nothing is created."""
    try:
        above = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        if not above.is_dir():
            reason: str | None = f"{str(above)!r} is no directory"
        else:
            reason = None if os.access(above, os.W_OK) else "permission denied"
    except OSError as error:
        reason = error.strerror
    return reason and f"cannot write to {str(path)!r}: {reason}"


def same(one: Path, other: Path) -> bool:
    """Whether two paths are one file, or would be; never of what holds nothing, as /dev/null."""
    try:
        if one.exists() and other.exists():
            return one.is_file() and os.path.samefile(one, other)
    except OSError:
        return False
    return os.path.realpath(one) == os.path.realpath(other)

"""File systems for tests: one that writes down every call, one that fails, one in memory; and the
states that a power cut may leave.
"""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from paged_kv.snapshot.files import Files

CHANGES = ("make_folder", "create", "write", "sync", "sync_folder", "replace", "remove")
CALLS = (*CHANGES, "names", "lock", "open", "size", "read")


class Op(NamedTuple):
    """A call that changes something: to the file or folder of a name."""

    kind: str
    name: str
    at: int = 0
    data: bytes = b""
    to: str = ""


class Watched(Files):
    """The file system; `before` and `after` are called around each call with its name."""

    def __init__(self) -> None:
        self.log: list[Op] = []
        self.before: Callable[[str], None] = lambda kind: None
        self.after: Callable[[str], None] = lambda kind: None

    def __getattribute__(self, kind: str) -> Any:
        found = super().__getattribute__(kind)
        if kind not in CALLS:
            return found

        def called(*args: Any) -> Any:
            self.before(kind)
            if kind in CHANGES:
                self.log.append(noted(kind, args))
            result = found(*args)
            self.after(kind)
            return result

        return called


def noted(kind: str, args: Sequence[Any]) -> Op:
    first = args[0]
    name = Path(first.name if isinstance(first, io.FileIO) else first).name
    if kind == "write":
        return Op(kind, name, args[2], bytes(memoryview(args[1]).cast("B")))
    if kind == "replace":
        return Op(kind, name, to=Path(args[1]).name)
    return Op(kind, name)


def failing(at: int, error: Callable[[], BaseException], *, late: bool) -> Watched:
    """A file system whose call of that number fails, once it did its work or before."""
    files = Watched()
    numbers = itertools.count(1)  # of calls, by several threads perhaps

    def count_down(kind: str) -> None:
        if next(numbers) == at:
            raise error()

    if late:
        files.after = count_down
    else:
        files.before = count_down
    return files


Disk = dict[str, bytes]  # the files of one folder; None, elsewhere, stands for no folder


class Memory(Files):
    """A folder in memory, to read."""

    def __init__(self, disk: Disk | None) -> None:
        self.disk = disk

    def open(self, path: Path) -> Any:
        if self.disk is None or path.name not in self.disk:
            raise FileNotFoundError(2, "No such file", str(path))
        return io.BytesIO(self.disk[path.name])

    def size(self, file: Any) -> int:
        return len(file.getbuffer())

    def read(self, file: Any, into: Any, at: int) -> None:
        found = file.getbuffer()[at : at + memoryview(into).nbytes]
        if len(found) < memoryview(into).nbytes:
            raise EOFError
        memoryview(into).cast("B")[:] = found


def disk_of(folder: Path) -> Disk:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -- power cuts


class Lasting(NamedTuple):
    """What is safe, and what may be lost: calls since, each with whether it is of a name."""

    disk: Disk | None
    pending: list[Op]


def crash_states(
    before: Disk | None, log: Sequence[Op], rng: random.Random, samples: int = 4
) -> Iterator[tuple[int, Disk | None]]:
    """What may be there after a power cut behind each prefix of a log, with its length.

    Of what was not synced, nothing is there, or all; all but one, or but a half of one write; only
    one; and some at random.
    """
    for length in range(len(log) + 1):
        prefix = log[:length]
        open_ops = pending(prefix)
        everything = set(open_ops)
        choices = [set(), everything, *({op} for op in open_ops)]
        choices += [everything - {op} for op in open_ops]
        choices += [{op for op in open_ops if rng.random() < 0.5} for _ in range(samples)]
        for lasting in choices:
            yield length, replayed(before, prefix, everything - lasting, None)
        for op in open_ops:
            if prefix[op].kind == "write":
                yield length, replayed(before, prefix, set(), op)


def pending(log: Sequence[Op]) -> list[int]:
    """The calls that a power cut may undo: of a file until it is synced, of a name until its folder
    is.
    """
    found = []
    for number, op in enumerate(log):
        later = log[number + 1 :]
        if op.kind == "write":
            safe = any(after.kind == "sync" and after.name == op.name for after in later)
        elif op.kind == "make_folder":
            safe = any(after.kind == "sync_folder" and after.name != op.name for after in later)
        else:
            folder = FOLDER
            safe = any(after.kind == "sync_folder" and after.name == folder for after in later)
        if not safe and not op.kind.startswith("sync"):
            found.append(number)
    return found


FOLDER = "snapshot"  # the name that tests give it


def replayed(
    before: Disk | None, log: Sequence[Op], lost: set[int], torn: int | None
) -> Disk | None:
    """A folder after a log, without some calls, and with half of one write."""
    contents: dict[str, bytearray] = {
        name: bytearray(data) for name, data in ({} if before is None else before).items()
    }
    names = {name: name for name in contents}  # as it is called -> as it was made
    there = before is not None
    for number, op in enumerate(log):
        if op.kind == "write":
            data = b"" if number in lost else op.data
            if number == torn:
                data = data[: len(data) // 2]
            held = contents.setdefault(op.name, bytearray())
            if data:
                held.extend(bytes(max(0, op.at + len(data) - len(held))))
                held[op.at : op.at + len(data)] = data
        elif number in lost:
            continue
        elif op.kind == "make_folder":
            there = True
        elif op.kind == "create":
            names[op.name] = op.name
            contents.setdefault(op.name, bytearray())
        elif op.kind == "replace":
            names[op.to] = op.name
            names.pop(op.name, None)
        elif op.kind == "remove":
            names.pop(op.name, None)
    return {name: bytes(contents[made]) for name, made in names.items()} if there else None

"""Cold pages in a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple
from weakref import finalize

import numpy as np
import numpy.typing as npt
import torch

from paged_kv.errors import BadArgument, MissingPackage, TierFailed
from paged_kv.pages.tiers.coding import Coding
from paged_kv.pages.tiers.contract import Ints, RecordCodec
from paged_kv.pages.tiers.scratch import SCRATCH, ScratchFiles, runs


class Kept(NamedTuple):
    """Where the record of a page is, and its checksum."""

    slot: int
    digest: bytes


class FileTier:
    """Cold pages in a file of a folder, each a record of fixed size with a checksum that is kept in
    memory.

    The file is scratch: its name is taken away as soon as it is open (on Windows when it is
    closed), so nothing of it is left however the process ends, and nothing is ever synced. A
    record that does not come back as it was written is refused by name. After `os.fork` it stays
    with the process that made it: in the other one what would move pages raises. Raises TierFailed
    where there is no such folder, MissingPackage without xxhash.
    """

    name = "file"

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        codec: RecordCodec | None = None,
        files: ScratchFiles = SCRATCH,
    ) -> None:
        self.folder = os.fsdecode(folder)
        self._digest = _hasher()
        self._codec = codec
        self._files = files
        self._file = -1
        self._process = 0  # whose file it is
        self._coding = Coding(None, 0)
        self._kept: dict[int, Kept] = {}
        self._free: list[int] = []
        self._slots = 0  # of the file, those that are free included

    def begin(self, page_bytes: int) -> None:
        """See `ColdTier`."""
        if self._file >= 0:
            raise BadArgument("cold", self, "a tier of no other cache")
        self._coding = Coding(self._codec, page_bytes)
        with self._named():
            file, path = self._files.create(self.folder)
            closing = finalize(self, self._files.close, file, path)
            try:
                self._files.unlink(path)
            except BaseException:
                closing()
                raise
        self._process = os.getpid()
        self._file = file

    def put(self, pages: Ints, records: torch.Tensor) -> None:
        """See `ColdTier`."""
        self._check_process()
        rows: npt.NDArray[np.uint8] = np.ascontiguousarray(self._coding.encoded(records).numpy())
        names = pages.tolist()
        kept = self._kept
        taken = self._take([name not in kept for name in names].count(True))
        fresh = iter(taken)
        slots = [kept[name].slot if name in kept else next(fresh) for name in names]
        width = self._coding.width
        try:
            with self._named():
                for first, end in runs(slots):
                    self._files.write(self._file, rows[first:end], slots[first] * width)
        except BaseException:
            self._free += taken
            raise
        digest = self._digest
        made = {name: Kept(slot, digest(row)) for name, slot, row in zip(names, slots, rows)}
        kept.update(made)

    def _take(self, count: int) -> list[int]:
        """Slots that nobody has. Whoever is interrupted here loses some until they are counted."""
        free = self._free
        if count > len(free):
            if self._slots > len(free) + len(self._kept):
                used = {each.slot for each in self._kept.values()}
                free[:] = [slot for slot in range(self._slots - 1, -1, -1) if slot not in used]
            first = self._slots
            self._slots = first + max(0, count - len(free))
            free[:0] = range(self._slots - 1, first - 1, -1)
        taken = free[len(free) - count :][::-1]
        del free[len(free) - count :]
        return taken

    def get(self, pages: Ints, out: torch.Tensor) -> None:
        """See `ColdTier`."""
        self._check_process()
        names = pages.tolist()
        found = [self._kept[name] for name in names]
        slots = [each.slot for each in found]
        width = self._coding.width
        rows: npt.NDArray[np.uint8] = out.numpy()
        if self._codec is not None:
            rows = np.empty((len(names), width), dtype=np.uint8)
        with self._named():
            for first, end in runs(slots):
                self._files.read(self._file, rows[first:end], slots[first] * width)
        digest = self._digest
        for name, each, row in zip(names, found, rows):
            if digest(row) != each.digest:
                raise TierFailed(self.name, f"the record of page {name} was damaged")
        if self._codec is not None:
            self._coding.decode(torch.from_numpy(rows), out)

    def drop(self, pages: Ints) -> None:
        """See `ColdTier`. An empty file is cut to nothing."""
        kept = self._kept
        if not kept:
            return
        for page in pages.tolist():
            gone = kept.pop(page, None)
            if gone is not None:
                self._free.append(gone.slot)
        if not kept:
            self._free = []
            self._slots = 0
            if self._process != os.getpid():
                return
            with suppress(OSError):  # then it keeps its size, and is written over
                self._files.shorten(self._file, 0)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """See `ColdTier`: of the file."""
        return self._slots * self._coding.width

    def _check_process(self) -> None:
        """Raise TierFailed in a process that was forked: both would write to one file."""
        if self._process != os.getpid():
            raise TierFailed(self.name, f"its file is that of process {self._process}")

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors of the file system by their name here: TierFailed."""
        try:
            yield
        except EOFError as error:
            raise TierFailed(self.name, "its file was cut off") from error
        except OSError as error:
            what = error.strerror or type(error).__name__
            raise TierFailed(self.name, f"{what} in {self.folder!r}", error.errno) from error


def _hasher() -> Callable[[Any], bytes]:
    """A checksum of bytes. Raises MissingPackage."""
    try:
        import xxhash
    except ImportError as error:
        raise MissingPackage("a file of cold pages", "xxhash", "paged-kv[snapshot]") from error
    return xxhash.xxh3_128_digest

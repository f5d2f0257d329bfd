"""The recording of a worker's cache: where it goes, and how it begins and ends."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple

from paged_kv.cache import PagedKVCache
from paged_kv.recording import Recorder, record

GLOB = "worker-*.jsonl"


class Order(NamedTuple):
    """What a worker is to record, and where. A worker that is brought back begins another file."""

    folder: str
    worker: int
    life: int  # from 1
    title: str
    interval: float
    budget: float | None
    accesses: bool

    @property
    def path(self) -> Path:
        """The file of this life.

        >>> print(Order("run", 3, 1, "", 0.05, None, False).path.name)
        worker-3.jsonl
        >>> print(Order("run", 3, 2, "", 0.05, None, False).path.name)
        worker-3.2.jsonl
        """
        life = "" if self.life == 1 else f".{self.life}"
        return Path(self.folder) / f"worker-{self.worker}{life}.jsonl"


class Tape:
    """What a worker records, if anything."""

    def __init__(self) -> None:
        self._recorder: Recorder | None = None
        self._open = ExitStack()

    def start(self, cache: PagedKVCache, order: Order) -> None:
        """Record from now on. Raises OSError, also where the file is there: it is another run's."""
        Path(order.folder).mkdir(parents=True, exist_ok=True)
        self._recorder = self._open.enter_context(
            record(
                cache,
                order.path,
                title=order.title,
                labels={
                    "worker": str(order.worker),
                    "life": str(order.life),
                    "host": socket.gethostname(),
                    "pid": str(os.getpid()),
                },
                interval=order.interval,
                budget=order.budget,
                accesses=order.accesses,
                opener=_new,
            )
        )

    def note(self, verb: str) -> None:
        """A call was carried out."""
        if self._recorder is not None:
            self._recorder.mark(verb)

    def stop(self, reason: str) -> None:
        """Record no more. Without a recording that is fine."""
        recorder = self._recorder
        if recorder is None:
            return
        self._recorder = None
        recorder.snapshot("end")
        recorder.close(reason)
        self._open.close()


def _new(path: Path) -> IO[bytes]:
    return path.open("xb", buffering=0)

"""All workers of a pool record what their caches do, each to files of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from paged_kv.checks import flag
from paged_kv.errors import AlreadyRecording, BadArgument
from paged_kv.integrations.ray.gate import Gate
from paged_kv.integrations.ray.line import Line
from paged_kv.integrations.ray.tape import GLOB, Order
from paged_kv.recording.pace import check_pace

VERB = "record"
CLOSING_SECONDS = 10.0  # for the ends of files, where a worker is in the midst of something


@contextmanager
def taping(
    gate: Gate,
    lines: Mapping[int, Line],
    folder: str | os.PathLike[str],
    title: str | None,
    interval: float,
    budget: float | None,
    accesses: bool,
) -> Iterator[Path]:
    """Record within the block; all workers or none. `lines` may lose some meanwhile."""
    where = _checked(folder)
    check_pace(interval, budget)
    name = where.name if title is None else str(title)
    order = Order(str(where), 0, 1, name, interval, budget, flag("accesses", accesses))
    taped = list(lines.values())
    with _alone(gate):
        _start(taped, order)
    reason = "done"
    try:
        yield where
    except BaseException as error:
        reason = type(error).__name__
        raise
    finally:
        try:
            _finish(gate, taped, reason)
        except BaseException:  # as by Ctrl-C: no recording may go on that nobody can end
            _finish(gate, taped, reason)
            raise


def stop(lines: Sequence[Line], reason: str) -> None:
    """Have the files of these workers end, all at once. Twice is fine."""
    ending = [(line, line.end_recording(reason)) for line in lines]
    patience = time.monotonic() + CLOSING_SECONDS
    for line, ref in ending:
        if ref is not None:
            line.wait_for_end(ref, max(0.0, patience - time.monotonic()))


def _start(lines: Sequence[Line], order: Order) -> None:
    for line in lines:
        if line.order is not None:
            raise AlreadyRecording(line.order.path)
    try:
        for line in lines:
            title = f"{order.title}: worker {line.name}"
            line.record(order._replace(worker=line.name, title=title))
    except BaseException as error:
        stop(lines, type(error).__name__)
        raise


def _finish(gate: Gate, lines: Sequence[Line], reason: str) -> None:
    if gate.here and not gate.closed:  # else all is over, and ends were written
        with _alone(gate):
            stop(lines, reason)


@contextmanager
def _alone(gate: Gate) -> Iterator[None]:
    """A block that runs as a verb of the pool does."""
    gate.check(VERB)
    with gate.lock:
        gate.enter(VERB)
        yield


def _checked(folder: str | os.PathLike[str]) -> Path:
    """The folder, absolute: workers may run elsewhere. Raises BadArgument."""
    allowed = "a folder without recordings of workers, or the name of a new one"
    if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
        raise BadArgument("folder", folder, allowed)
    where = Path(folder).absolute()
    if where.exists() and (not where.is_dir() or any(where.glob(GLOB))):
        raise BadArgument("folder", folder, allowed)
    return where

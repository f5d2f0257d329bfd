"""Calls that leave the interpreter to others, as those to files do, on several threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Thread

WORTH = 1 << 22  # bytes that a second thread is worth its start for


def at_once(calls: Sequence[Callable[[], object]]) -> None:
    """Make some calls at once: the first on this thread, each other one on its own.

    All have ended when it returns, and when it raises what one of them raised; not where this
    thread is interrupted while it waits.
    """
    errors: list[BaseException] = []

    def make(call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = []
    try:
        for call in calls[1:]:
            threads.append(Thread(target=make, args=(call,), daemon=True))
            threads[-1].start()
        for call in calls[:1]:
            call()
    finally:
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    for error in errors:
        raise error

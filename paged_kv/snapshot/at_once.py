"""Calls that leave the interpreter to others, as those to files do, on several threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Thread

WORTH = 1 << 22  # bytes that a second thread is worth its start for


def at_once(calls: Sequence[Callable[[], object]]) -> None:
    """Make some calls at once: the first on this thread, each other one on its own.

    All have ended when it returns, and when it raises what one of them, or an interrupt, raised.
    """
    errors: list[BaseException] = []

    def make(call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [Thread(target=make, args=(call,), daemon=True) for call in calls[1:]]
    try:
        for thread in threads:
            thread.start()
        for call in calls[:1]:
            call()
    finally:
        _wait(threads, errors)
    for error in errors:
        raise error


def _wait(threads: Sequence[Thread], errors: list[BaseException]) -> None:
    """Until all that were started have ended, whatever interrupts: they write to files that are
    closed next.
    """
    while True:
        try:
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            return
        except BaseException as error:
            errors.append(error)

"""Numbered calls, each carried out once, whoever asks again."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from typing import Any

from paged_kv.errors import BadArgument, PagedKVError
from paged_kv.integrations.ray.calls import Call, Reply


class Once:
    """Carries out calls in the order of their numbers.

    >>> once = Once()
    >>> once.reply(Call(1, "count", b"", 0, ()), lambda: 7).value
    7
    >>> once.reply(Call(1, "count", b"", 0, ()), lambda: 8).value
    7
    """

    def __init__(self) -> None:
        self.calls = 0
        self.busy_seconds = 0.0
        self.last = Reply(0, None, None, None)

    def begin(self, number: int) -> Reply:
        """Be as one that has answered call `number`."""
        self.last = Reply(number, None, None, None)
        return self.last

    def is_known(self, call: Call) -> bool:
        """Whether this is the last call again. Raises BadArgument for one before it."""
        if call.number < self.last.number:
            raise BadArgument("call", call.number, f"a number above {self.last.number}")
        return call.number == self.last.number

    def reply(self, call: Call, work: Callable[[], Any]) -> Reply:
        """What `work` returns or raises; of the last call again, what it was."""
        if self.is_known(call):
            return self.last
        begun = time.perf_counter()
        reply = Reply(call.number, None, None, None)
        try:
            self.last = reply._replace(value=work())
        except Exception as error:  # a caller's own functions may raise whatever they like
            told = sendable(error).with_traceback(None)  # which would hold what it has seen
            self.last = reply._replace(error=told)
        self.busy_seconds += time.perf_counter() - begun
        self.calls += 1
        return self.last

    def amend(self, **fields: Any) -> Reply:
        """The last reply with other fields, also for who asks again."""
        self.last = self.last._replace(**fields)
        return self.last


def sendable(error: Exception) -> Exception:
    """An error that another process can read: one of this package as it is, all else as it is where
    it can be pickled, and as text where not.
    """
    if isinstance(error, PagedKVError):
        return error
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error

"""Waiting for a verb that another thread is in."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from paged_kv.errors import ConcurrentCall

T = TypeVar("T")
PAUSE = 0.0002  # seconds


def patiently(call: Callable[[], T]) -> T:
    """What `call` returns, as soon as no other thread is inside of a verb."""
    while True:
        try:
            return call()
        except ConcurrentCall:
            time.sleep(PAUSE)

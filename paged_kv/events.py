"""What a cache tells of: each verb, after the fact, with all that it changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from paged_kv.pages.change import Told


class Event(NamedTuple):
    """A verb that has ended. What changed is complete, whoever changed it.

    What is done beside the verb that was called is told as an event of its own: a `release` that
    was put off, a `clear` of an index that is gone, a `close` of a step that was given up, a
    `settle` of what an interrupt had left half done. `result` is what the verb returned, and not to
    be kept. In `told` None stands for "look at everything again": `settle` and `trim` tell that.
    """

    verb: str
    begin: float  # seconds, of `time.perf_counter`
    end: float
    failed: bool
    result: object
    told: Sequence[Told | None]


Listener = Callable[[Event], None]

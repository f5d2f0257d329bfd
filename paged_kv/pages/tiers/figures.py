"""What moved between frames and one other place."""

from __future__ import annotations


class Flow:
    """Counts of pages since the cache was made, and seconds."""

    def __init__(self) -> None:
        self.read = 0
        self.written = 0
        self.seconds_read = 0.0
        self.seconds_written = 0.0

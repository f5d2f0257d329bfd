"""A bar for calls that take long, where somebody looks."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

PATIENCE = 2.0  # seconds without a bar


def ticking(what: str, total: int, shown: bool) -> Any:
    """A bar, to be used as a context manager: told of work by `update(n)`.

    It appears after two seconds, on a terminal only, and is gone at the end.
    """
    hidden = None if shown else True
    return tqdm(total=total, desc=what, delay=PATIENCE, leave=False, disable=hidden)

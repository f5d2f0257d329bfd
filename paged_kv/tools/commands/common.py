"""What the commands share: checks of their arguments, and how they fail."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

LARGEST_SEED = 2**32 - 1  # numpy takes no larger one
MOST_THREADS = 1024


def _at_least(text: str, least: int, most: int | None = None) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least or (most is not None and value > most):
        top = "" if most is None else f" and at most {most}"
        raise argparse.ArgumentTypeError(
            f"{shortened(text)!r} is not a whole number of at least {least}{top}"
        )
    return value


def shortened(text: str) -> str:
    """What somebody typed, cut off where it would fill the screen.

    >>> shortened("9" * 50)
    '9999999999999999999999999999999999999999...'
    """
    return text if len(text) <= 40 else text[:40] + "..."


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    return _at_least(text, 1)


def two_or_more(text: str) -> int:
    """A whole number of at least 2, for argparse."""
    return _at_least(text, 2)  # one root step times the search, the next the cache


def seed(text: str) -> int:
    """A seed that every random generator takes, for argparse."""
    return _at_least(text, 0, LARGEST_SEED)


def threads(text: str) -> int:
    """A number of threads, for argparse."""
    return _at_least(text, 1, MOST_THREADS)


def file(text: str) -> Path:
    """The path of a file, for argparse; no name at all would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("'' is not the name of a file")
    return Path(text)


def unusable_device(device: str, torch: Any) -> str | None:
    """Why torch cannot use a device, or None."""
    try:
        torch.zeros(1, device=device).tolist()  # some devices hold no numbers
    except (RuntimeError, AssertionError) as error:
        return f"device {device!r} cannot be used: {str(error).splitlines()[0]}"
    return None


def save(path: Path, text: str) -> str | None:
    """Write what took long to find; where that fails, to another file, named in the complaint that
    is returned.
    """
    try:
        path.write_text(text)
        return None
    except OSError as error:
        complaint = f"cannot write to {str(path)!r}: {error.strerror}"
    import tempfile  # not at the top: it takes a tenth of the time of --help

    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="paged-kv-", suffix=path.suffix, delete=False
        ) as other:
            other.write(text)
    except OSError:
        return complaint
    return f"{complaint}; what was to be written is in {other.name}"


def missing_report() -> str | None:
    """What to install for the page, or None where all is there."""
    if all(importlib.util.find_spec(name) for name in ("altair", "jinja2", "vl_convert")):
        return None
    return "--html needs altair and vl-convert: pip install 'paged-kv[report]'"


def fail(message: str, status: int = 1) -> int:
    """Say what is wrong on standard error; returns the exit status."""
    print(f"paged-kv: {message}", file=sys.stderr)
    return status

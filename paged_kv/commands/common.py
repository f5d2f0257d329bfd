"""What the commands share: checks of their arguments, and how they fail."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any


def _at_least(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return value


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    return _at_least(text, 1)


def two_or_more(text: str) -> int:
    """A whole number of at least 2, for argparse."""
    return _at_least(text, 2)  # one root step times the search, the next the cache


def natural(text: str) -> int:
    """A whole number of at least 0, for argparse."""
    return _at_least(text, 0)


def unusable_device(device: str, torch: Any) -> str | None:
    """Why torch cannot use a device, or None."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        return f"device {device!r} cannot be used: {str(error).splitlines()[0]}"
    return None


def unusable_file(path: Path | None) -> str | None:
    """Why a file cannot be written, or None."""
    if path is None or (path.parent.is_dir() and not path.is_dir()):
        return None
    return f"cannot write to {str(path)!r}: {'it is a directory' if path.is_dir() else 'no such directory'}"


def missing_report() -> str | None:
    """What to install for the page, or None where all is there."""
    if all(importlib.util.find_spec(name) for name in ("altair", "jinja2", "vl_convert")):
        return None
    return "--html needs altair and vl-convert: pip install 'paged-kv[report]'"


def fail(message: str, status: int = 1) -> int:
    """Say what is wrong on standard error; returns the exit status."""
    print(f"paged-kv: {message}", file=sys.stderr)
    return status

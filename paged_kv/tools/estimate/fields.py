"""Fields of a transformer's configuration, one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]
Sizes = Mapping[str, int | None]  # by name; None where the configuration does not say it


class Unlike(Exception):
    """Why a configuration says nothing reliable of its cache."""


def whole(config: Config, name: str, least: int | None = None) -> int:
    """A whole number of a configuration. Raises Unlike where it is something else, or too small."""
    value = config.get(name)
    if type(value) is not int or (least is not None and value < least):
        at_least = "" if least is None else f" of at least {least}"
        raise Unlike(f"its {name} is {value!r}, allowed is a whole number{at_least}")
    return value


def per_head(width: int | None, heads: int | None) -> int | None:
    """The numbers of a head, None where one of the two is not known. Raises Unlike.

    >>> per_head(768, 12)
    64
    """
    if width is None or heads is None:
        return None
    if heads < 1 or width % heads:
        raise Unlike(f"{heads} heads do not divide a width of {width}")
    return width // heads

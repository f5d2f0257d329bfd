"""Which transformers is installed: told by what its `Cache` can do, not by its number alone.

The interface moved between 4.57 and 5.24: names of arguments, and what `crop` takes. One source
serves both, by these few facts. A version that was not tested but answers in one of these ways is
used, with a warning; one that answers in another way is refused by name.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, NamedTuple

import transformers
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin

from paged_kv.errors import UnsupportedVersion

TESTED = ("4.57.6", "5.24.0")
OLDEST = (4, 57)
NEWEST = (5, 24)
CACHE_NAMES = ("cache", "past_key_values")  # of the argument of `forward`, the newer one first
WHAT_CROP_TAKES = {"max_length": False, "tokens_to_remove": True}


class Interface(NamedTuple):
    """What differs between versions."""

    cache_argument: str  # of `forward` and `generate`, and of what they return
    crop_removes: bool  # `crop(-n)` takes n tokens off; else `crop(n)` leaves n


def probe(cache: Any, generation: Any) -> Interface:
    """How a `Cache` class and the class with `generate` are to be talked to.

    Raises UnsupportedVersion where they answer in no known way.
    """
    needed = ("update", "get_seq_length", "get_mask_sizes", "reorder_cache", "crop")
    lacking = [name for name in needed if not hasattr(cache, name)]
    if lacking:
        raise _unknown(f"whose Cache has no {', '.join(lacking)}")
    inputs = signature(generation.prepare_inputs_for_generation).parameters
    argument = _first(CACHE_NAMES, inputs)
    if argument is None:
        raise _unknown(f"whose models take none of {', '.join(CACHE_NAMES)}")
    meaning = _first(tuple(WHAT_CROP_TAKES), signature(cache.crop).parameters)
    if meaning is None:
        raise _unknown(f"whose crop() takes none of {', '.join(WHAT_CROP_TAKES)}")
    return Interface(argument, WHAT_CROP_TAKES[meaning])


def _first(names: Sequence[str], known: Mapping[str, object]) -> str | None:
    return next((name for name in names if name in known), None)


def _unknown(why: str) -> UnsupportedVersion:
    return UnsupportedVersion("transformers", f"{transformers.__version__}, {why},", TESTED)


def warn_of(version: str) -> None:
    """Warn where a version lies outside of what was tested."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if not OLDEST <= numbers <= NEWEST:
        warnings.warn(
            f"transformers {version} is installed; paged_kv was tested with {', '.join(TESTED)}. "
            "Its Cache looks like one of these, so it is used",
            RuntimeWarning,
            stacklevel=3,
        )


def cache_argument(model: Any) -> str | None:
    """The name under which a model's `forward` takes its cache; None where it takes none."""
    return _first(CACHE_NAMES, signature(model.forward).parameters)


FOUND = probe(Cache, GenerationMixin)
warn_of(transformers.__version__)

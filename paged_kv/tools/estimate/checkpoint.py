"""What else a worker needs of a language model: how many weights it has, and how wide it is."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from paged_kv.errors import BadConfig

WIDTHS = ("hidden_size", "n_embd", "d_model")
INSIDE = ("text_config", "llm_config", "language_config")
LONGEST = 100 << 20  # bytes of the header of a file, as the format has it
LENGTH = 8  # bytes that say how long a header is


class Checkpoint(NamedTuple):
    """Of a folder; None where it does not say."""

    weights: int | None
    hidden_size: int | None


def checkpoint(path: Path) -> Checkpoint:
    """What a folder with config.json and `*.safetensors` holds; of a lone file, its width.

    Only the headers of the weights are read. Raises BadConfig for those that cannot be.
    """
    named = path / "config.json" if path.is_dir() else path
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    weights = sum(map(_weights, files)) if files else None
    return Checkpoint(weights, _width(json.loads(named.read_text(encoding="utf-8"))))


def _width(config: dict[str, Any]) -> int | None:
    parts: list[Any] = [config, *(config.get(name) for name in INSIDE)]
    for part in parts:
        for name in WIDTHS if isinstance(part, dict) else ():
            value = part.get(name)
            if type(value) is int and value > 0:
                return value
    return None


def _weights(file: Path) -> int:
    """Numbers of all tensors of a file."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(LENGTH), "little")
            tensors = json.loads(opened.read(min(length, LONGEST)))
        shapes = [each["shape"] for name, each in tensors.items() if name != "__metadata__"]
        return sum(prod(shape) for shape in shapes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadConfig(file, f"its header cannot be read: {error}") from None

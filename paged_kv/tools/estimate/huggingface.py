"""Workloads out of the config.json of a transformer, as Hugging Face's libraries write it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from paged_kv.errors import BadConfig
from paged_kv.tools.estimate.architectures import known, shape
from paged_kv.tools.estimate.configs import unreadable
from paged_kv.tools.estimate.fields import Config, Unlike
from paged_kv.tools.estimate.workload import DTYPES

# What the fields are called where they come from.
TRANSFORMERS_NAMES = {
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "head_size": "head_dim or hidden_size",
}
INSIDE = ("text_config", "llm_config", "language_config")  # of models of more than text
# whose sliding_window holds in all layers
WHOLLY_SLIDING = {"mistral", "mixtral", "starcoder2", "phi3"}


class Found(NamedTuple):
    """The fields of a workload that a file gives, and what to know of them."""

    fields: dict[str, Any]
    notes: tuple[str, ...]


class LanguageModel(NamedTuple):
    """The part of a configuration that is about text, and its type."""

    config: Config
    kind: str | None


def transformers(path: Path) -> Found:
    """The fields of a transformer's config.json, or of the one in a folder. A window that slides in
    all layers is the context. Raises BadConfig where the file cannot be read, or what the model
    keeps of a token is not known.
    """
    file = path
    try:
        file = path / "config.json" if path.is_dir() else path
        whole = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(file, error) from None
    except (ValueError, RecursionError) as error:
        raise BadConfig(file, f"it is no JSON: {error}") from None
    if not isinstance(whole, dict):
        raise BadConfig(file, "it holds no JSON object")
    try:
        return _found(whole)
    except Unlike as why:
        raise BadConfig(file, str(why)) from None


def _found(whole: Config) -> Found:
    model = _language_model(whole)
    kept = shape(model.config, model.kind)
    dtype = _dtype(whole, model.config)
    found = {
        "layers": kept.layers,
        "heads": kept.heads,
        "head_size": kept.head_size,
        "kv_heads": kept.kv_heads,
        "value_head_size": kept.value_head_size,
        "context": _sliding_window(model),
        "dtype": dtype,
    }
    fields = {field: value for field, value in found.items() if value is not None}
    return Found(fields, kept.notes)


def _language_model(whole: Config) -> LanguageModel:
    kind = _kind(whole)
    if kind in known()["cross"]:
        return LanguageModel(whole, kind)
    inside = known()["inside"].get(kind)
    for name in INSIDE:
        if isinstance(whole.get(name), Mapping):
            return LanguageModel(whole[name], _kind(whole[name]) or inside)
    return LanguageModel(whole, inside or kind)


def _kind(config: Config) -> str | None:
    kind = config.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise Unlike(f"its model_type is {kind!r}, allowed is text")
    return kind


def _sliding_window(model: LanguageModel) -> int | None:
    """The window of a model in which every layer slides. A page holds all layers: where one does
    not slide, none does.
    """
    window = model.config.get("sliding_window")
    kinds = model.config.get("layer_types")
    if type(window) is not int or model.config.get("use_sliding_window") is False:
        return None
    if isinstance(kinds, list):
        slides = set(kinds) == {"sliding_attention"}
    else:
        slides = model.kind in WHOLLY_SLIDING
    return window if slides else None


def _dtype(*configs: Config) -> str | None:
    """The first that is named; that of the whole model counts for its parts."""
    for config in configs:
        for name in ("dtype", "torch_dtype"):
            if config.get(name) is not None:
                return _named(name, config[name])
    return None


def _named(field: str, value: object) -> str:
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise Unlike(f"its {field} is {value!r}, allowed is {', '.join(DTYPES)}")
    return name

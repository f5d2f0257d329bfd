"""Where a family of transformers differs from the common rule: which of its layers and heads keep
keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from paged_kv.tools.estimate.fields import Config, Sizes, Unlike, per_head, whole

Layers = Callable[[Config, Sizes], int | None]

KEEPING = {"full_attention", "sliding_attention", "chunked_attention", "attention", "hybrid"}
WITHOUT = {"linear_attention", "mamba", "mamba2", "conv", "recurrent", "moe", "mlp"}
KINDS = ("layer_types", "layers_block_type")  # where a configuration lists its layers, by kind
PATTERN = {"*": "full_attention", "M": "mamba", "-": "mlp", "E": "moe"}  # nemotron_h's letters


def keeping(config: Config, kind: str, sizes: Sizes) -> int | None:
    """Layers that keep keys and values of their own. Raises Unlike where there is none."""
    found = listed(config)
    if found is None and kind in LAYERS:
        found = LAYERS[kind](config, sizes)
    elif found is None:
        found = sizes.get("layers")
    if found is None:
        return None
    found -= sizes.get("unshared") or 0
    if found < 1:
        raise Unlike("none of its layers keeps keys and values")
    return found


def listed(config: Config) -> int | None:
    """Layers that keep keys and values, of those that a configuration lists by kind."""
    name = next((name for name in KINDS if config.get(name) is not None), None)
    return None if name is None else _count(name, config[name])


def _count(name: str, kinds: Any) -> int:
    if not isinstance(kinds, list):
        raise Unlike(f"its {name} is {kinds!r}, allowed is a list")
    texts = [kind if isinstance(kind, str) else repr(kind) for kind in kinds]
    strange = sorted({repr(kind) for kind in texts if kind not in KEEPING | WITHOUT})
    if strange:
        raise Unlike(f"there is no rule for the {', '.join(strange)} of its {name}")
    return sum(kind in KEEPING for kind in texts)


def _every(config: Config, sizes: Sizes) -> int | None:
    """The last of so many layers attends."""
    layers = sizes["layers"]
    interval = _number(config, "full_attention_interval", 4)
    return None if layers is None else layers // interval


def _period(config: Config, sizes: Sizes) -> int | None:
    """One of so many layers attends, the first one at an offset."""
    layers = sizes["layers"]
    period = _number(config, "attn_layer_period", 8)
    offset = _number(config, "attn_layer_offset", 4, least=0)
    return None if layers is None else len(range(offset, layers, period))


def _indices(name: str, *, otherwise: str | None = None) -> Layers:
    """The layers that a list names attend; without one as many as a size says, or none."""

    def counted(config: Config, sizes: Sizes) -> int | None:
        found = config.get(name)
        if found is None:
            return sizes.get(otherwise) if otherwise else 0
        if not isinstance(found, list) or not all(type(index) is int for index in found):
            raise Unlike(f"its {name} is {found!r}, allowed is a list of whole numbers")
        return len(set(found))

    return counted


def _pattern(config: Config, sizes: Sizes) -> int | None:
    """A letter a layer."""
    letters = config.get("hybrid_override_pattern")
    if not isinstance(letters, str):
        raise Unlike(f"its hybrid_override_pattern is {letters!r}, allowed is text")
    return _count("hybrid_override_pattern", [PATTERN.get(letter, letter) for letter in letters])


def _alternate(config: Config, sizes: Sizes) -> int | None:
    layers = sizes["layers"]
    return None if layers is None else (layers + 1) // 2


def _number(config: Config, name: str, otherwise: int, least: int = 1) -> int:
    return otherwise if config.get(name) is None else whole(config, name, least)


def _kimi(config: Config, sizes: Sizes) -> int | None:
    inner = config.get("linear_attn_config")
    if not isinstance(inner, Mapping):
        return _must_list(config, sizes)
    return _indices("full_attn_layers")(inner, sizes)


def _must_list(config: Config, sizes: Sizes) -> int | None:
    raise Unlike(f"it has no {' and no '.join(KINDS)}, which say what layers attend")


LAYERS: dict[str, Layers] = {
    "bailing_hybrid": _must_list,
    "bamba": _indices("attn_layer_indices"),
    "granitemoehybrid": _must_list,
    "jamba": _period,
    "kimi_linear": _kimi,
    "lfm2": _indices("full_attn_idxs", otherwise="layers"),
    "lfm2_moe": _must_list,
    "minimax": _alternate,
    "nemotron_h": _pattern,
    "olmo_hybrid": _must_list,
    "qwen3_5_moe_text": _every,
    "qwen3_5_text": _every,
    "qwen3_next": _every,
    "zamba": _must_list,
    "zamba2": _must_list,
}


# -- heads


def _falcon(config: Config, heads: int | None) -> int | None:
    if config.get("new_decoder_architecture"):  # its few heads are repeated before they are kept
        return heads
    if config.get("multi_query", True):
        return 1
    return heads if config.get("num_kv_heads") is None else whole(config, "num_kv_heads")


def _gpt_bigcode(config: Config, heads: int | None) -> int | None:
    return 1 if config.get("multi_query", True) else heads


def _mpt(config: Config, heads: int | None) -> int | None:
    inner = config.get("attn_config")
    kind = inner.get("attn_type") if isinstance(inner, Mapping) else None
    if kind not in (None, "multihead_attention"):
        raise Unlike(f"there is no rule for its attn_type {kind!r}")
    return heads


HEADS: dict[str, Callable[[Config, int | None], int | None]] = {
    "falcon": _falcon,
    "gpt_bigcode": _gpt_bigcode,
    "mpt": _mpt,
}


def _twice(config: Config, sizes: Sizes) -> int | None:
    """They attend to the embedding beside the state of the layer before."""
    if config.get("attention_head_dim") is not None:
        return whole(config, "attention_head_dim")
    width = sizes["width"]
    return None if width is None else per_head(2 * width, sizes["heads"])


HEAD_SIZES: dict[str, Callable[[Config, Sizes], int | None]] = {"zamba": _twice, "zamba2": _twice}

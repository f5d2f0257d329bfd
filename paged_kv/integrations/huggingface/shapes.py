"""What a model needs of a cache, read from its configuration; and which models cannot be paged."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from paged_kv.cache import PagedKVCache
from paged_kv.errors import UnsupportedModel
from paged_kv.integrations.huggingface.versions import cache_argument

FULL = "full_attention"
SLIDING = "sliding_attention"


class ModelShape(NamedTuple):
    """What a model stores for each token, and how far its layers look back.

    `windows`: of each layer, the tokens that one sees, itself included; None where it sees all.
    `positions`: the longest path; None where nothing bounds it. `soft_cap`: of attention scores.
    """

    layers: int
    heads: int  # of keys and values
    head_size: int
    value_head_size: int
    windows: tuple[int | None, ...]
    soft_cap: float | None
    positions: int | None
    vocabulary: int
    dtype: torch.dtype
    device: torch.device

    def pages(self, *, page_size: int = 2, **options: Any) -> PagedKVCache:
        """An empty cache for this model; `options` are those of `PagedKVCache`."""
        return PagedKVCache(
            layers=self.layers,
            heads=self.heads,
            head_size=self.head_size,
            value_head_size=self.value_head_size,
            page_size=page_size,
            dtype=self.dtype,
            device=self.device,
            **options,
        )


def shape_of(model: Any) -> ModelShape:
    """What `model` needs, whatever its head. Raises UnsupportedModel, which says why.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...                      num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
    >>> shape_of(LlamaForCausalLM(config))[:4]
    (2, 2, 8, 8)
    """
    base = decoder_of(model)
    config = base.config.get_text_config(decoder=True)
    _check_kind(model, base, config)
    heads = config.num_attention_heads
    kinds = _kinds(model, config)
    window = getattr(config, "sliding_window", None)
    key_size, value_size = _head_sizes(model, config, heads)
    return ModelShape(
        layers=config.num_hidden_layers,
        heads=_one(model, "K/V heads", getattr(config, "num_key_value_heads", None) or heads),
        head_size=key_size,
        value_head_size=value_size,
        windows=tuple(window if kind == SLIDING else None for kind in kinds),
        soft_cap=getattr(config, "attn_logit_softcapping", None),
        positions=getattr(config, "max_position_embeddings", None),
        vocabulary=config.vocab_size,
        dtype=base.dtype,
        device=_device(model, base),
    )


def decoder_of(model: Any) -> Any:
    """The part of a model with the layers: without its head, and without an adapter around it."""
    while hasattr(model, "get_base_model"):  # of PEFT
        model = model.get_base_model()
    base = model.base_model
    # some name it otherwise than their class says
    return model.get_decoder() if base is model and hasattr(model, "lm_head") else base


def attends_through_interface(model: Any) -> bool:
    """Whether its attention is a function that transformers lets others choose."""
    return bool(getattr(decoder_of(model), "_supports_attention_backend", False))


def _check_kind(model: Any, base: Any, config: Any) -> None:
    """Raise UnsupportedModel where there is more to keep than keys and values of each layer."""
    if getattr(base.config, "is_encoder_decoder", False):
        raise UnsupportedModel(model, "it is an encoder with a decoder, whose K/V are of two kinds")
    if getattr(base, "_is_stateful", False):
        raise UnsupportedModel(
            model, "some of its layers keep a state, which cannot be shared by pages"
        )
    if cache_argument(base) is None:
        raise UnsupportedModel(model, "its forward() takes no cache")
    if getattr(config, "num_kv_shared_layers", None) or getattr(config, "kv_sharing_modes", None):
        raise UnsupportedModel(model, "some of its layers share the K/V of others")
    if _looks_ahead(base) or getattr(config, "use_bidirectional_attention", None):
        raise UnsupportedModel(model, "its attention looks ahead: K/V change with what follows")


def _looks_ahead(base: Any) -> bool:
    """Whether some layer attends to what comes later: its attention says so in one of two ways."""
    return any(
        getattr(module, "is_causal", True) is False or getattr(module, "is_decoder", True) is False
        for module in base.modules()
    )


def _kinds(model: Any, config: Any) -> list[str]:
    """How each layer attends. Raises UnsupportedModel where one neither sees all nor a window."""
    layers = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        windowed = getattr(config, "sliding_window", None) is not None
        kinds = [SLIDING if windowed else FULL] * layers
    other = sorted(set(kinds) - {FULL, SLIDING})
    if other:
        raise UnsupportedModel(model, f"it has layers of {', '.join(other)}")
    return list(kinds)


def _head_sizes(model: Any, config: Any, heads: int) -> tuple[int, int]:
    """Of keys and of values."""
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    if getattr(config, "kv_lora_rank", None) is not None:  # keys in two parts, one of them rotated
        size = config.qk_nope_head_dim + config.qk_rope_head_dim
    value_size = getattr(config, "v_head_dim", None) or size
    return _one(model, "head sizes", size), _one(model, "head sizes", value_size)


def _one(model: Any, what: str, value: Any) -> int:
    """A number that all layers share."""
    if isinstance(value, (list, tuple)):
        if len(set(value)) != 1:
            raise UnsupportedModel(model, f"its layers differ in {what}: {sorted(set(value))}")
        value = value[0]
    return int(value)


def _device(model: Any, base: Any) -> torch.device:
    """Where it lies. Raises UnsupportedModel where that is in several places."""
    placed = getattr(model, "hf_device_map", None) or {}
    devices: set[torch.device] = {parameter.device for parameter in base.parameters()}
    if len(set(placed.values())) > 1 or len(devices) != 1:
        found = sorted({str(device) for device in [*placed.values(), *devices]})
        raise UnsupportedModel(model, f"it lies on several devices: {', '.join(found)}")
    return devices.pop()

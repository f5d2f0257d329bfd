"""What a transformer's cache keeps of a token, by the model's type: how many layers keep keys and
values, of how many heads and numbers.

The sizes that a model reads, and those it has where its configuration says nothing, are data that
`benchmarks/architectures.py` finds with transformers' own models (see `paged_kv/tools/data`). In
which layers and heads a family differs from that is said here. What nobody measured is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources

from paged_kv.tools.estimate.families import HEAD_SIZES, HEADS, keeping, listed
from paged_kv.tools.estimate.fields import Config, Sizes, Unlike, per_head, whole

# What a size is called, the commonest name first.
NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"),
    "kv_heads": ("num_key_value_heads",),
    "width": ("hidden_size", "n_embd", "d_model", "n_embed", "emb_dim"),
    "head_size": ("head_dim",),
    "latent": ("kv_lora_rank",),
    "rope": ("qk_rope_head_dim",),
    "nope": ("qk_nope_head_dim",),
    "value": ("v_head_dim",),
    "unshared": ("num_kv_shared_layers",),
}
PLAIN = ("layers", "heads", "kv_heads", "width", "head_size")
# Parts of names that tell of a cache unlike Llama's. Llama's own have none of them.
FOREIGN = (
    "attn_config",
    "attn_layer",
    "attn_type",
    "block_configs",
    "block_type",
    "compress",
    "conv_",
    "cross_attention",
    "cross_layer",
    "d_head",
    "d_kv",
    "dim_head",
    "full_attention_interval",
    "full_attn",
    "global_head_dim",
    "head_kv",
    "hybrid",
    "indexer",
    "kv_channels",
    "kv_head",
    "kv_lora",
    "kv_share",
    "linear_",
    "mamba",
    "multi_query",
    "new_decoder_architecture",
    "pattern",
    "query_group",
    "recurrent",
    "rwkv",
    "ssm",
    "state_size",
)


@dataclass(frozen=True)
class Shape:
    """What is kept of a token; None where the configuration does not say it. `notes` say what
    somebody who relies on it should know.
    """

    layers: int | None
    heads: int | None
    kv_heads: int | None
    head_size: int | None
    value_head_size: int | None = None
    notes: tuple[str, ...] = ()


@cache
def known() -> Config:
    """What was measured: the sizes of `models`; the type of the language model inside of others, by
    `inside`; types that keep nothing of their tokens, have cross-attention, or fit no rule.
    """
    text = resources.files("paged_kv.tools.data").joinpath("architectures.json").read_text("utf-8")
    found: Config = json.loads(text)
    return found


def shape(config: Config, kind: str | None) -> Shape:
    """What a model of this type keeps of a token. Raises Unlike where there is no rule for it."""
    _refuse(config, kind)
    if kind is None or kind not in known()["models"]:
        return _like_llama(config, kind)
    sizes = _sizes(config, known()["models"][kind])
    if "latent" in sizes:
        found = _latent(sizes)
    else:
        found = _plain(sizes)
    if kind in HEADS:
        found = replace(found, kv_heads=HEADS[kind](config, found.heads))
    if kind in HEAD_SIZES:
        found = replace(found, head_size=HEAD_SIZES[kind](config, sizes))
    layers = keeping(config, kind, sizes)
    if layers != found.layers:
        found = replace(found, layers=layers, notes=(*found.notes, _left_out(layers, sizes)))
    return found


def _refuse(config: Config, kind: str | None) -> None:
    if config.get("is_encoder_decoder") is True or kind in known()["cross"]:
        raise Unlike(
            f"{kind} has cross-attention, whose keys and values are of other tokens than the tree's"
        )
    if kind in known()["without"]:
        raise Unlike(f"{kind} keeps no keys and values of its tokens")
    if kind in known()["unlike"]:
        raise Unlike(f"there is no rule for the cache of {kind}")


def _sizes(config: Config, defaults: Config) -> dict[str, int | None]:
    """The sizes that a model reads, each from the file or else the model's own."""
    return {
        size: default if (given := _given(config, size)) is None else given
        for size, default in defaults.items()
    }


def _given(config: Config, size: str) -> int | None:
    for name in NAMES[size]:
        if config.get(name) is not None:
            return whole(config, name)
    return None


def _plain(sizes: Sizes) -> Shape:
    """Keys and values of a head have one size, all layers are alike."""
    heads = sizes.get("heads")
    size = sizes.get("head_size") or per_head(sizes.get("width"), heads)
    kv_heads = sizes.get("kv_heads")
    return Shape(sizes.get("layers"), heads, kv_heads, size)


def _latent(sizes: Sizes) -> Shape:
    """Latent attention: one vector a layer, that all heads share, and the part that turns with the
    position.
    """
    given = {name: size for name, size in sizes.items() if size is not None}
    note = "keys and values are counted as the latent vectors that transformers 5.24 keeps"
    if given.keys() >= {"heads", "latent", "rope", "nope", "value"}:
        of_all_heads = given["heads"] * (given["nope"] + given["rope"] + given["value"])
        times = of_all_heads / (given["latent"] + given["rope"])
        note += (
            "; code that keeps those of all heads instead, as transformers 4 does, takes "
            f"{times:.1f} times as much"
        )
    return Shape(sizes["layers"], sizes["heads"], 1, sizes["latent"], sizes["rope"], (note,))


def _like_llama(config: Config, kind: str | None) -> Shape:
    foreign = sorted(
        name
        for name, value in config.items()
        if value not in (None, False) and any(part in name for part in FOREIGN)
    )
    if foreign:
        raise Unlike(f"there is no rule for {_called(kind)} with its {', '.join(foreign)}")
    sizes = {size: _given(config, size) for size in PLAIN}
    note = f"there is no rule for {_called(kind)}: it is counted as if it were a Llama"
    found = _plain(sizes)
    layers = listed(config)
    if layers is not None and layers != found.layers:
        raise Unlike(f"there is no rule for {_called(kind)} with layers that do not attend")
    return replace(found, notes=(note,))


def _called(kind: str | None) -> str:
    return "a model of no type" if kind is None else f"the type {kind!r}"


def _left_out(layers: int | None, sizes: Sizes) -> str:
    whole = "its" if sizes.get("layers") is None else f"its {sizes['layers']}"
    return (
        f"{layers} of {whole} layers keep keys and values of their own; what the others keep is "
        "not in it"
    )

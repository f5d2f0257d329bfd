"""The models that are measured, and tokens for them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.utils import logging

from paged_kv.integrations.huggingface import FOUND, shape_of

FOLDER = "PAGED_KV_SMOLLM2"
PROSE = Path(__file__).resolve().parents[2] / "docs" / "how_it_works.md"


def named_folder(folder: Path | None) -> Path | None:
    """The folder that the command or the environment names."""
    named = os.environ.get(FOLDER)
    return Path(named) if folder is None and named else folder


def language_model(folder: Path | None) -> Any:
    """The language model of a folder, in float32. Raises SystemExit where there is none."""
    folder = named_folder(folder)
    if folder is None or not (folder / "config.json").is_file():
        raise SystemExit(
            f"{folder or 'no folder'}: --model, or ${FOLDER}, names a folder with SmolLM2-135M as "
            "save_pretrained() leaves it"
        )
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tiny_model() -> Any:
    """A random Llama of two layers, for what is only counted."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32_768,
        max_position_embeddings=8192,
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def facts(model: Any) -> dict[str, Any]:
    """What a reader wants to know of a model."""
    shape = shape_of(model)
    return {
        "class": type(model).__name__,
        "parameters": sum(weights.numel() for weights in model.parameters()),
        "layers": shape.layers,
        "heads": model.config.num_attention_heads,
        "kv_heads": shape.heads,
        "head_size": shape.head_size,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "token_bytes": 2 * shape.layers * shape.heads * shape.head_size * shape.dtype.itemsize,
    }


def random_rows(model: Any, rows: int, length: int, seed: int) -> list[list[int]]:
    """Rows of random tokens, none of them one of the first few, which may be special."""
    made = torch.Generator().manual_seed(seed)
    vocabulary = shape_of(model).vocabulary
    return torch.randint(vocabulary // 8, vocabulary, (rows, length), generator=made).tolist()


def prose(model: Any, folder: Path | None, length: int) -> list[int]:
    """The first tokens of a page of this project; random ones where the model has no tokenizer."""
    found = named_folder(folder)
    if found is None or not (found / "tokenizer.json").is_file():
        return random_rows(model, 1, length, seed=0)[0]
    text = PROSE.read_text().split("\n\n", 1)[1]
    tokens: list[int] = AutoTokenizer.from_pretrained(found)(text)["input_ids"]
    return tokens[:length]


def dynamic_cache(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """A `DynamicCache` that holds K and V of each layer [B, heads, n, size]."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(pairs):
        cache.update(keys, values, layer)
    return cache


def as_argument(cache: Any) -> dict[str, Any]:
    """A cache as an argument of `forward` and `generate`."""
    return {FOUND.cache_argument: cache}


def held_bytes(cache: Any) -> int:
    """What the tensors of a `DynamicCache` occupy."""
    tensors = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    return sum(part.untyped_storage().nbytes() for part in tensors if part is not None)

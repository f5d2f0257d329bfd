"""Tiny random models of every family, made in memory: the same weights each time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 61
SPECIAL = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,  # else tokens repeat themselves
}
BODY = {
    **SPECIAL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def _gemma3() -> Any:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**BODY, head_dim=12, sliding_window=5, layer_types=kinds)
    )


MAKERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**BODY)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**SPECIAL, n_embd=32, n_layer=3, n_head=4, n_positions=128)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**BODY, sliding_window=6)),
    "gemma3": _gemma3,
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**BODY, use_sliding_window=False)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**BODY, head_dim=12)),
}
FAMILIES = tuple(MAKERS)


@cache
def tiny_model(
    family: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Any:
    """A model in evaluation mode whose weights are large enough for its tokens to differ."""
    state = torch.random.get_rng_state()
    torch.manual_seed(20)
    model = MAKERS[family]()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    torch.random.set_rng_state(state)
    model.generation_config.pad_token_id = 0
    model.set_attn_implementation(attention)
    return model.to(dtype).to(device).eval()

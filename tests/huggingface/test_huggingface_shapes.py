"""What models need, and which are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import BODY, FAMILIES, SPECIAL, tiny_model
from transformers import (
    BertConfig,
    BertModel,
    Gemma3nTextConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    JambaConfig,
    JambaForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nForCausalLM

from paged_kv.errors import UnsupportedModel
from paged_kv.integrations.huggingface import shape_of
from paged_kv.integrations.huggingface.shapes import attends_through_interface

SIZES = {  # layers, K/V heads, key size, value size
    "llama": (3, 2, 8, 8),
    "gpt2": (3, 4, 8, 8),
    "mistral": (3, 2, 8, 8),
    "gemma3": (3, 2, 12, 12),
    "qwen2": (3, 2, 8, 8),
    "qwen3": (3, 2, 12, 12),
}
WINDOWS = {"mistral": (6, 6, 6), "gemma3": (5, None, 5)}


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_are_those_of_what_the_model_stores(family: str) -> None:
    model = tiny_model(family)
    shape = shape_of(model)
    with torch.no_grad():
        stored = model(torch.ones(1, 2, dtype=torch.long), use_cache=True)
    layers = getattr(stored, "cache", None) or stored.past_key_values
    assert shape[:4] == SIZES[family]
    assert len(layers) == shape.layers
    for layer in layers.layers:
        assert layer.keys.shape == (1, shape.heads, 2, shape.head_size)
        assert layer.values.shape == (1, shape.heads, 2, shape.value_head_size)
    assert shape.windows == WINDOWS.get(family, (None, None, None))
    assert (shape.dtype, shape.device.type) == (torch.float32, "cpu")
    assert (shape.positions, shape.vocabulary) == (128, 61)
    assert attends_through_interface(model)


def test_windows_of_some_layers_only() -> None:
    config = Qwen2Config(**BODY, use_sliding_window=True, sliding_window=7, max_window_layers=1)
    assert shape_of(Qwen2ForCausalLM(config)).windows == (None, 7, 7)


@pytest.mark.parametrize("head", [LlamaForSequenceClassification, GPT2ForSequenceClassification])
def test_a_head_that_is_no_language_model(head: Any) -> None:
    family = "llama" if head is LlamaForSequenceClassification else "gpt2"
    model = head(tiny_model(family).config)
    assert shape_of(model)[:4] == SIZES[family]
    assert shape_of(model.base_model)[:4] == SIZES[family]


def test_the_cache_is_made_to_measure() -> None:
    model = tiny_model("qwen3", dtype=torch.bfloat16)
    pages = shape_of(model).pages(page_size=2, num_pages=5)
    assert (pages.layers, pages.heads, pages.head_size, pages.page_size) == (3, 2, 12, 2)
    assert (pages.dtype, pages.pages_reserved) == (torch.bfloat16, 5)


class Adapted(torch.nn.Module):
    """A model inside of an adapter, as PEFT has it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def get_base_model(self) -> Any:
        return self.model


def test_an_adapter_around_the_model_is_looked_through() -> None:
    assert shape_of(Adapted(tiny_model("llama")))[:4] == SIZES["llama"]


def jamba() -> Any:
    return JambaForCausalLM(
        JambaConfig(**BODY, mamba_d_state=4, mamba_expand=1, num_experts=1, use_mamba_kernels=False)
    )


def mamba() -> Any:
    return MambaForCausalLM(MambaConfig(**SPECIAL, hidden_size=16, num_hidden_layers=1))


def t5() -> Any:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )


def gemma3n() -> Any:
    config = Gemma3nTextConfig(
        **{**BODY, "num_hidden_layers": 4},
        head_dim=8,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=SPECIAL["vocab_size"],
        hidden_size_per_layer_input=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
    )
    return Gemma3nForCausalLM(config)


def llama4() -> Any:
    config = Llama4TextConfig(
        **BODY, head_dim=8, intermediate_size_mlp=48, num_local_experts=1, attention_chunk_size=4
    )
    return Llama4ForCausalLM(config)


def bert() -> Any:
    return BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (mamba, "some of its layers keep a state"),
        (jamba, "some of its layers keep a state"),
        (t5, "it is an encoder with a decoder"),
        (gemma3n, "some of its layers share the K/V of others"),
        (llama4, "it has layers of chunked_attention"),
        (bert, "its attention looks ahead"),
    ],
)
def test_what_cannot_be_paged_is_refused_by_name(make: Any, why: str) -> None:
    model = make()
    with pytest.raises(
        UnsupportedModel, match=f"{type(model).__name__} cannot run on pages: {why}"
    ):
        shape_of(model)


def test_a_model_on_several_devices_is_refused() -> None:
    model = LlamaForSequenceClassification(tiny_model("llama").config)
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    with pytest.raises(UnsupportedModel, match="it lies on several devices: 0, 1, cpu"):
        shape_of(model)
    del model.hf_device_map
    model.model.norm.to("meta")
    with pytest.raises(UnsupportedModel, match="it lies on several devices: cpu, meta"):
        shape_of(model)


def test_layers_that_differ_are_refused() -> None:
    model = LlamaForSequenceClassification(tiny_model("llama").config)
    told = SimpleNamespace(**model.config.to_dict(), _attn_implementation="sdpa")
    told.num_key_value_heads = [1, 2, 2]
    told.get_text_config = lambda decoder: told
    model.base_model.config = told
    with pytest.raises(UnsupportedModel, match=r"its layers differ in K/V heads: \[1, 2\]"):
        shape_of(model)


def test_a_model_whose_attention_is_its_own() -> None:
    assert not attends_through_interface(mamba())


def test_gpt2_positions() -> None:
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9, n_positions=17)
    assert shape_of(GPT2ForSequenceClassification(config)).positions == 17

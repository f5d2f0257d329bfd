"""What a token takes in the caches of transformers of all kinds, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import LLAMA, figures, refused, run
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_kv.errors import PagedKVError
from paged_kv.tools.estimate import estimate
from paged_kv.tools.estimate.huggingface import transformers

SEARCH = ["--simulations", "3", "--context", "64"]
# transformers' own models, made and run with these configurations by benchmarks/architectures.py
MEASURED = json.loads(Path(__file__).with_name("architectures.json").read_text())
JAMBA = {
    "model_type": "jamba",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "attn_layer_period": 8,
    "attn_layer_offset": 4,
    "torch_dtype": "bfloat16",
}


def written(folder: Path, config: Any) -> str:
    """A folder with this configuration."""
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def token_bytes(folder: Path, config: Any) -> int:
    """What the estimate gives for a token."""
    fields = transformers(Path(written(folder, config))).fields
    return estimate(**fields | {"context": 64, "envs": 1, "simulations": 3}).token_bytes


@pytest.mark.parametrize("kind", sorted({row["config"]["model_type"] for row in MEASURED}))
def test_the_caches_of_transformers_own_models(kind: str, tmp_path: Path) -> None:
    rows = [row for row in MEASURED if row["config"]["model_type"] == kind]
    found = [token_bytes(tmp_path, {**row["config"], "dtype": "bfloat16"}) for row in rows]
    assert found == [row["bytes"] for row in rows]


def test_most_kinds_of_language_models_were_measured() -> None:
    kinds = {row["config"]["model_type"] for row in MEASURED}
    assert len(kinds) > 100
    assert kinds >= {
        *("llama", "mistral", "gpt2", "gptj", "codegen", "bloom", "mpt", "falcon", "gpt_bigcode"),
        *("gemma3_text", "gemma3n_text", "deepseek_v2", "deepseek_v3", "jamba", "bamba", "zamba2"),
        *("granitemoehybrid", "qwen3_next", "qwen2_vl_text", "kimi_linear", "minimax"),
    }


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"model_type": "falcon", "n_layer": 32, "n_head": 71, "hidden_size": 4544}, 8192),
        (JAMBA, 2 * 4 * 8 * 128 * 2),
        ({"model_type": "gemma3", "text_config": {"num_hidden_layers": 48}}, 48 * 4 * 512 * 2),
        ({"model_type": "llava", "text_config": {"model_type": "mistral"}}, 131072),
        ({"model_type": "qwen2_vl", "num_hidden_layers": 28, "hidden_size": 8192}, 28 * 8 * 512),
    ],
)
def test_what_a_file_leaves_out_is_as_in_transformers(
    config: dict[str, Any], wanted: int, tmp_path: Path
) -> None:
    assert token_bytes(tmp_path, {"dtype": "bfloat16", **config}) == wanted


@pytest.mark.parametrize(
    ("outer", "inner", "dtype"),
    [
        ({"torch_dtype": "bfloat16"}, {}, "bfloat16"),
        ({"dtype": "float16"}, {"torch_dtype": "float32"}, "float16"),
        ({}, {"dtype": "torch.bfloat16"}, "bfloat16"),
        ({}, {}, "float32"),
    ],
)
def test_the_dtype_of_the_whole_is_that_of_its_text(
    outer: dict[str, Any],
    inner: dict[str, Any],
    dtype: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = {"model_type": "gemma3", **outer, "text_config": inner}
    found = figures(capsys, "--transformers-config", written(tmp_path, config), *SEARCH)
    assert found["workload"]["dtype"] == dtype
    unnamed = ["the configuration names no dtype: float32 is taken"]
    assert found["notes"] == ([] if outer or inner else unnamed)


# -- refused by name


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model_type": "mamba"}, "mamba keeps no keys and values of its tokens"),
        ({"model_type": "recurrent_gemma"}, "recurrent_gemma keeps no keys and values of its"),
        ({"model_type": "bert"}, "bert keeps no keys and values of its tokens"),
        ({"model_type": "t5"}, "t5 has cross-attention, whose keys and values are of other tokens"),
        ({"model_type": "bart"}, "bart has cross-attention"),
        ({"is_encoder_decoder": True}, "llama has cross-attention"),
        ({"model_type": "mllama", "text_config": LLAMA | {"model_type": "mllama_text_model"}},
         "mllama_text_model has cross-attention"),
        ({"model_type": "gemma4_text"}, "there is no rule for the cache of gemma4_text"),
        ({"model_type": "deepseek_v32"}, "there is no rule for the cache of deepseek_v32"),
        ({"model_type": "mpt", "attn_config": {"attn_type": "multiquery_attention"}},
         "there is no rule for its attn_type 'multiquery_attention'"),
        ({"model_type": "zamba2"}, "it has no layer_types and no layers_block_type"),
        ({"model_type": "bamba"}, "none of its layers keeps keys and values"),
        ({"model_type": "nemotron_h"}, "its hybrid_override_pattern is None, allowed is text"),
        ({"model_type": "jamba", "attn_layer_period": 0},
         "its attn_layer_period is 0, allowed is a whole number of at least 1"),
        ({"layer_types": ["full_attention", "new_thing"] * 2},
         "there is no rule for the 'new_thing' of its layer_types"),
        ({"layer_types": [["full_attention"]]}, "there is no rule for the "),
        ({"layer_types": "full_attention"}, "its layer_types is 'full_attention', allowed"),
        ({"layer_types": ["linear_attention"] * 4}, "none of its layers keeps keys and values"),
        ({"model_type": "tomorrow", "kv_lora_rank": 512},
         "there is no rule for the type 'tomorrow' with its kv_lora_rank"),
        ({"model_type": "tomorrow", "ssm_state": 16, "multi_query": True},
         "there is no rule for the type 'tomorrow' with its multi_query, ssm_state"),
        ({"model_type": "tomorrow", "n_kv_heads": 2, "num_key_value_heads": None},
         "there is no rule for the type 'tomorrow' with its n_kv_heads"),
        ({"model_type": "RefinedWebModel", "n_head_kv": 8, "multi_query": False},
         "there is no rule for the type 'RefinedWebModel' with its n_head_kv"),
        ({"model_type": "chatglm", "multi_query_group_num": 2, "kv_channels": 128},
         "there is no rule for the type 'chatglm' with its kv_channels, multi_query_group_num"),
        ({"model_type": None, "mamba_d_conv": 4},
         "there is no rule for a model of no type with its mamba_d_conv"),
        ({"model_type": "tomorrow", "layer_types": ["mamba", "attention"] * 2},
         "there is no rule for the type 'tomorrow' with layers that do not attend"),
        ({"model_type": 3}, "its model_type is 3, allowed is text"),
        ({"num_hidden_layers": "four"}, "its num_hidden_layers is 'four', allowed is a"),
        ({"num_key_value_heads": True}, "its num_key_value_heads is True, allowed is a"),
        ({"torch_dtype": "int8"}, "its torch_dtype is 'int8', allowed is float64, float32,"),
        ({"torch_dtype": ["bfloat16"]}, "its torch_dtype is ['bfloat16'], allowed is float64"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused(
    changes: dict[str, Any], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = written(tmp_path, {**LLAMA, **changes})
    said = refused(capsys, "--transformers-config", folder, *SEARCH)
    assert said.startswith(f"cannot use {str(tmp_path / 'config.json')!r}: {why}")


# -- notes


def test_notes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unknown = {**LLAMA, "model_type": "tomorrow"}
    latent = {"model_type": "deepseek_v3", "dtype": "bfloat16"}
    for config, note in (
        (unknown, "there is no rule for the type 'tomorrow': it is counted as if it were a Llama"),
        (
            JAMBA,
            "4 of its 32 layers keep keys and values of their own; what the others keep is not",
        ),
        (
            latent,
            "keys and values are counted as the latent vectors that transformers 5.24 keeps; ",
        ),
    ):
        folder = written(tmp_path, config)
        (told,) = figures(capsys, "--transformers-config", folder, *SEARCH)["notes"]
        assert told.startswith(note)
        assert run("--transformers-config", folder, *SEARCH) == 0
        assert capsys.readouterr().out.endswith(f"\nNote: {told}.\n")
    assert "takes 71.1 times as much" in told
    assert figures(capsys, "--preset", "cartpole")["notes"] == []


# -- whatever a file holds

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats(allow_nan=False) | st.text("ab"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(row=st.sampled_from(MEASURED), data=st.data())
def test_a_spoilt_file_is_estimated_or_refused_by_name(
    row: dict[str, Any], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = dict(row["config"])
    more = ["layer_types", "layers_block_type", "attn_layer_period", "full_attention_interval",
            "attn_layer_indices", "full_attn_idxs", "hybrid_override_pattern", "text_config",
            "linear_attn_config", "attn_config", "num_kv_heads", "attention_head_dim", "dtype",
            "num_kv_shared_layers", "model_type", "sliding_window", "kv_lora_rank"]  # fmt: skip
    for name in data.draw(st.lists(st.sampled_from([*config, *more]), min_size=1, max_size=3)):
        if data.draw(st.booleans()):
            config.pop(name, None)
        else:
            config[name] = data.draw(VALUES)
    folder = tmp_path_factory.getbasetemp()
    try:
        found = token_bytes(folder, config)
    except (PagedKVError, TypeError) as error:
        # the estimate says itself which sizes it lacks
        assert isinstance(error, PagedKVError) or "required keyword-only" in str(error)
    else:
        assert found > 0

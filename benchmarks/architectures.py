"""Finds what the caches of transformers' own models keep of a token, for `paged-kv estimate`.

Each language model of transformers is made with several sizes on the meta device, which holds no
numbers, and fills its own cache with 8 and with 12 tokens. What the cache grows by is what a token
takes. A model gets a rule where every size is explained by the fields of its configuration; the
others are listed by why not. Writes paged_kv/tools/data/architectures.json and, for the tests,
tests/tools/architectures.json. Takes some minutes:

    .venv-bench/bin/python -m benchmarks.architectures
"""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from paged_kv.tools.estimate import architectures
from paged_kv.tools.estimate.architectures import NAMES, Shape
from paged_kv.tools.estimate.fields import Unlike

ROOT = Path(__file__).parent.parent
DATA = ROOT / "paged_kv" / "tools" / "data" / "architectures.json"
MEASURED = ROOT / "tests" / "tools" / "architectures.json"
SECONDS = 60  # for one model
LATENT = ("layers", "heads", "latent", "rope", "nope", "value")
Config = dict[str, Any]

# What some models want beside their defaults before they can be made, or run.
WANTED: dict[str, Config] = {
    "bamba": {"attn_layer_indices": [1, 3, 7]},
    "deepseek_v2": {
        "num_experts_per_tok": 2,
        "n_routed_experts": 8,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 512,
    },
    "dots1": {
        "num_experts_per_tok": 2,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 512,
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"] * 4},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"] * 4},
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128},
    "step3p5": {"sliding_window": 512},
}
# As configurations on the Hub say it, where it is not as transformers saves it.
HUB: list[Config] = [
    {"model_type": "falcon", "num_attention_heads": 64, "hidden_size": 4096, "multi_query": False},
    {
        "model_type": "falcon",
        "n_head": 128,
        "n_layer": 6,
        "hidden_size": 8192,
        "num_kv_heads": 8,
        "new_decoder_architecture": True,
    },
    {"model_type": "gpt_bigcode", "n_layer": 6, "n_head": 16, "n_embd": 512, "multi_query": False},
    {"model_type": "gpt_bigcode", "n_layer": 6, "n_head": 16, "n_embd": 512, "multi_query": True},
    {"model_type": "jamba", "attn_layer_period": 4, "attn_layer_offset": 1},
    {"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*-M*-"},
    {"model_type": "qwen3_next", "num_hidden_layers": 12, "full_attention_interval": 3},
    {"model_type": "lfm2", "num_hidden_layers": 8, "full_attn_idxs": [2, 5]},
    {"model_type": "gemma3n_text", "num_hidden_layers": 10, "num_kv_shared_layers": 4},
    {
        "model_type": "kimi_linear",
        "num_hidden_layers": 8,
        "linear_attn_config": {
            "full_attn_layers": [4, 8],
            "kda_layers": [1, 2, 3, 5, 6, 7],
            "head_dim": 128,
            "num_heads": 32,
            "short_conv_kernel_size": 4,
        },
    },
]
# Where the meta device cannot follow the model: what makes it small enough to run on a CPU.
SMALL: dict[str, Config] = {
    "gemma3n_text": {
        "vocab_size": 64,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "intermediate_size": 32,
        "hidden_size": 64,
    },
}


KEPT_OUT = (transformers.PreTrainedConfig, torch.nn.Module)  # what a cache may point to


class Sample(NamedTuple):
    """A configuration, as a file would have it, and the bytes that a token took; whether the tests
    should have it.
    """

    config: Config
    bytes: float
    told: bool


def tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """All tensors of a cache, each once."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in list(value.values()):
            yield from tensors(part, seen)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors(part, seen)
    elif type(value).__module__.startswith("transformers") and not isinstance(value, KEPT_OUT):
        yield from tensors(getattr(value, "__dict__", {}), seen)


def held(cache: Any) -> int:
    """Bytes of a cache."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(cache, set()))


def token_bytes(config: Any, device: str) -> float:
    """What the model's own cache grows by for each token, in bfloat16."""
    kind = config.model_type
    auto = (
        AutoModelForCausalLM
        if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        else AutoModelForImageTextToText
    )
    config._attn_implementation = "eager"
    sizes = []
    with torch.device(device), torch.no_grad():
        model = auto.from_config(config, dtype=torch.bfloat16).eval()
        for length in (8, 12):
            ids = torch.ones(1, length, dtype=torch.long)
            sizes.append(
                held(getattr(model(input_ids=ids, use_cache=True), "past_key_values", None))
            )
    return (sizes[1] - sizes[0]) / 4


def made(kind: str, fields: Config, inside: str | None) -> Any:
    """The configuration; of one around the language model, where that has no model of its own."""
    fields = {**fields, **SMALL.get(kind, {})}
    if inside is None:
        return CONFIG_MAPPING[kind](**fields)
    return CONFIG_MAPPING[inside](text_config={"model_type": kind, **fields})


def both(kind: str, fields: Config, inside: str | None, first: bool) -> list[Sample]:
    """Two samples: the fields as they are given, and as transformers saves them."""
    signal.alarm(SECONDS)
    try:
        config = made(kind, fields, inside)
        text = config if inside is None else config.get_text_config()
        saved = json.loads(text.to_json_string(use_diff=True))
        found = token_bytes(config, "cpu" if kind in SMALL else "meta")
    finally:
        signal.alarm(0)
    written = {"model_type": kind, **fields, **SMALL.get(kind, {})}
    return [Sample(written, found, True), Sample(saved, found, first)]


def defaults(kind: str) -> dict[str, tuple[str, int | None]]:
    """The sizes that a configuration has fields for: the field, and its value where it is left
    out.
    """
    made_of = CONFIG_MAPPING[kind]
    fields = {
        field.name: None if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(made_of)
    }
    found = {}
    for size, names in NAMES.items():
        own = [made_of.attribute_map.get(name, name) for name in names]
        name = next((name for name in (*own, *names) if name in fields), None)
        if name in names:
            found[size] = (name, fields[name])
    return found


def variants(kind: str) -> Iterator[Config]:
    """Fields to set: none, then more and more of those that sizes depend on."""
    names = {size: name for size, (name, _) in defaults(kind).items()}
    wanted = WANTED.get(kind, {})
    yield wanted
    fields = dict(wanted)
    for size, value in (("layers", 12), ("heads", 64), ("width", 4096)):
        if size in names:
            fields[names[size]] = value
    kv_heads = names.get("kv_heads", "num_key_value_heads")
    if "latent" in names:
        yield {**fields, kv_heads: 64}
        yield {**fields, kv_heads: 64, names["latent"]: 256, names["rope"]: 32}
        return
    yield fields
    yield {**fields, kv_heads: 16}
    yield {**fields, kv_heads: 16, names.get("head_size", "head_dim"): 96}


def entries(kind: str) -> Iterator[dict[str, int | None]]:
    """Which sizes the model may read, with their defaults, the most likely first."""
    found = {size: default for size, (_, default) in defaults(kind).items()}
    if "latent" in found:
        yield {size: found.get(size) for size in LATENT}
        return
    yield found
    yield {**found, "head_size": found.get("head_size")}
    yield {**found, "kv_heads": found.get("kv_heads"), "head_size": found.get("head_size")}
    yield {size: default for size, default in found.items() if size != "head_size"}


def explained(kind: str, samples: list[Sample]) -> bool:
    """Whether the rule gives what was measured, or refuses, of all samples; not all refused."""
    found = [(estimated(sample), sample.bytes) for sample in samples]
    found = [pair for pair in found if pair[0] is not None]
    return bool(found) and all(ours == theirs for ours, theirs in found)


def estimated(sample: Sample) -> int | None:
    """What the rule gives, or None where it refuses."""
    try:
        return of(architectures.shape(sample.config, sample.config["model_type"]))
    except Unlike:
        return None


def of(shape: Shape) -> int:
    """Bytes of a token in bfloat16; 0 where a size is missing."""
    value = shape.head_size if shape.value_head_size is None else shape.value_head_size
    heads = shape.kv_heads or shape.heads
    if None in (shape.layers, heads, shape.head_size):
        return 0
    return shape.layers * heads * (shape.head_size + value) * 2


def measure(kind: str, inside: str | None) -> list[Sample]:
    """All that can be measured of a type."""
    hub = [
        {name: fields[name] for name in fields if name != "model_type"}
        for fields in HUB
        if fields["model_type"] == kind
    ]
    samples = []
    for fields in (*variants(kind), *hub):
        try:
            samples += both(kind, fields, inside, not samples)
        except Exception as error:  # whatever a model raises that cannot have these sizes
            print(f"  {kind} {fields}: {type(error).__name__}: {error}"[:200], file=sys.stderr)
    return samples


def late(*_: object) -> None:
    raise TimeoutError(f"took longer than {SECONDS} s")


def language_models(known: Config) -> Iterator[tuple[str, str | None]]:
    """Types of language models, and the type of the model that each is made within."""
    seen = set()
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if kind not in known["inside"]:
            seen.add(kind)
            yield kind, None
    for outer in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        kind = known["inside"].get(outer)
        if kind is not None and kind not in seen:
            seen.add(kind)
            yield kind, outer


def inside() -> dict[str, str]:
    """The type of the language model in those that have one beside others."""
    found = {}
    for kind in CONFIG_MAPPING:
        try:
            config = CONFIG_MAPPING[kind]()
            text = config.get_text_config(decoder=True)
        except Exception:  # several, or none that can be made
            continue
        if text is not config and text.model_type != kind:
            found[kind] = text.model_type
    return found


def main() -> None:
    """Measure all, and write both files."""
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, late)
    only = set(sys.argv[1:])
    known: Config = {
        "measured_with": f"transformers {transformers.__version__}",
        "models": {},
        "inside": inside(),
        "cross": sorted(
            {
                kind
                for kind in CONFIG_MAPPING
                if getattr(CONFIG_MAPPING[kind], "is_encoder_decoder", False) is True
            }
            | {"mllama_text_model", "trocr"}
        ),
        "without": [],
        "unlike": [],
    }
    architectures.known = lambda: known
    samples: list[Sample] = []
    for kind, outer in language_models(known):
        if kind in known["cross"] or (only and kind not in only):
            continue
        found = measure(kind, outer)
        if found and not any(sample.bytes for sample in found):
            known["without"].append(kind)
            continue
        for entry in entries(kind):
            known["models"][kind] = entry
            if explained(kind, found):
                samples += [one for one in found if one.told and estimated(one) is not None]
                break
        else:
            del known["models"][kind]
            print(f"{kind}: {[(s.bytes) for s in found[::2]]}", flush=True)
    listed = {*known["models"], *known["inside"], *known["cross"], *known["without"]}
    known["unlike"] = sorted(set(CONFIG_MAPPING) - listed)
    known["without"].sort()
    if only:
        print(known["models"], known["without"])
        return
    write(DATA, known)
    write(
        MEASURED,
        [
            {"bytes": sample.bytes, "config": kept(sample.config)}
            for sample in samples
            if sample.told
        ],
    )


def kept(config: Config) -> Config:
    """Without what is certainly of no weight here, so that the file stays small."""
    return {
        name: value
        for name, value in config.items()
        if not name.startswith(("rope", "initializer", "vision", "transformers_v"))
        and not name.endswith(("_token_id", "dropout", "_pdrop"))
    }


def write(path: Path, value: Any) -> None:
    """A line for each part of a part."""
    if isinstance(value, list):
        text = "[\n" + ",\n".join(json.dumps(one) for one in value) + "\n]\n"
    else:
        parts = []
        for name, part in value.items():
            if isinstance(part, Mapping):
                lines = ",\n".join(
                    f"  {json.dumps(key)}: {json.dumps(part[key])}" for key in sorted(part)
                )
                parts.append(f"{json.dumps(name)}: {{\n{lines}\n}}")
            else:
                parts.append(f"{json.dumps(name)}: {json.dumps(part)}")
        text = "{\n" + ",\n".join(parts) + "\n}\n"
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

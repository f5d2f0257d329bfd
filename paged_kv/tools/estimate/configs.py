"""Workloads out of presets and configuration files: LightZero's python modules, and the config.json
of a transformer.

A reader returns the fields of `Workload` that the file gives; what it leaves out is up to the
caller. Raises BadConfig where a file cannot be read, or says something else than it should.
"""

from __future__ import annotations

import contextlib
import io
import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paged_kv.errors import BadConfig
from paged_kv.tools.estimate.workload import DTYPES
from paged_kv.tools.profile.presets import Preset

Fields = dict[str, Any]

# What the fields are called where they come from.
LIGHTZERO_NAMES = {
    "layers": "num_layers",
    "heads": "num_heads",
    "head_size": "embed_dim",
    "context": "context_length",
    "envs": "env_num",
    "simulations": "num_simulations",
}
TRANSFORMERS_NAMES = {
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "head_size": "head_dim or hidden_size",
}
DEFAULT_RING = 50  # LightZero's, where its world model is not told the number of simulations
# whose sliding_window holds in all layers
WHOLLY_SLIDING = {"mistral", "mixtral", "starcoder2", "phi3"}


def preset(chosen: Preset) -> Fields:
    """The fields of a workload of `paged-kv profile`."""
    return {
        "layers": chosen.layers,
        "heads": chosen.heads,
        "head_size": chosen.embed // chosen.heads,
        "context": chosen.context,
        "envs": chosen.envs,
        "simulations": chosen.simulations,
    }


def lightzero(path: Path) -> Fields:
    """The fields of a LightZero configuration, a python module that sets `main_config`. Runs the
    module.
    """
    try:
        path.read_bytes()  # runpy would take a folder or an archive, too
    except OSError as error:
        raise _unreadable(path, error) from None
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            # not "__main__", where it would start to train
            names = runpy.run_path(str(path), run_name="config")
    except (Exception, SystemExit) as error:  # whatever a foreign module raises
        raise BadConfig(path, f"running it raised {type(error).__name__}: {error}") from None
    if "main_config" not in names:
        inside = ", but a main() that may make one: use --preset or give the sizes"
        raise BadConfig(path, f"it sets no main_config{inside if 'main' in names else ''}")
    policy = _part(path, names["main_config"], "main_config", "policy")
    model = _part(path, policy, "main_config.policy", "model")
    world = _part(path, model, "main_config.policy.model", "world_model_cfg")
    environments = [
        policy[name]
        for name in ("collector_env_num", "evaluator_env_num")
        if _is_int(policy.get(name))
    ]
    found = {
        **{field: world.get(name) for field, name in LIGHTZERO_NAMES.items()},
        "simulations": policy.get("num_simulations"),
        "envs": world.get("env_num", max(environments, default=None)),
        "head_size": _per_head(path, world.get("embed_dim"), world.get("num_heads")),
        "tokens_per_step": world.get("tokens_per_block", 2),
        "ring_simulations": world.get("num_simulations", DEFAULT_RING),
        "max_cache_size": world.get("max_cache_size", 5000),
    }
    return {field: value for field, value in found.items() if value is not None}


def transformers(path: Path) -> Fields:
    """The fields of a transformer's config.json, or of the one in a folder. A window that slides in
    all layers is the context.
    """
    file = path
    try:
        file = path / "config.json" if path.is_dir() else path
        whole = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(file, error) from None
    except (ValueError, RecursionError) as error:
        raise BadConfig(file, f"it is no JSON: {error}") from None
    if not isinstance(whole, dict):
        raise BadConfig(file, "it holds no JSON object")
    config = whole["text_config"] if isinstance(whole.get("text_config"), dict) else whole
    heads = _first(config, "num_attention_heads", "n_head", "num_heads")
    size = _first(config, "head_dim")
    if size is None:
        size = _per_head(file, _first(config, "hidden_size", "n_embd", "d_model"), heads)
    found = {
        "layers": _attention_layers(config),
        "heads": heads,
        "head_size": size,
        "kv_heads": _first(config, "num_key_value_heads", "num_kv_heads"),
        "context": _sliding_window(config),
        "dtype": _dtype(config),
    }
    # latent attention
    if _is_int(config.get("qk_nope_head_dim")) and _is_int(config.get("qk_rope_head_dim")):
        found |= {
            "head_size": config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
            "value_head_size": config.get("v_head_dim"),
        }
    return {field: value for field, value in found.items() if value is not None}


def _unreadable(path: Path, error: OSError) -> BadConfig:
    return BadConfig(path, (error.strerror or str(error)).lower())


def _part(path: Path, whole: Any, name: str, key: str) -> Mapping[str, Any]:
    if not isinstance(whole, Mapping):
        raise BadConfig(path, f"{name} is {type(whole).__name__}, not a dict")
    part = whole.get(key)
    if not isinstance(part, Mapping):
        raise BadConfig(path, f"{name} has no {key}: is it the configuration of a UniZero policy?")
    return part


def _per_head(path: Path, width: Any, heads: Any) -> int | None:
    if width is None or heads is None:
        return None
    if not _is_int(width) or not _is_int(heads) or heads < 1 or width % heads:
        raise BadConfig(path, f"{heads!r} heads do not divide a width of {width!r}")
    return int(width // heads)


def _first(config: Mapping[str, Any], *names: str) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def _attention_layers(config: Mapping[str, Any]) -> Any:
    """Layers that keep keys and values."""
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        return sum("attention" in str(kind) and "linear" not in str(kind) for kind in kinds)
    return _first(config, "num_hidden_layers", "n_layer", "num_layers")


def _sliding_window(config: Mapping[str, Any]) -> int | None:
    """The window of a model in which every layer slides. A page holds all layers: where one does
    not slide, none does.
    """
    window = config.get("sliding_window")
    kinds = config.get("layer_types")
    if not _is_int(window) or config.get("use_sliding_window") is False:
        return None
    if isinstance(kinds, list):
        slides = set(kinds) == {"sliding_attention"}
    else:
        slides = config.get("model_type") in WHOLLY_SLIDING
    return window if slides else None


def _dtype(config: Mapping[str, Any]) -> str | None:
    name = str(_first(config, "dtype", "torch_dtype")).removeprefix("torch.")
    return name if name in DTYPES else None


def _is_int(value: Any) -> bool:
    return type(value) is int

"""Workloads out of presets, and out of LightZero's configurations, which are python modules.

A reader returns the fields of `Workload` that the file gives; what it leaves out is up to the
caller. Raises BadConfig where a file cannot be read, or says something else than it should.
"""

from __future__ import annotations

import contextlib
import io
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paged_kv.errors import BadConfig
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
DEFAULT_RING = 50  # LightZero's, where its world model is not told the number of simulations


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
        raise unreadable(path, error) from None
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


def unreadable(path: Path, error: OSError) -> BadConfig:
    """A file that the system does not let us read."""
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


def _is_int(value: Any) -> bool:
    return type(value) is int

"""The result of one preset as plain data, ready for JSON."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from paged_kv.tools.profile.parts import divided
from paged_kv.tools.profile.presets import Preset
from paged_kv.tools.profile.side import DENSE, PAGED, Setting
from paged_kv.tools.profile.workload import Measured, Run, typical

SCHEMA = 2


class About(NamedTuple):
    """What a client says of itself."""

    client: str
    client_version: str
    weights: str
    tie_breaking: str


def as_dict(run: Run, preset: Preset, setting: Setting, about: About) -> dict[str, Any]:
    """One JSON object."""
    old = run.sides[DENSE]
    new = run.sides[PAGED]
    paged = _cache(new) | {
        "pool_bytes_reserved": new.peak.reserved,
        "sharing_ratio_peak": round(new.peak.sharing, 3),
        "copied_pages": new.totals.get("copied_pages", 0),
        "evictions": new.totals.get("evictions", 0),
    }
    return {
        "schema": SCHEMA,
        "machine": machine(setting.device),
        "workload": _workload(run, preset, setting, about),
        "caches": {DENSE: _cache(old), PAGED: paged},
        "ratios": _ratios(old, new),
        "fidelity": {
            "actions_compared": run.fidelity.compared,
            "actions_equal": run.fidelity.equal,
            "visit_counts_equal": run.fidelity.visits_equal,
            "max_abs_value_difference": run.fidelity.value_difference,
        },
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": _cores(),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def _cores() -> int | None:
    """Those that this process may use, where the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _workload(run: Run, preset: Preset, setting: Setting, about: About) -> dict[str, Any]:
    random = f"random ({preset.observation})"
    return {
        "preset": preset.name,
        "client": about.client,
        "client_version": about.client_version,
        "envs": setting.envs,
        "simulations": setting.simulations,
        "roots": run.roots,
        "layers": preset.layers,
        "context_length": preset.context,
        "seed": setting.seed,
        "threads": torch.get_num_threads(),
        "embed_dim": preset.embed,
        "heads": preset.heads,
        "positions": "rotary" if preset.rotary else "learned",
        "device": str(setting.device),
        "page_size": setting.page_size,
        "at": setting.at,
        "keys": setting.keys,
        "padding": setting.padding,
        "window": setting.window,
        "step": setting.step,
        "linears": setting.linears,
        "attention": setting.attention,
        "storage": setting.storage,
        "compile": setting.compile,
        "warmup_roots": preset.warmup,
        "metered_roots": run.metered,
        "observations": "CartPole-v0" if preset.observation == "cartpole" else random,
        "weights": about.weights,
        "tie_breaking": about.tie_breaking,
        "seconds": round(run.seconds, 1),
    }


def _cache(side: Measured) -> dict[str, Any]:
    return {
        "kv_bytes_peak": side.peak.kv,
        "kv_bytes_end": side.end.kv,
        "unique_token_bytes_peak": side.unique_peak,
        "working_bytes_peak": side.peak.working,
        "tensor_kernels_per_simulation": round(side.kernels, 3),
        "host_copies_per_simulation": round(side.host_copies, 3),
        "cache_us_per_simulation": round(typical(side.cache_us), 2),
        "search_us_per_simulation": round(typical(side.search_us), 2),
        "search_parts_us_per_simulation": _parts(side),
        "cache_share_of_search": round(typical(side.cache_shares), 4),
        "lookups": side.lookups.asked,
        "hits": side.lookups.found,
        "misses": side.lookups.asked - side.lookups.found,
        "transformer_cache_kernels_per_simulation": round(side.layer_kernels, 3),
        "transformer_cache_us_per_simulation": round(typical(side.layer_us), 2),
        "kernels_by_name": {name: round(n, 3) for name, n in sorted(side.kernel_names.items())},
    }


def _parts(side: Measured) -> dict[str, float]:
    whole = typical(side.search_us)
    return divided(whole, whole * typical(side.cache_shares), side.parts)


def _ratios(old: Measured, new: Measured) -> dict[str, float | None]:
    return {
        "kv_bytes_peak": _ratio(old.peak.kv, new.peak.kv),
        "kv_bytes_over_unique": _ratio(new.peak.kv, new.unique_peak),
        "tensor_kernels": _ratio(old.kernels, new.kernels),
        "cache_time": _ratio(typical(old.cache_us), typical(new.cache_us)),
        "search_time": _ratio(typical(old.search_us), typical(new.search_us)),
    }


def _ratio(above: float, below: float) -> float | None:
    return round(above / below, 4) if below else None

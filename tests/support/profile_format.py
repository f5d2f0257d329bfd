"""What the JSON of `paged-kv profile` promises."""

from __future__ import annotations

import json
from typing import Any

SIDE_KEYS = {
    "kv_bytes_peak",
    "kv_bytes_end",
    "unique_token_bytes_peak",
    "working_bytes_peak",
    "tensor_kernels_per_simulation",
    "host_copies_per_simulation",
    "cache_us_per_simulation",
    "search_us_per_simulation",
    "search_parts_us_per_simulation",
    "lookups",
    "hits",
    "misses",
}
KEYS = {
    "machine": set(),
    "workload": {
        "preset",
        "client",
        "client_version",
        "envs",
        "simulations",
        "roots",
        "layers",
        "context_length",
        "seed",
        "threads",
        "at",
        "keys",
        "padding",
        "window",
        "step",
        "linears",
        "attention",
        "storage",
        "compile",
    },
    "ratios": {
        "kv_bytes_peak",
        "kv_bytes_over_unique",
        "tensor_kernels",
        "cache_time",
        "search_time",
    },
    "fidelity": {
        "actions_compared",
        "actions_equal",
        "visit_counts_equal",
        "max_abs_value_difference",
    },
}


def check_keys(result: dict[str, Any]) -> None:
    """All the keys that the format promises."""
    assert result["schema"] == 2
    for part, keys in KEYS.items():
        assert keys <= set(result[part])
    assert set(result["caches"]["dense"]) >= SIDE_KEYS
    more = {"pool_bytes_reserved", "sharing_ratio_peak", "copied_pages", "evictions"}
    assert set(result["caches"]["paged"]) >= SIDE_KEYS | more
    assert json.loads(json.dumps(result)) == result

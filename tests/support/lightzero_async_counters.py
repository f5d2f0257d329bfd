"""For `policy.import_names` of LightZero's main: collectors and evaluators write down, after every
call, what their world model found in pages.

PAGED_KV_COUNTERS is the folder. Each call makes a file of its own, in whatever process it is.
"""

from __future__ import annotations

import json
import os
import time
from functools import wraps
from pathlib import Path
from typing import Any

from lzero.worker import MuZeroEvaluator, MuZeroSegmentCollector


def note(kind: str, world_model: Any) -> None:
    """What one world model has counted so far."""
    paged = getattr(world_model, "paged", None)
    found = {
        "kind": kind,
        "pid": os.getpid(),
        "class": type(world_model).__name__,
        "queries": world_model.total_query_count + world_model.root_total_query_cnt,
        "hits": world_model.hit_count + world_model.root_hit_cnt,
        "pages_allocated": paged.cache.stats.allocated_pages if paged else 0,
        "old_used": paged.old.used if paged else None,
    }
    folder = Path(os.environ["PAGED_KV_COUNTERS"])
    (folder / f"{time.monotonic_ns()}.json").write_text(json.dumps(found))


def counting(owner: Any, name: str, model: str) -> None:
    """Have a method of LightZero's workers count."""
    original = getattr(owner, name)

    @wraps(original)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        note(owner.__name__, self._policy.get_attribute(model).world_model)
        return result

    setattr(owner, name, counted)


counting(MuZeroSegmentCollector, "collect", "collect_model")
counting(MuZeroEvaluator, "eval", "eval_model")

"""One call that runs one search on all caches."""

from __future__ import annotations

from typing import Any

from paged_kv.tools.search.models import Loaded
from paged_kv.tools.search.presets import PRESETS, Preset
from paged_kv.tools.search.result import as_dict
from paged_kv.tools.search.trial import Trial


def search(loaded: Loaded, preset: str | Preset = "demo", **options: Any) -> dict[str, Any]:
    """Search with a model on all caches, and return the result as plain data.

    `options` are those of `Trial`. Raises BadArgument, BadCount, UnsupportedModel.
    """
    chosen = PRESETS[preset] if isinstance(preset, str) else preset
    trial = Trial(loaded, chosen, **options)
    trial.run()
    return as_dict(trial)

"""Tree search with a language model on several kinds of cache, side by side. See docs/search.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paged_kv.tools.search.presets import PRESETS, Preset

if TYPE_CHECKING:
    from paged_kv.tools.search.call import search
else:

    def __getattr__(name: str) -> Any:
        if name == "search":  # needs torch and transformers; the presets do not
            from paged_kv.tools.search.call import search

            return search
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["PRESETS", "Preset", "search"]

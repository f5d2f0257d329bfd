"""Runs the same search with LightZero's own cache and with pages, and measures both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paged_kv.tools.profile.presets import PRESETS, Preset

if TYPE_CHECKING:
    from paged_kv.tools.profile.call import profile
else:

    def __getattr__(name: str) -> Any:
        if name == "profile":  # needs torch; the presets do not
            from paged_kv.tools.profile.call import profile

            return profile
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["PRESETS", "Preset", "profile"]

"""Runs the same search with LightZero's own cache and with pages, and measures both."""

from __future__ import annotations

from .main import profile
from .presets import PRESETS, Preset

__all__ = ["PRESETS", "Preset", "profile"]

"""Which LightZero is installed: told by what its world model can do.

LightZero's main calls itself 0.2.0 like the release before it, and a checkout on the path has no
metadata at all. So the version number only refuses what is neither, and features decide the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from typing import Any

from paged_kv.errors import UnsupportedVersion

RELEASE = "0.2.0"
MAIN = "main of August 2026 (9f717c80)"
TESTED = (RELEASE, MAIN)

# What main has and 0.2.0 has not, of all that the integration builds on.
FEATURES: dict[str, Callable[[Any], bool]] = {
    "update_cache_context(env_ids=)": lambda model: (
        "env_ids" in signature(model.update_cache_context).parameters
    ),
    "_prepare_exact_cache_resets": lambda model: hasattr(model, "_prepare_exact_cache_resets"),
    "_variable_context_lengths": lambda model: hasattr(model, "_variable_context_lengths"),
    "seed_reanalysis_root_caches": lambda model: hasattr(model, "seed_reanalysis_root_caches"),
}


def find_lightzero() -> str:
    """`RELEASE` or `MAIN`. Raises UnsupportedVersion, which names what was found and what was
    tested.
    """
    try:
        number: str | None = version("LightZero")
    except PackageNotFoundError:
        number = None
    if number not in (RELEASE, None):
        raise UnsupportedVersion("LightZero", str(number), TESTED)
    return judge(number, import_module("lzero.model.unizero_world_models.world_model").WorldModel)


def judge(number: str | None, world_model: Any) -> str:
    """Which of the two a world model belongs to, `number` being its version as far as
    it is known.
    """
    lacking = [name for name, has in FEATURES.items() if not has(world_model)]
    if not lacking:
        return MAIN
    if number == RELEASE and len(lacking) == len(FEATURES):
        return RELEASE
    raise UnsupportedVersion(
        "LightZero", f"{number or 'of unknown version'} without {', '.join(lacking)}", TESTED
    )


FOUND = find_lightzero()

"""What the tests of the tools share. The tools are loaded when a test asks: the core alone has not
all their libraries.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# test_recording.py plays the state machine of tests/core/test_cache.py under a recording
sys.path.append(str(Path(__file__).parents[1] / "core"))

if TYPE_CHECKING:
    from paged_kv.recording import Recording


@pytest.fixture(scope="session")
def small() -> dict[str, Any]:
    """A short run on the reference world model."""
    from paged_kv.tools.profile import profile

    return profile("cartpole", envs=3, simulations=6, roots=4, reference=True)


@pytest.fixture(scope="session")
def profiled() -> tuple[dict[str, Any], list[Recording]]:
    """A short profile of the reference world model, with its recordings."""
    from paged_kv.tools.profile import profile

    recordings: list[Recording] = []
    result = profile(
        "cartpole", envs=3, simulations=6, roots=4, reference=True, on_recording=recordings.append
    )
    return result, recordings


@pytest.fixture(scope="session")
def text(profiled: tuple[dict[str, Any], list[Recording]]) -> str:
    """The page of it."""
    from paged_kv.tools.html import page

    result, recordings = profiled
    return page(recordings, result)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Recording]:
    """Recordings of a cache of pages and of another one."""
    from html_recordings import both

    return both(tmp_path_factory.mktemp("pair") / "pages.jsonl")


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of the reference world model's search."""
    from paged_kv.tools import cli

    found = tmp_path_factory.mktemp("recordings") / "run.jsonl"
    arguments = [
        "record",
        str(found),
        "--reference",
        "--roots",
        "2",
        "--simulations",
        "6",
        "--interval",
        "0",
    ]
    assert cli.main(arguments) == 0
    return found

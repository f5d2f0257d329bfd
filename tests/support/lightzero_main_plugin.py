"""For pytest in a checkout of LightZero's main: every world model that its tests build gets paged
contexts.

PAGED_KV_AT is "read" or "write"; PAGED_KV_MANAGER=1 has every model built with LightZero's cache
manager, whose names then lead to pages too. A session in which no model was attached, or none
reached its pages, fails.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from lzero.model.unizero_world_models.ppo_world_model import PPOWorldModel
from lzero.model.unizero_world_models.world_model import WorldModel

from paged_kv.integrations.lightzero import attach
from paged_kv.integrations.lightzero.main.state import MainState

count = {"attached": 0, "stored": 0}
original = WorldModel.__init__
store = MainState.store


def build(self: Any, config: Any, tokenizer: Any) -> None:
    if os.environ.get("PAGED_KV_MANAGER") == "1":
        config.use_new_cache_manager = True
    original(self, config, tokenizer)
    if type(self) in (WorldModel, PPOWorldModel):
        # Tests step through searches by hand, so that nobody announces nodes: contexts are found as
        # LightZero does.
        attach(self, at=os.environ.get("PAGED_KV_AT", "read"), keys="latent")
        count["attached"] += 1


def counted(self: MainState, *arguments: Any) -> list[int]:
    count["stored"] += 1
    return store(self, *arguments)


WorldModel.__init__ = build
MainState.store = counted  # type: ignore[method-assign]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(
        "paged: " + ", ".join(f"{value} {name}" for name, value in count.items())
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not all(count.values()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED

"""The cache against the dense oracle, in random orders of all verbs."""

from __future__ import annotations

from cache_machine import CacheMachine
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test


def test_cache_agrees_with_the_oracle(device: str) -> None:
    machine = type("Machine", (CacheMachine,), {"device": device})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=300, stateful_step_count=25, deadline=None)
    )

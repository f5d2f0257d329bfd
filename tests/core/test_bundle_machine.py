"""Bundles against the dense oracle, in random orders of all verbs."""

from __future__ import annotations

from bundle_machine import BundleMachine
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test


def test_bundles_agree_with_the_oracle(device: str) -> None:
    machine = type("Machine", (BundleMachine,), {"device": device})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=150, stateful_step_count=25, deadline=None)
    )

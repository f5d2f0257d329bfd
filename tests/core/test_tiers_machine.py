"""Pages in tiers against the dense oracle, in random orders of all verbs."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from tiered_machine import TieredMachine


@pytest.mark.parametrize("kind", ["host", "file"])
def test_tiers_agree_with_the_oracle(device: str, kind: str) -> None:
    machine = type("Machine", (TieredMachine,), {"device": device, "kind": kind})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=60, stateful_step_count=25, deadline=None)
    )

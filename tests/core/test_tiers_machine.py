"""Pages in tiers against the dense oracle, in random orders of all verbs."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from quantised_machine import QuantisedMachine
from tiered_machine import TieredMachine


class Coded(TieredMachine, QuantisedMachine):
    """Frames of int8 codes."""


@pytest.mark.parametrize(
    ("machine", "kind"), [(TieredMachine, "host"), (TieredMachine, "file"), (Coded, "file")]
)
def test_tiers_agree_with_the_oracle(device: str, machine: type[TieredMachine], kind: str) -> None:
    chosen = type("Machine", (machine,), {"device": device, "kind": kind})
    run_state_machine_as_test(
        chosen, settings=settings(max_examples=50, stateful_step_count=25, deadline=None)
    )

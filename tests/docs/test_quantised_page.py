"""The page about pages of codes shows what was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from quantised import measured_bytes  # noqa: E402
from quantised_tables import RESULTS, tables  # noqa: E402

PAGE = (ROOT / "docs" / "quantised.md").read_text()


def test_tables_are_those_of_the_results() -> None:
    found = json.loads(RESULTS.read_text())
    for table in tables(found):
        assert table in PAGE, "run: benchmarks/quantised_tables.py, and paste what it prints"
    lead = found["llm"]["figures"]["largest_lead_that_was_lost"]
    assert f"never by more than {lead:.2f} nats" in PAGE
    assert found["bytes"]["figures"] == measured_bytes()


def test_what_was_wanted_was_reached() -> None:
    found = json.loads(RESULTS.read_text())
    said = found["llm"]["figures"]
    assert said["positions"] >= 10_000
    assert said["perplexity_change"] < 0.01
    ratios = {(row["head_size"], row["dtype"]): row["ratio"] for row in measured_bytes()}
    assert ratios[64, "float32"] > 3.7
    assert ratios[64, "bfloat16"] > 1.85
    for (size, dtype), ratio in ratios.items():
        if dtype == "float32":
            half = ratios[size, "bfloat16"]
            assert f"| {size} | {ratio:.2f} | {half:.2f} |" in PAGE

"""The tables of docs/quantised.md, out of what was measured.

python benchmarks/quantised_tables.py          # prints them, to be pasted
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "quantised.json"


def llm(found: dict[str, Any]) -> list[str]:
    return [
        "| | exact | int8 |",
        "|---|---:|---:|",
        f"| perplexity of {found['positions']:,} positions | {found['perplexity_exact']:.3f} "
        f"| {found['perplexity_int8']:.3f} ({found['perplexity_change']:+.2%}) |",
        f"| same token on top | | {found['same_top_token']:.2%} |",
        "| log-probability of the token that came, mean difference | "
        f"| {found['mean_logprob_difference']:.3f} |",
    ]


def lightzero(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| preset | decisions | same action | same most visited | visits moved, mean | at most "
        "| values differ by | of |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['preset']} | {row['decisions']} | {row['same_action']:.1%} "
            f"| {row['same_most_visited']:.1%} | {row['visits_moved_mean']:.2%} "
            f"| {row['visits_moved_most']:.0%} | {row['values_differ_mean']:.4f} "
            f"| {row['values_mean']:.2f} |"
        )
    return lines


def speed(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| shape | | exact | int8 | ratio |", "|---|---|---:|---:|---:|"]
    for row in rows:
        lines.append(
            f"| {row['shape']} | {row['measure']} | {row['exact_us']:,.0f} "
            f"| {row['int8_us']:,.0f} | {row['ratio']:.2f} |"
        )
    return lines


TABLES = {"llm": llm, "lightzero": lightzero, "speed": speed}


def tables(found: dict[str, Any]) -> list[str]:
    """All of them, as Markdown."""
    return ["\n".join(make(found[name]["figures"])) for name, make in TABLES.items()]


if __name__ == "__main__":
    print("\n\n".join(tables(json.loads(RESULTS.read_text()))))

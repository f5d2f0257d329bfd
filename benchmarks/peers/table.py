"""The tables of the peers as markdown, from the JSON of run.py.

python benchmarks/peers/table.py --write docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from results_table import between_marks

RESULTS = Path(__file__).parent.parent / "results" / "peers.json"
NOTHING = "-"


def micros(value: float) -> str:
    """Microseconds with three figures, milliseconds where there are many."""
    if value >= 10_000:
        return f"{value / 1000:,.1f} ms"
    return f"{value:,.0f} us" if value >= 100 else f"{value:.1f} us"


def cell(figures: dict[str, Any] | None) -> str:
    """Median and quartiles."""
    if figures is None:
        return NOTHING
    return f"{micros(figures['median'])} ({micros(figures['q1'])} to {micros(figures['q3'])})"


def times(value: float, other: float) -> str:
    """A ratio."""
    return f"{value / other:.2f}x"


def peer_cell(peer: dict[str, Any], verb: str, figures: dict[str, Any] | None) -> str:
    """A time, or `no` where the peer has no such verb; the reason stands below the tables."""
    return "no" if verb in peer.get("cannot", {}) else cell(figures)


def lines_of(title: list[str], rows: list[list[str]]) -> list[str]:
    """A table: the first column is text, the others are numbers."""
    rule = "|---|" + "---:|" * (len(title) - 1)
    return [f"| {' | '.join(title)} |", rule, *(f"| {' | '.join(row)} |" for row in rows), ""]


def tables(results: dict[str, Any], name: str) -> list[str]:
    """Bookkeeping alone."""
    found = results["workloads"][name]["tables"]
    rows = []
    ours = found.get("paged_kv", {}).get("us", {})
    for peer in results["peers"]:
        us = found.get(peer["name"], {}).get("us")
        if us is None and not peer.get("cannot", {}).get("fork"):
            continue
        us = us or {}
        ratio = NOTHING
        if "fork" in us and "fork" in ours:
            ratio = times(us["fork"]["median"], ours["fork"]["median"])
        rows.append(
            [
                peer["name"],
                peer_cell(peer, "fork", us.get("fork")),
                ratio,
                peer_cell(peer, "release", us.get("release")),
                peer.get("note", ""),
            ]
        )
    batch = results["workloads"][name]["sizes"]["envs"]
    title = [
        "bookkeeping",
        f"fork + append of {batch}",
        "/ paged_kv",
        f"release of {batch}",
        "what it does",
    ]
    return lines_of(title, rows)


def contents(results: dict[str, Any], name: str) -> list[str]:
    """With K/V."""
    found = results["workloads"][name]["contents"]
    rows = []
    whole = results["workloads"][name]["sizes"]["simulations"]
    ours = found.get("paged_kv", {}).get("us", {})
    for peer in results["peers"]:
        if peer["name"] not in found:
            continue
        entry = found[peer["name"]]
        us = found[peer["name"]]["us"]
        shorter = "" if entry["simulations"] == whole else f" [{entry['simulations']} simulations]"
        ratio = NOTHING
        if "step" in us and "step" in ours:
            ratio = times(us["step"]["median"], ours["step"]["median"])
        rows.append(
            [
                peer["name"] + shorter,
                cell(us.get("step")),
                ratio,
                cell(us.get("attention")),
                peer_cell(peer, "release", us.get("release")),
                f"{entry['kv_bytes_over_unique']:.3f}",
            ]
        )
    batch = results["workloads"][name]["sizes"]["envs"]
    title = [
        "with K/V",
        f"fork + write + gather of {batch}",
        "/ paged_kv",
        "attention",
        f"release of {batch}",
        "KV bytes / unique",
    ]
    return lines_of(title, rows)


def scaling(results: dict[str, Any]) -> list[str]:
    """Fork + append beside many live sequences."""
    found = results["scaling"]
    counts = sorted({int(count) for entry in found.values() for count in entry})
    lines = []
    for parents, meaning in (
        ("near", "parents among the 400 newest"),
        ("any", "parents among all"),
    ):
        rows = [
            [
                name,
                *(
                    micros(entry[str(count)][parents]["median"]) if str(count) in entry else NOTHING
                    for count in counts
                ),
            ]
            for name, entry in found.items()
        ]
        lines += lines_of(
            [f"fork + append of 8, {meaning}", *(f"{count:,} live" for count in counts)], rows
        )
    return lines


def host(results: dict[str, Any]) -> list[str]:
    """Host memory."""
    found = dict(results["host_bytes"])
    live = found.pop("live")
    return lines_of(
        [f"host memory, {live:,} sequences", "bytes a sequence"],
        [[name, f"{value:,.0f}"] for name, value in found.items()],
    )


def heading(results: dict[str, Any], name: str) -> list[str]:
    """A workload in one line, and what was read back."""
    sizes = results["workloads"][name]["sizes"]
    checks = results["workloads"][name]["checks"]
    low, high = sizes["prefixes"]
    prefix = str(low) if low == high else f"{low} to {high}"
    read = sum(entry.get("contexts_read_back", 0) for entry in checks.values())
    wrong = [f"{peer}: {entry['wrong']}" for peer, entry in checks.items() if "wrong" in entry]
    return [
        f"**{name}**: {sizes['envs']} environments, {sizes['searches']} searches of "
        f"{sizes['simulations']} "
        f"simulations, contexts of {prefix} tokens and {sizes['new']} more a step, at most "
        f"{sizes['window']}; "
        f"page size {sizes['page_size']}; {sizes['layers']} layers x {sizes['heads']} heads x "
        f"{sizes['head_size']}, "
        f"{sizes['dtype']}. {read:,} contexts were read back and compared beforehand.",
        "",
        *(f"Not timed, wrong contents: {line}" for line in wrong),
    ]


def notes(results: dict[str, Any]) -> list[str]:
    """Verbs that are missing, and libraries."""
    lines = []
    for peer in results["peers"]:
        if "missing" in peer:
            lines.append(f"- {peer['name']}: {peer['missing']}")
        lines += [
            f"- {peer['name']} has no {verb}: {why}" for verb, why in peer.get("cannot", {}).items()
        ]
    return [*lines, ""] if lines else []


def markdown(results: dict[str, Any]) -> str:
    """All of it."""
    facts = ", ".join(
        f"{key.replace('_', ' ')} {value}" for key, value in results["machine"].items()
    )
    found = ", ".join(f"{key} {value}" for key, value in results["versions"].items())
    lines = [
        f"Measured on {results['when']}: {facts}. {found}. Medians, quartiles in brackets.",
        "",
        f"`{results['command']}`",
        "",
    ]
    for name in results["workloads"]:
        lines += [*heading(results, name), *tables(results, name), *contents(results, name)]
    lines += [*scaling(results), *host(results), *notes(results)]
    return "\n".join(lines).strip()


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("json", nargs="?", type=Path, default=RESULTS)
    parser.add_argument(
        "--write", type=Path, metavar="PAGE", help="put the tables between a page's marks"
    )
    options = parser.parse_args()
    text = markdown(json.loads(options.json.read_text()))
    if options.write:
        options.write.write_text(between_marks(options.write, text))
    else:
        print(text)


if __name__ == "__main__":
    main()

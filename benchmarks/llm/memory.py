"""K/V of search trees by page size, beside a deep copy for every node; and what page sizes cost.

A node is expanded into 8 children of 4 to 28 sampled tokens each; old nodes are expanded as well as
new ones, all are kept. *Unique* is the K/V of all tokens that were fed, those that paths begin with
in common counted once. Bytes are counted on a tiny random Llama, for they depend on nothing but
lengths; forks and steps are timed on the language model, on a context of 2,047 tokens, whose last
page is not full unless it is of one token: a fork, a
fork with room for one more token, and one step of 16 rows with 32 tokens of their own.
"""

from __future__ import annotations

from typing import Any

from llm.by_page_size import costs
from llm.models import facts, language_model, tiny_model
from llm.trees import Held, Tree, deep_copies, on_pages

SIZES = [1, 2, 4, 8, 16]
TREES = (Tree(512, 12), Tree(2048, 4), Tree(64, 32))
QUICK = (Tree(16, 2),)


def measure(options: Any) -> dict[str, Any]:
    """All trees with all page sizes."""
    counted = tiny_model()
    trees = []
    for tree in QUICK if options.quick else TREES:
        copied, unique = deep_copies(counted, tree)
        row: dict[str, Any] = {**tree._asdict(), "nodes": tree.nodes}
        row["deep_copies_over_unique"] = copied / unique
        row["pages"] = [_shares(on_pages(counted, tree, size), size) for size in SIZES]
        trees.append(row)
    model = language_model(options.model)
    shared, rounds = (23, 2) if options.quick else (2047, 9)
    return {
        "counted_on": facts(counted),
        "trees": trees,
        "model": facts(model),
        "costs": costs(model, SIZES, shared, rounds),
    }


def _shares(held: Held, size: int) -> dict[str, Any]:
    """Bytes, as they are and over those of unique tokens."""
    return {
        "page_size": size,
        "bytes": held._asdict(),
        "in_use_over_unique": held.in_use / held.unique,
        "reserved_over_unique": held.reserved / held.unique,
    }


def table(found: dict[str, Any]) -> list[str]:
    """The figures as markdown."""
    sizes = [row["page_size"] for row in found["costs"]]
    heads = " | ".join(f"pages of {size}" for size in sizes)
    lines = [
        f"| peak K/V / unique tokens | deep copies | {heads} |",
        f"|---|---:|{'---:|' * len(sizes)}",
    ]
    for tree in found["trees"]:
        name = f"root of {tree['root']:,}, {tree['nodes']} nodes"
        copied = f"{tree['deep_copies_over_unique']:.1f}x"
        lines.append(_row(name, copied, tree["pages"], "in_use_over_unique"))
        lines.append(_row("- reserved", "", tree["pages"], "reserved_over_unique"))
    lines += [
        "",
        "| page size | fork | fork with room | step of 16 rows | / the largest | K/V "
        "| working buffers |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found["costs"]:
        lines.append(
            f"| {row['page_size']} | {row['fork_us']:.1f} us | {row['room_us']:.1f} us | "
            f"{row['step_seconds'] * 1e3:.0f} ms | {row['step_over_largest']:.2f}x | "
            f"{row['kv_bytes'] / 2**20:.0f} MiB | {row['working_bytes'] / 2**20:.1f} MiB |"
        )
    return lines


def _row(name: str, copied: str, pages: list[dict[str, Any]], key: str) -> str:
    cells = [f"{each[key]:.3f}x" for each in pages]
    return f"| {name} | {copied} | {' | '.join(cells)} |"

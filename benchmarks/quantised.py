"""Pages of int8 codes beside exact ones: bytes, time, and what becomes of a model's answers.

    python benchmarks/quantised.py bytes speed --json benchmarks/results/quantised.json
    python benchmarks/quantised.py llm --model SmolLM2-135M --json benchmarks/results/quantised.json
    python benchmarks/quantised.py lightzero --json benchmarks/results/quantised.json

Parts may be run one at a time: each is put beside what the file holds already. `quantised_speed`,
`quantised_llm` and `quantised_lightzero` say how each is measured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from machine import processor

from paged_kv import PagedKVCache

PARTS = ("bytes", "speed", "llm", "lightzero")
SIZES = (32, 64, 96, 128)
DTYPES = (torch.float32, torch.bfloat16)


def measured_bytes() -> list[dict[str, Any]]:
    """How many times smaller pages are, by head size and dtype: of real caches."""
    found = []
    for size in SIZES:
        for dtype in DTYPES:
            exact, small = [
                PagedKVCache(
                    layers=2, heads=2, head_size=size, page_size=2, dtype=dtype, storage=storage
                )
                for storage in ("exact", "int8")
            ]
            name = str(dtype).removeprefix("torch.")
            ratio = exact.page_bytes / small.page_bytes
            found.append({"head_size": size, "dtype": name, "ratio": ratio})
    return found


def told_bytes(rows: list[dict[str, Any]]) -> str:
    lines = ["head size   dtype      exact / int8"]
    lines += [f"{row['head_size']:9}   {row['dtype']:8}   {row['ratio']:12.2f}" for row in rows]
    return "\n".join(lines)


def part_of(name: str, options: argparse.Namespace) -> tuple[Any, str]:
    """The figures of a part, and what is printed of them."""
    if name == "bytes":
        figures: Any = measured_bytes()
        return figures, told_bytes(figures)
    module = importlib.import_module(f"quantised_{name}")
    figures = module.measured(options)
    return figures, module.told(figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--model", type=Path, help="a folder with SmolLM2-135M, for llm")
    parser.add_argument("--positions", type=int, default=10_240, help="of the text, for llm")
    parser.add_argument("--roots", type=int, help="root steps of each preset, for lightzero")
    parser.add_argument("--rounds", type=int, default=31, help="of each measure, for speed")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    if options.json is not None and options.json.exists():
        found = json.loads(options.json.read_text())
    for name in options.parts:
        figures, text = part_of(name, options)
        print(f"-- {name}\n{text}\n", flush=True)
        found[name] = {
            "command": " ".join(["python", *sys.argv]),
            "processor": processor(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": 1,
            "figures": figures,
        }
        if options.json is not None:
            options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

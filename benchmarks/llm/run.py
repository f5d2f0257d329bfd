"""What a search over a language model costs on pages, and without them: part by part.

    python benchmarks/llm/run.py step --model FOLDER --json benchmarks/results/llm_step.json

`step`: one step of rows that share a long beginning. `memory`: K/V of search trees, and what forks
and steps cost, by page size. `beams`: `generate()` with beams. `exact`: logits of nodes against
recomputation. FOLDER has SmolLM2-135M in float32, as `save_pretrained()` leaves it; by default it
is $PAGED_KV_SMOLLM2. One thread; each part takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers
from machine import processor

from llm.tables import markdown

PARTS = ("step", "memory", "beams", "exact")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load_at_start": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    """Measure one part; print its table, and write the figures to a file where one is named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--model", type=Path, help="the folder of the language model")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of names that transformers changes
    part = import_module(f"llm.{options.part}")
    begin = time.perf_counter()
    facts = machine()
    result = {"schema": 1, "part": options.part, "machine": facts, **part.measure(options)}
    result["minutes"] = round((time.perf_counter() - begin) / 60, 1)
    print(markdown(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

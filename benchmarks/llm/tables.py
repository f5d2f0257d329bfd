"""The tables of what was measured, as markdown: on the terminal, and in the page that shows them.

python benchmarks/llm/tables.py --write
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parent.parent
sys.path.insert(0, str(BENCHMARKS))

RESULTS = BENCHMARKS / "results"
PAGE = BENCHMARKS.parent / "docs" / "benchmarks_huggingface.md"
PARTS = ("step", "memory", "beams", "exact")
END = "<!-- end of results -->"


def markdown(result: dict[str, Any]) -> str:
    """The tables of one part, and what it was measured on."""
    part = import_module(f"llm.{result['part']}")
    facts = ", ".join(
        f"{key.replace('_', ' ')} {value}" for key, value in result["machine"].items()
    )
    lines = [*part.table(result), "", f"Measured on: {facts}; {result['minutes']} minutes."]
    return "\n".join(lines)


def written(page: str, part: str, text: str) -> str:
    """A page with this text between the marks of a part. Raises SystemExit where it has none."""
    start = f"<!-- results: {part} -->\n"
    before, found, rest = page.partition(start)
    _, end, after = rest.partition(END)
    if not found or not end:
        raise SystemExit(f"found no lines '{start.strip()}' and '{END}'")
    return f"{before}{start}{text}\n{end}{after}"


def measured() -> dict[str, Path]:
    """Where the figures of each part are that was measured."""
    paths = {part: RESULTS / f"llm_{part}.json" for part in PARTS}
    return {part: path for part, path in paths.items() if path.exists()}


def main() -> None:
    """Print the tables of all parts that were measured, or put them into the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"put them into {PAGE.name}")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    texts = {part: markdown(json.loads(path.read_text())) for part, path in measured().items()}
    if not options.write:
        print("\n\n".join(texts.values()))
        return
    page = options.page.read_text()
    for part, text in texts.items():
        page = written(page, part, text)
    options.page.write_text(page)


if __name__ == "__main__":
    main()

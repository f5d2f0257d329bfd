"""Every example runs: python blocks of README and docs, and the docstrings of the package."""

from __future__ import annotations

import doctest
import importlib
import os
import re
from pathlib import Path
from typing import Any

import pytest

import paged_kv

ROOT = Path(__file__).parent.parent
PACKAGE = Path(paged_kv.__file__).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CORE_ONLY = os.environ.get("PAGED_KV_CORE_ONLY") == "1"
BEYOND_CORE = ("integrations", "profile", "html", "commands", "cli.py", "__main__.py")


def modules() -> list[str]:
    """Modules of the package whose libraries are there."""
    paths = (path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py")))
    kept = [path for path in paths if path.name not in ("__main__.py", "main_world_model.py")]  # needs LightZero's main
    if CORE_ONLY:
        kept = [path for path in kept if path.parts[0] not in BEYOND_CORE and path.name != "prometheus.py"]
    return [".".join(["paged_kv", *path.with_suffix("").parts]).removesuffix(".__init__") for path in kept]


def blocks(page: Path) -> list[tuple[int, str]]:
    """Python blocks of a page, each with the number of its first line."""
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)) + 1, match.group(1)) for match in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_run(page: Path, request: pytest.FixtureRequest) -> None:
    """The blocks of one page share their names, in order, as a reader would type them."""
    names: dict[str, Any] = {}
    for line, block in blocks(page):
        if CORE_ONLY and re.search(r"lzero|integrations\.lightzero|prometheus|paged_kv\.html", block):
            continue
        # Blank lines in front make the line numbers of a traceback those of the page.
        exec(compile("\n" * (line - 1) + block, str(page), "exec"), names)


def test_readme_has_its_example_near_the_top() -> None:
    line, block = blocks(ROOT / "README.md")[0]
    assert line < 40
    assert len([text for text in block.splitlines() if text.strip()]) <= 14
    for verb in ("new(", "fork(", "append(", "gather(", "release("):
        assert verb in block


@pytest.mark.parametrize("name", modules())
def test_docstrings_run(name: str) -> None:
    module = importlib.import_module(name)
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"

"""Every example runs: python blocks of README and docs, and the docstrings of the package."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import os
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import paged_kv

ROOT = Path(__file__).parents[2]
PACKAGE = Path(paged_kv.__file__).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CORE_ONLY = os.environ.get("PAGED_KV_CORE_ONLY") == "1"
NEEDS_TRANSFORMERS = ("huggingface", "moving_over", "nodes", "search", "tutorial_llm")
NEEDS_MAIN = ("policy", "world_model")  # LightZero's main, that is
INSTALLS = ("everywhere",)  # importing these changes what LightZero builds from then on
BEYOND = r"lzero|transformers|integrations|prometheus|tools\.html"
BEYOND_CORE = ("integrations", "tools", "__main__")


def modules() -> list[str]:
    """Modules of the package whose libraries are there."""
    paths = [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py"))]
    kept = [path.with_suffix("").parts for path in paths]
    kept = [parts for parts in kept if "main" not in parts or parts[-1] not in NEEDS_MAIN]
    kept = [parts for parts in kept if parts[-1] not in INSTALLS]
    if CORE_ONLY:
        kept = [
            parts
            for parts in kept
            if parts[0] not in BEYOND_CORE and parts[-1] not in ("prometheus", "compiled")
        ]
    return [".".join(["paged_kv", *parts]).removesuffix(".__init__") for parts in kept]


class Block(NamedTuple):
    """A python block of a page, and the text block below it, where one follows at once."""

    line: int
    code: str
    output: str | None


def blocks(page: Path) -> list[Block]:
    """The python blocks of a page, each with the number of its first line."""
    text = page.read_text()
    found = re.finditer(
        r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", text, re.MULTILINE | re.DOTALL
    )
    return [Block(text.count("\n", 0, match.start(1)) + 1, match[1], match[2]) for match in found]


@cache
def run(page: Path) -> dict[str, Any]:
    """Run the blocks of one page, which share their names, in order, as a reader would type them;
    returns the names.

    What a block prints must be what stands below it.
    """
    names: dict[str, Any] = {}
    if CORE_ONLY and page.stem in NEEDS_TRANSFORMERS:
        return names
    for line, code, output in blocks(page):
        if CORE_ONLY and re.search(BEYOND, code):
            continue
        # Blank lines in front make the line numbers of a traceback those of the page.
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)
        assert output is None or printed.getvalue() == output, f"{page.name}, block at line {line}"
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_run(page: Path) -> None:
    run(page)


def test_the_tutorial_keeps_its_promise() -> None:
    """The same tree, node by node, in far fewer bytes; and the tutorial shows what was printed."""
    page = ROOT / "docs" / "tutorial.md"
    names = run(page)
    copied = names["nodes"](names["dense_root"])
    paged = names["nodes"](names["paged_root"])
    assert len(copied) == len(paged) == 201
    for a, b in zip(copied, paged):
        assert [child.visits for child in a.children] == [child.visits for child in b.children]
        assert a.total == pytest.approx(b.total, abs=1e-4)
    assert names["dense_bytes"] > 30 * (40 + 200) * names["pages"].token_bytes
    assert sum(block.output is not None for block in blocks(page)) >= 6


def code_lines(code: str) -> int:
    """Lines of code, without blank ones and comments."""
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") for line in code.splitlines()
    )


def test_the_tutorial_is_as_short_as_it_says() -> None:
    """Model, search and pages alone are a program, of as many lines as the page says."""
    page = ROOT / "docs" / "tutorial.md"
    text = page.read_text()
    codes = [block.code for block in blocks(page)]
    parts = [
        next(code for code in codes if mark in code)
        for mark in ("class Transformer", "def search(", "import PagedKVCache\n")
    ]
    said = re.search(
        r"is (\d+) lines of code, .*?: (\d+) for .*?, (\d+)\s+for .*? and (\d+) for ",
        text,
        re.DOTALL,
    )
    assert said is not None
    counted = [code_lines(part) for part in parts]
    assert [int(number) for number in said.groups()] == [sum(counted), *counted]
    assert sum(counted) <= 60
    assert max(len(line) for part in parts for line in part.splitlines()) <= 120
    names: dict[str, Any] = {}
    exec("\n".join(parts), names)
    visits = [child.visits for child in names["paged_root"].children]
    assert f"visits: {visits}\n" in text
    assert sum(visits) == 200


def test_readme_has_its_example_near_the_top() -> None:
    line, block, _ = blocks(ROOT / "README.md")[0]
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

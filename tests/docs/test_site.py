"""The documentation site: what the reference covers, what the pictures show, and what the strict
build refuses.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

import paged_kv
from paged_kv import PagedKVError, errors

DOCS = Path(__file__).parents[2] / "docs"
CORE_ONLY = os.environ.get("PAGED_KV_CORE_ONLY") == "1"
needs_sphinx = pytest.mark.skipif(CORE_ONLY, reason="the core alone has no Sphinx")


def module(name: str) -> Any:
    """A script of the documentation, imported; what it puts on the path is taken off again."""
    before = list(sys.path)
    sys.path.insert(0, str(DOCS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path[:] = before


def documented(page: str) -> list[str]:
    """The names that a page of the reference describes."""
    text = (DOCS / "api" / page).read_text()
    return re.findall(r"^\.\. (?:auto\w+|py:data):: paged_kv\.([\w.]+)", text, re.MULTILINE)


def test_the_reference_has_every_public_name_once() -> None:
    pages = ("cache.md", "manager.md", "errors.md")
    names = [name.rpartition(".")[2] for page in pages for name in documented(page)]
    public = {name for name in vars(errors) if isinstance(getattr(errors, name), type)}
    public = {name for name in public if issubclass(getattr(errors, name), PagedKVError)}
    beside = {
        *("Constants", "SearchOrder", "Standing"),
        *("DenseLayer", "EntryView", "Event", "IndexStats", "ManagerStats", "PagedLayer"),
        *("Bundle", "Source", "Chunk", "Contents", "Tables", "Codec", "Holder"),
        *("save", "load", "Snapshot", "Saved", "Int8Records", "save_bundle"),
    }
    assert sorted(names) == sorted({*paged_kv.__all__, *public, *beside} - {"errors"})


@pytest.mark.lightzero
@pytest.mark.skipif(CORE_ONLY, reason="the core alone has no LightZero")
def test_the_reference_has_every_name_of_the_integration() -> None:
    lightzero = importlib.import_module("paged_kv.integrations.lightzero")
    names = [name.rpartition(".")[2] for name in documented("lightzero.md")]
    assert sorted(set(names) - {"lightzero"}) == sorted(lightzero.__all__)


@pytest.mark.huggingface
@pytest.mark.skipif(CORE_ONLY, reason="the core alone has no transformers")
def test_the_reference_has_every_name_for_transformers() -> None:
    huggingface = importlib.import_module("paged_kv.integrations.huggingface")
    names = [name.rpartition(".")[2] for name in documented("huggingface.md")]
    assert sorted(set(names) - {"huggingface"}) == sorted(huggingface.__all__)


@pytest.mark.huggingface
@pytest.mark.skipif(CORE_ONLY, reason="the core alone has no transformers")
def test_the_reference_has_every_name_of_pools() -> None:
    ray = importlib.import_module("paged_kv.integrations.ray")
    names = [name.rpartition(".")[2] for name in documented("ray.md")]
    assert sorted(set(names) - {"ray"}) == sorted(ray.__all__)


def test_the_pictures_are_those_that_the_caches_draw() -> None:
    pictures = module("pictures")
    drawn = {f"{scene.__name__}.svg": scene().svg() for scene in pictures.SCENES}
    committed = {path.name: path.read_text() for path in (DOCS / "images").glob("*.svg")}
    assert drawn == {name: committed.get(name) for name in drawn}, "run: python docs/pictures.py"


def test_the_pictures_are_whole_and_know_light_and_dark() -> None:
    for path in (DOCS / "images").glob("*.svg"):
        root = ElementTree.fromstring(path.read_text())
        assert root.findtext("{http://www.w3.org/2000/svg}title")
        assert "prefers-color-scheme:dark" in path.read_text()


def test_a_picture_shows_what_is_in_the_slots() -> None:
    """The reader of the pictures sees a changed token, so it does read the cache."""
    pictures = module("pictures")
    story = pictures.root_of_six()
    assert [token.label for token in story.pages()[2]] == ["r4", "r5", "", ""]
    story.cache.truncate([story.seqs["root"]], 1)
    assert [token.label for token in story.pages()[2]] == ["r4", "", "", ""]
    assert story.refs() == {1: 1, 2: 1, 3: 0, 4: 0}


@needs_sphinx
@pytest.mark.parametrize(
    "tag",
    [
        '<script src="https://x.org/a.js">',
        '<link rel="stylesheet" href="//x.org/a.css">',
        "<img src='http://x.org/a.png'>",
    ],
)
def test_the_build_ends_where_a_page_loads_from_elsewhere(tag: str, tmp_path: Path) -> None:
    from sphinx.errors import ExtensionError

    (tmp_path / "page.html").write_text(f"<html>{tag}</html>")
    with pytest.raises(ExtensionError, match=r"page\.html loads from elsewhere: .*x\.org"):
        module("conf").nothing_from_elsewhere(SimpleNamespace(outdir=tmp_path), None)


@needs_sphinx
def test_links_to_elsewhere_are_fine(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(
        '<a href="https://x.org">x</a> <script src="_static/a.js"></script>'
    )
    module("conf").nothing_from_elsewhere(SimpleNamespace(outdir=tmp_path), None)


@needs_sphinx
def test_pages_that_are_not_there_are_not_listed() -> None:
    app = SimpleNamespace(
        env=SimpleNamespace(found_docs={"report", "tools", "lightzero", "api/index", "api/cache"})
    )
    tools = ["```{toctree}\nrecording\nreport\nestimate\n```\n"]
    api = ["```{toctree}\ncache\nlightzero\n```\n"]
    conf = module("conf")
    conf.only_pages_there(app, "tools", tools)
    conf.only_pages_there(app, "api/index", api)
    assert tools == ["```{toctree}\nreport\n```\n"]
    assert api == ["```{toctree}\ncache\n```\n"]

"""The pictures of the benchmarks show what was measured, in light and in dark."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS = BENCHMARKS / "results"
sys.path.insert(0, str(BENCHMARKS))

if os.environ.get("PAGED_KV_CORE_ONLY") == "1":
    pytest.skip("the core alone has no altair", allow_module_level=True)

import altair as alt  # noqa: E402
import ray_placement  # noqa: E402
import ray_replay  # noqa: E402
import train_both_picture  # noqa: E402
from peers import plots  # noqa: E402

from paged_kv.tools.html.picture import svg  # noqa: E402

PICTURES = (
    "peers_bytes.svg",
    "peers_scaling.svg",
    "peers_times.svg",
    "ray_placement.svg",
    "ray_replay.svg",
    "train_both.svg",
)
COLOURED = re.compile(r'\b(fill|stroke)="(#\w+)"')


def words(picture: str) -> list[str]:
    """All texts of a picture, in their order; where they stand depends on the fonts at hand."""
    return [
        element.text or ""
        for element in ElementTree.fromstring(picture).iter()
        if element.tag.endswith("text")
    ]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every picture, drawn from the committed numbers."""
    folder = tmp_path_factory.mktemp("pictures")
    list(plots.draw(json.loads((RESULTS / "peers.json").read_text()), folder))
    placed = json.loads((RESULTS / "ray_placement.json").read_text())["rows"]
    ray_placement.draw(placed, folder / "ray_placement.svg")
    replayed = json.loads((RESULTS / "ray_replay.json").read_text())["rows"]
    ray_replay.draw(replayed, folder / "ray_replay.svg")
    sides = json.loads((RESULTS / "train_both.json").read_text())["sides"]
    (folder / "train_both.svg").write_text(train_both_picture.drawing(sides))
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_every_picture_is_drawn(drawn: dict[str, str]) -> None:
    assert sorted(drawn) == sorted(path.name for path in RESULTS.glob("*.svg")) == list(PICTURES)


@pytest.mark.parametrize("name", PICTURES)
def test_the_pictures_show_what_was_measured(name: str, drawn: dict[str, str]) -> None:
    committed = words((RESULTS / name).read_text())
    assert committed == words(drawn[name]), "draw it again: see the benchmark that wrote it"
    assert len(committed) > 20


@pytest.mark.parametrize("name", PICTURES)
def test_every_colour_has_its_dark_one(name: str) -> None:
    picture = (RESULTS / name).read_text()
    style = picture.partition("</style>")[0]
    assert "prefers-color-scheme:dark" in style
    for what, colour in COLOURED.findall(picture.partition("</style>")[2]):
        assert f'[{what}="{colour}"]' in style
    assert "var(" not in picture
    assert ElementTree.fromstring(picture).findtext("{http://www.w3.org/2000/svg}title")


def test_a_title_cannot_end_its_element() -> None:
    rows = alt.InlineData(values=[{"x": 1}])
    chart = alt.Chart(rows).mark_bar(color="var(--paged)").encode(x="x:Q")
    picture = svg(chart, "a < b & </title>")
    title = ElementTree.fromstring(picture).findtext("{http://www.w3.org/2000/svg}title")
    assert title == "a < b & </title>"

"""The page without a browser: what it says, that it loads nothing, and that nothing in the data can
break out.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from html_recordings import HOSTILE, both, charts_of, small_search

from paged_kv.recording import Recording, header
from paged_kv.tools.html import charts, page
from paged_kv.tools.html.page import NOTHING
from paged_kv.tools.html.style import COLOURS
from paged_kv.tools.profile.words import caches, sides

LIMIT = 5_000_000


class Seen(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.inside: list[str] = []
        self.texts: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.inside.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_data(self, data: str) -> None:
        name = self.inside[-1] if self.inside else ""
        self.texts[name] = self.texts.get(name, "") + data


def policy_of(text: str) -> str:
    """What the page allows itself."""
    return next(value for _, _, value in Seen(text).attributes if value and "default-src" in value)


# -- the document


def test_the_page_loads_nothing_and_says_so_to_the_browser(text: str) -> None:
    seen = Seen(text)
    loading = {
        "src",
        "href",
        "srcset",
        "data",
        "action",
        "poster",
        "background",
        "ping",
        "formaction",
    }
    assert [found for found in seen.attributes if found[1] in loading] == []
    assert {"link", "iframe", "object", "embed", "img", "base"}.isdisjoint(seen.tags)
    assert "@import" not in seen.texts["style"]
    assert "url(" not in seen.texts["style"]
    policy = policy_of(text)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "http" not in policy
    assert len(text.encode()) < LIMIT


def test_only_the_script_that_was_made_may_run(text: str) -> None:
    code = text.rpartition("<script>")[2].partition("</script>")[0]
    wanted = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert f"script-src 'sha256-{wanted}';" in policy_of(text)


def test_a_hostile_title_stays_text(tmp_path: Path) -> None:
    plain = Seen(page(both(tmp_path / "plain.jsonl")))
    recordings = both(tmp_path / "hostile.jsonl", title=HOSTILE)
    for event in recordings[1].events:
        event["name"] = HOSTILE
    made = page(
        [
            dataclasses.replace(recordings[0], header=header(HOSTILE, {"token_bytes": 8})),
            recordings[1],
        ]
    )
    seen = Seen(made)
    assert seen.tags == plain.tags
    assert seen.tags["script"] == 2
    assert "alert(1)</script>" not in made
    assert HOSTILE in seen.texts["h1"]  # as text it is all there


def test_every_figure_says_what_to_see_and_how_to_read_it(text: str) -> None:
    figures = re.findall(
        r"<figure.*?<h3>(.+?)</h3>.*?id=\"(.+?)\".*?<figcaption>(.+?)</figcaption>", text, re.DOTALL
    )
    specs = charts_of(text)
    assert {name for _, name, _ in figures} == set(specs)
    assert len(figures) == len(specs) >= 10
    for title, name, reading in figures:
        assert len(title) > 15, name
        assert len(reading) > 40, name
        assert reading.endswith("."), name


def axes(spec: Any) -> list[tuple[str, dict[str, Any]]]:
    """The x and y of a chart and all its layers, those without an axis left out."""
    found = [
        (channel, value)
        for channel, value in spec.get("encoding", {}).items()
        if channel in ("x", "y")
    ]
    for layer in spec.get("layer", []):
        found += axes(layer)
    return [(channel, value) for channel, value in found if value.get("axis", ...) is not None]


def test_every_axis_has_a_title(text: str) -> None:
    for name, spec in charts_of(text).items():
        for channel, value in axes(spec):
            if value["type"] == "quantitative" or channel == "x":
                assert value.get("title"), f"{name}: {channel}"
    held = dict(axes(charts_of(text)["held"]))
    assert re.fullmatch(r"key/value bytes \((B|KiB|MiB|GiB)\)", held["y"]["title"])
    assert held["x"]["title"] == "simulation"


def test_colours_follow_the_scheme(text: str) -> None:
    """A colour by number would be right in one scheme only."""
    assert re.findall(r'"#[0-9a-fA-F]{3,8}"', json.dumps(charts_of(text))) == []
    sheet = (Path(charts.__file__).parent / "page.css").read_text()
    assert re.findall(r"#[0-9a-fA-F]{3,8};", sheet) == []
    used = set(re.findall(r"var\(--([\w-]+)\)", json.dumps(charts_of(text)) + sheet))
    assert used <= set(COLOURS)
    for colour in COLOURS.values():
        assert text.count(f" {colour.light};") >= 1
        assert text.count(f" {colour.dark};") >= 2  # asked for by the system, or by the reader


# -- nothing, little and odd things


def test_without_anything_the_page_says_so() -> None:
    for recordings in (
        [],
        [Recording(header("empty", None))],
        [Recording(header("empty", {"page_size": 2}))],
    ):
        made = page(recordings)
        assert NOTHING in made
        assert charts_of(made) == {}


def test_a_result_without_recordings_is_shown(
    profiled: tuple[dict[str, Any], list[Recording]],
) -> None:
    made = page([], profiled[0])
    assert NOTHING in made
    assert "Decisions of the agent" in made
    assert set(charts_of(made)) == {"split"}
    rows = next(iter(charts_of(made)["split"]["datasets"].values()))
    for name, side in zip(sides(profiled[0]["workload"]), caches(profiled[0])):
        bar = {row["p"]: row["y"] for row in rows if row["n"] == name}
        assert bar == side["search_parts_us_per_simulation"]
        assert sum(row["s"] for row in rows if row["n"] == name) == pytest.approx(1)


def test_one_recording_stands_against_dense_copies(tmp_path: Path) -> None:
    recording, _ = small_search(tmp_path / "one.jsonl")
    made = page([recording])
    dense, held = (
        max(row[name] for row in recording.samples) for name in ("bytes_dense", "bytes_in_use")
    )
    assert f"{dense / held:.3g}x less" in made
    assert "seconds since the recording began" in json.dumps(charts_of(made)["held"])


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    recording, _ = small_search(tmp_path / "one.jsonl")
    made = page([dataclasses.replace(recording, torn=True, ends=[])])
    assert "the last line of the file was cut off" in made
    assert "the recording was cut off" in made


def test_lines_without_their_fields_do_no_harm() -> None:
    """Fields that make no sense for a cache are missing; foreign files may hold anything."""
    odd = [
        {"kind": "sample", "t": 0.1},
        {"kind": "sample", "t": 0.2, "bytes_in_use": "many", "pages_by_refs": [1]},
        {"kind": "sample", "t": 0.3, "bytes_in_use": None, "queries": True},
    ]
    recording = Recording(
        header("odd", {"page_size": 2}),
        samples=odd,
        trees=[{"kind": "tree", "t": 0.1, "nodes": [{}, 5]}],
        pages=[
            {
                "kind": "pages",
                "t": 0.1,
                "refs": [1, None, "x"],
                "filled": [1, 2, 3],
                "owner": [None] * 3,
            },
            {"kind": "pages", "t": 0.1},
        ],
        lives=[{"kind": "lives", "t": 0.1, "edges": [0.0], "counts": [4]}],
    )
    assert "1 of 1 pages in use" in page([recording])

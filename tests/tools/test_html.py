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
from html_recordings import HOSTILE, both, counted, of_another, small_search
from hypothesis import given
from hypothesis import strategies as st

from paged_kv.recording import Recording, header
from paged_kv.tools import cli
from paged_kv.tools.commands import common
from paged_kv.tools.html import charts, page
from paged_kv.tools.html.glance import cards
from paged_kv.tools.html.histograms import fill, lives
from paged_kv.tools.html.page import NOTHING
from paged_kv.tools.html.pagemap import cells_of, page_map
from paged_kv.tools.html.series import MAX_SAMPLES, axis, sources, thinned
from paged_kv.tools.html.style import BIN_LABELS, COLOURS
from paged_kv.tools.html.tree import MAX_TREES, grown, tree
from paged_kv.tools.profile import profile
from paged_kv.tools.profile.workload import ENOUGH_ROOTS

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


def charts_of(text: str) -> dict[str, Any]:
    """The specifications that a page carries."""
    found = re.search(
        r'<script type="application/json" id="charts">(.*?)</script>', text, re.DOTALL
    )
    assert found is not None
    specs: dict[str, Any] = json.loads(found.group(1))
    return specs


def policy_of(text: str) -> str:
    """What the page allows itself."""
    return next(value for _, _, value in Seen(text).attributes if value and "default-src" in value)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Recording]:
    return both(tmp_path_factory.mktemp("pair") / "pages.jsonl")


@pytest.fixture(scope="module")
def profiled() -> tuple[dict[str, Any], list[Recording]]:
    """A short profile of the reference world model, with its recordings."""
    recordings: list[Recording] = []
    result = profile(
        "cartpole", envs=3, simulations=6, roots=4, reference=True, on_recording=recordings.append
    )
    return result, recordings


@pytest.fixture(scope="module")
def text(profiled: tuple[dict[str, Any], list[Recording]]) -> str:
    result, recordings = profiled
    return page(recordings, result)


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
    made = page([dataclasses.replace(recording, torn=3, ends=[])])
    assert "3 lines of the file could not be read" in made
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


# -- the numbers


def points(spec: dict[str, Any], key: str) -> list[float]:
    """The heights of one line of a chart."""
    return [row["y"] for data in spec["datasets"].values() for row in data if row.get("k") == key]


def test_the_lines_are_those_of_the_recordings(pair: list[Recording]) -> None:
    spec = charts.held(sources(pair), axis(sources(pair)))
    assert spec is not None
    made = spec.spec()
    unit = {"B": 1, "KiB": 1 << 10}[re.search(r"\((\w+)\)", json.dumps(made))[1]]  # type: ignore[index]
    assert points(made, "r0_bytes_in_use") == [
        round(row["bytes_in_use"] / unit, 4) for row in pair[0].samples
    ]
    assert points(made, "r1_bytes_unique") == [
        round(row["bytes_unique"] / unit, 4) for row in pair[1].samples
    ]
    assert spec.title.startswith("another cache peaks at")


def test_pages_by_references_add_up(pair: list[Recording]) -> None:
    found = sources(pair)
    figure = charts.references(found[1], axis(found))
    assert figure is not None
    rows = next(iter(figure.spec()["datasets"].values()))
    at = Counter[float]()
    for row in rows:
        at[row["x"]] += row["y"]
    page_bytes = pair[1].cache["page_bytes"]
    assert [at[row["simulation"]] * page_bytes for row in pair[1].samples] == [
        row["bytes_in_use"] for row in pair[1].samples
    ]


def test_the_page_map_is_that_of_the_cache(tmp_path: Path) -> None:
    recording, cache = small_search(tmp_path / "one.jsonl")
    source = sources([recording])[0]
    cells = cells_of(source)
    used = [cell for cell in cells if cell["r"]]
    assert len(cells) >= len(used) == 5 // 2 + 1 + 36  # the root's pages, and one a node
    assert sum(cell["f"] for cell in used) == 5 + 2 * 36
    assert {cell["b"] for cell in used} <= set(BIN_LABELS)
    figure = page_map(source)
    slots = fill(source)
    assert figure is not None
    assert slots is not None
    assert figure.title.startswith(f"{len(used)} of {len(cells)} pages in use")
    assert slots.title.startswith("1 of 78 slots are dead")  # the one in front of the root
    assert lives(source) is not None
    cache.check()


def test_a_root_step_is_marked(pair: list[Recording]) -> None:
    assert axis(sources(pair)).breaks == list(range(7, len(pair[0].samples) + 1, 6))


def test_hits_say_whose_they_are(pair: list[Recording]) -> None:
    figure = charts.hits(sources(pair), axis(sources(pair)))
    assert figure is not None
    assert (
        figure.title == "a small search: 87.5 % of lookups hit; another cache: 100 % of lookups hit"
    )


@given(st.lists(st.integers(0, 10**9), max_size=60), st.integers(1, 20))
def test_thinning_keeps_order_and_peak(held: list[int], limit: int) -> None:
    samples = [{"t": float(n), "bytes_in_use": value} for n, value in enumerate(held)]
    kept = thinned(samples, limit)
    assert len(kept) == min(len(samples), limit)
    assert [row["t"] for row in kept] == sorted({row["t"] for row in kept})
    assert max((row["bytes_in_use"] for row in kept), default=0) == max(held, default=0)


def test_a_long_recording_is_thinned_and_says_so(pair: list[Recording]) -> None:
    row = pair[1].samples[-1]
    many = [{**row, "simulation": n, "t": float(n)} for n in range(20_000)]
    made = page([dataclasses.replace(pair[1], samples=many)])
    assert f"{MAX_SAMPLES} of 20,000 samples are drawn" in made
    assert len(made.encode()) < LIMIT


@given(st.lists(st.integers(-3, 40), max_size=40))
def test_trees_are_laid_out_without_overlap(parents: list[int]) -> None:
    """Node i hangs below one before it, or is a root; parents that do not exist make roots, too."""
    known = [None if parent < 0 else parent for parent in parents]
    nodes = [
        {"id": n, "parent": parent + 100 if parent is not None and parent >= n else parent}
        for n, parent in enumerate(known)
    ]
    forest = grown(nodes)
    assert sorted(node["id"] for placed in forest for node, _, _ in placed) == list(
        range(len(nodes))
    )
    assert [len(placed) for placed in forest] == sorted(
        (len(placed) for placed in forest), reverse=True
    )
    for placed in forest:
        assert len({(x, depth) for _, x, depth in placed}) == len(placed)
        at = {node["id"]: (x, depth) for node, x, depth in placed}
        for node, _, depth in placed:
            below = [
                at[child["id"]]
                for child in nodes
                if child["parent"] == node["id"] and child["id"] in at
            ]
            assert all(down == depth + 1 for _, down in below)
            if below:
                assert min(x for x, _ in below) <= at[node["id"]][0] <= max(x for x, _ in below)


def test_the_tree_counts_holders_over_the_whole_forest(tmp_path: Path) -> None:
    recording, _ = small_search(tmp_path / "one.jsonl")
    figure = tree(sources([recording])[0])
    assert figure is not None
    nodes = recording.trees[0]["nodes"]
    holders = Counter(page for node in nodes for page in node["pages"])
    rows = {row["id"]: row for row in next(iter(figure.spec()["datasets"].values()))}
    assert {node["id"]: holders[node["pages"][-1]] for node in nodes} == {
        name: row["h"] for name, row in rows.items()
    }


def test_large_forests_are_cut_and_say_so(tmp_path: Path) -> None:
    recording, _ = small_search(tmp_path / "one.jsonl")
    roots = [{"id": n, "parent": None, "tokens": 1, "pages": [n + 1]} for n in range(3000)]
    chain = [
        {"id": n, "parent": n - 1 if n else None, "tokens": 1, "pages": [1]} for n in range(3000)
    ]
    for nodes, said in ((roots, f"The {MAX_TREES} largest of 3000 trees"), (chain, "")):
        lines = [{"kind": "tree", "t": 0.1, "title": "many", "nodes": nodes}]
        figure = tree(sources([dataclasses.replace(recording, trees=lines)])[0])
        assert figure is not None
        assert said in figure.reading
        assert len(json.dumps(figure.spec())) < 300_000


def test_cards_say_when_something_got_worse(
    profiled: tuple[dict[str, Any], list[Recording]],
) -> None:
    worse = json.loads(json.dumps(profiled[0]))
    worse["workload"]["roots"] = ENOUGH_ROOTS
    old = worse["caches"]["dense"]
    new = worse["caches"]["paged"]
    old["search_us_per_simulation"] = 100.0
    new["search_us_per_simulation"] = 150.0
    worse["fidelity"]["actions_equal"] -= 1
    found = {card.label: card for card in cards(worse)}
    assert (found["Search time per simulation"].big, found["Search time per simulation"].mood) == (
        "1.5x slower",
        "bad",
    )
    assert (found["Decisions of the agent"].big, found["Decisions of the agent"].mood) == (
        "they differ",
        "bad",
    )


def test_times_of_few_root_steps_are_not_compared(
    profiled: tuple[dict[str, Any], list[Recording]],
) -> None:
    assert profiled[0]["workload"]["roots"] < ENOUGH_ROOTS
    found = {card.label: card for card in cards(profiled[0])}
    assert (
        found["Search time per simulation"].big
        == found["Cache time per simulation"].big
        == "not compared"
    )
    assert found["Cache kernels per simulation"].mood == "good"


# -- where the data comes from


def test_the_recorded_pass_sees_what_was_measured(
    profiled: tuple[dict[str, Any], list[Recording]],
) -> None:
    result, (dense, paged) = profiled
    assert (dense.title, paged.title) == ("dense cache", "paged")
    assert len(dense.samples) == len(paged.samples) == 4 * 6
    for recording, name in ((dense, "dense"), (paged, "paged")):
        side = result["caches"][name]
        assert max(row["bytes_in_use"] for row in recording.samples) == side["kv_bytes_peak"]
        assert (
            max(row["bytes_unique"] for row in recording.samples) == side["unique_token_bytes_peak"]
        )
        assert [row["simulation"] for row in recording.samples] == list(range(1, 25))
        spent = [row["cache_s"] for row in recording.samples]
        assert spent == sorted(spent)
        assert recording.samples[-1]["queries"] == recording.samples[-1]["hits"] > 0
        assert recording.reason == "done"
    assert [line["title"] for line in paged.trees if line["title"].startswith("root step")] == [
        f"root step {n}" for n in range(1, 5)
    ]
    assert dense.trees == []


@pytest.mark.lightzero
def test_both_caches_of_lightzero_are_recorded() -> None:
    recordings: list[Recording] = []
    result = profile("cartpole", envs=2, simulations=5, roots=2, on_recording=recordings.append)
    theirs, ours = recordings
    assert (theirs.title, ours.title) == ("LightZero's cache", "paged")
    assert (
        max(row["bytes_in_use"] for row in theirs.samples)
        == result["caches"]["dense"]["kv_bytes_peak"]
    )
    assert (
        max(row["bytes_in_use"] for row in ours.samples)
        == result["caches"]["paged"]["kv_bytes_peak"]
    )
    roots = [node for node in ours.trees[-1]["nodes"] if node["parent"] is None]
    assert len(roots) >= 2
    assert "LightZero&#39;s cache peaks at" in page(recordings, result)


# -- the commands

SHORT = ["profile", "--reference", "--envs", "2", "--simulations", "3", "--roots", "2"]


def test_profile_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.html"
    assert cli.main([*SHORT, "--html", str(file)]) == 0
    assert f"Page: {file}" in capsys.readouterr().out
    assert len(charts_of(file.read_text(encoding="utf-8"))) >= 10


def test_several_presets_make_several_pages(
    tmp_path: Path,
    profiled: tuple[dict[str, Any], list[Recording]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import paged_kv.tools.profile as package

    def named(name: str, **_: Any) -> dict[str, Any]:
        return {**profiled[0], "workload": {**profiled[0]["workload"], "preset": name}}

    monkeypatch.setattr(package, "profile", named)
    assert (
        cli.main(
            ["profile", "--reference", "--preset", "all", "--html", str(tmp_path / "report.html")]
        )
        == 0
    )
    names = ("atari", "atari-8l", "cartpole", "long", "memory")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"report-{name}.html" for name in names
    )


def test_missing_libraries_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = common.importlib.util.find_spec
    monkeypatch.setattr(
        common.importlib.util, "find_spec", lambda name: None if name == "altair" else find(name)
    )
    assert cli.main([*SHORT, "--html", str(tmp_path / "report.html")]) == 1
    assert capsys.readouterr().err == (
        "paged-kv: --html needs altair and vl-convert: pip install 'paged-kv[report]'\n"
    )


def test_a_page_that_cannot_be_written_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*SHORT, "--html", str(tmp_path / "no" / "report.html")]) == 2
    assert capsys.readouterr().err.endswith("report.html': no such directory\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_ends_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SHORT, "--html", "/dev/full"]) == 1
    kept = re.fullmatch(
        r"paged-kv: cannot write to '/dev/full': No space left on device; "
        r"what was to be written is in (\S+)\n",
        capsys.readouterr().err,
    )
    assert kept is not None
    assert "</html>" in Path(kept[1]).read_text(encoding="utf-8")
    Path(kept[1]).unlink()


def test_report_writes_the_page_of_a_recording(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_search(tmp_path / "run.jsonl")
    assert (
        cli.main(["report", str(tmp_path / "run.jsonl"), "--html", str(tmp_path / "page.html")])
        == 0
    )
    assert "tree-r0" in charts_of((tmp_path / "page.html").read_text(encoding="utf-8"))


def test_two_recordings_of_pages_each_have_their_sections(tmp_path: Path) -> None:
    first, _ = small_search(tmp_path / "a.jsonl", title="first")
    second, _ = small_search(tmp_path / "b.jsonl", title="second", steps=5)
    made = page([first, second])
    assert {"tree-r0", "tree-r1", "map-r0", "map-r1"} <= set(charts_of(made))
    assert "The tree of one search of second" in made


def test_the_helpers_of_these_tests_make_what_they_say(tmp_path: Path) -> None:
    ours = counted(small_search(tmp_path / "one.jsonl")[0])
    assert of_another(ours).samples[3]["bytes_in_use"] == 6 * ours.samples[3]["bytes_in_use"]

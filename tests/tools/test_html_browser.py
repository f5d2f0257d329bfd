"""The page in a real browser: it draws everything, asks the network for nothing, and its controls
work.

Without a browser these tests are skipped and say so; under CI=true they fail.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from html_recordings import HOSTILE, both, of_workers

from paged_kv.recording import Recording
from paged_kv.tools.html import page, workers_page
from paged_kv.tools.profile import profile

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDE = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
TIMEOUT = 20_000  # milliseconds


PATH = next(filter(None, map(shutil.which, BROWSERS)), None)


def missing() -> str | None:
    """What is missing for these tests."""
    if PATH is None:
        return f"none of {', '.join(BROWSERS)} is installed"
    return None if importlib.util.find_spec("playwright") else "playwright is not installed"


def without_a_browser(why: str, *, whole_module: bool = False) -> None:
    """Skip, or fail where a skipped test would go unnoticed."""
    message = f"the page was NOT tested in a browser: {why}"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message, allow_module_level=whole_module)


if missing() and os.environ.get("CI") != "true":
    without_a_browser(str(missing()), whole_module=True)  # one line for all of them


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if missing():
        without_a_browser(str(missing()))
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as playwright:
        try:
            launched = playwright.chromium.launch(executable_path=PATH, args=["--no-sandbox"])
        except Error as error:
            without_a_browser(str(error).splitlines()[0])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a short profile."""
    recordings: list[Recording] = []
    result = profile(
        "cartpole", envs=3, simulations=8, roots=3, reference=True, on_recording=recordings.append
    )
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(recordings, result), encoding="utf-8")
    return path


def eventually(tab: Any, expression: str) -> None:
    """Wait until an expression is true. Asked from here, since the page allows no script of ours to
    poll it.
    """
    for _ in range(TIMEOUT // 50):
        if tab.evaluate(expression):
            return
        tab.wait_for_timeout(50)
    pytest.fail(f"never true: {expression}")


class Visit:
    """One page in one window, with all that it asked for and complained about."""

    def __init__(
        self, browser: Any, path: Path, viewport: dict[str, int], scheme: str = "light"
    ) -> None:
        self.context = browser.new_context(
            viewport=viewport, color_scheme=scheme, has_touch=viewport is PHONE
        )
        self.asked: list[str] = []
        self.said: list[str] = []
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(TIMEOUT)
        self.tab.on("request", lambda request: self.asked.append(request.url))
        self.tab.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.tab.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        self.tab.on(
            "dialog",
            lambda dialog: (self.said.append(f"dialog: {dialog.message}"), dialog.dismiss()),
        )
        self.tab.goto(path.as_uri())
        self.tab.wait_for_selector("html[data-charts=drawn]", state="attached")
        self.path = path

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def check(self) -> None:
        """Nothing was asked for but the file itself, and nobody complained."""
        assert self.asked == [self.path.as_uri()]
        assert self.said == []

    def style(self, selector: str, name: str) -> str:
        """A computed style."""
        return str(
            self.tab.eval_on_selector(selector, f"element => getComputedStyle(element).{name}")
        )

    def tooltip(self) -> str:
        """What the tooltip says, once it is there."""
        self.tab.wait_for_selector("#vg-tooltip-element.visible")
        return str(self.tab.inner_text("#vg-tooltip-element"))


def luminance(colour: str) -> float:
    """Relative luminance of an rgb(...) text, as the accessibility guidelines define it."""
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))


def contrast(first: str, second: str) -> float:
    """Contrast of two colours, 1 to 21."""
    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


@pytest.fixture(scope="module")
def wide(browser: Any, file: Path) -> Iterator[Visit]:
    """One visit for all that only points and clicks."""
    with Visit(browser, file, WIDE) as visit:
        yield visit


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["wide", "phone"])
def test_all_is_drawn_and_nothing_loaded(
    browser: Any, file: Path, viewport: dict[str, int], scheme: str
) -> None:
    with Visit(browser, file, viewport, scheme) as visit:
        boxes = visit.tab.eval_on_selector_all(
            ".chart",
            "all => all.map(box => [box.id, box.querySelectorAll('svg .mark-group path, svg "
            "path').length])",
        )
        assert len(boxes) >= 10
        assert [name for name, marks in boxes if marks < 2] == []
        root = visit.tab.evaluate(
            "[document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth]"
        )
        assert max(root) == viewport["width"], "the page scrolls sideways"
        cut = (
            "all => all.filter(box => box.scrollWidth > box.clientWidth + 1).map(box => "
            "box.innerHTML)"
        )
        assert visit.tab.eval_on_selector_all("figure:not(.fixed) .scroll", cut) == []
        text = visit.style("body", "color")
        back = visit.style("body", "backgroundColor")
        assert contrast(text, back) >= 7
        assert (luminance(back) > 0.5) == (scheme == "light")
        sheet = visit.style("figure", "backgroundColor")
        for name in ("#held", "#hits"):
            label = f"{name} .role-axis-label text"
            line = f"{name} .mark-line path"
            assert contrast(visit.style(label, "fill"), sheet) >= 4.5
            assert contrast(visit.style(line, "stroke"), sheet) >= 3
        visit.check()


def test_the_scheme_can_be_chosen_and_is_kept(browser: Any, file: Path) -> None:
    with Visit(browser, file, WIDE, "light") as visit:
        line = "#held .mark-line path"
        before = visit.style("body", "backgroundColor"), visit.style(line, "stroke")
        visit.tab.click(".schemes button[value=dark]")
        after = visit.style("body", "backgroundColor"), visit.style(line, "stroke")
        assert luminance(after[0]) < 0.1 < luminance(before[0])
        assert before[1] != after[1], "the charts follow"
        visit.tab.reload()
        visit.tab.wait_for_selector("html[data-charts=drawn]", state="attached")
        assert visit.style("body", "backgroundColor") == after[0]
        assert visit.tab.get_attribute(".schemes button[value=dark]", "aria-pressed") == "true"
        visit.tab.click(".schemes button[value=auto]")
        assert visit.style("body", "backgroundColor") == before[0]
        assert visit.said == []


def test_pointing_at_a_line_reads_all_lines(wide: Visit) -> None:
    wide.tab.locator("#held").scroll_into_view_if_needed()
    box = wide.tab.locator("#held svg").bounding_box()
    wide.tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + 90)
    wide.tab.mouse.move(box["x"] + box["width"] / 2 + 3, box["y"] + 92)
    said = wide.tooltip()
    for name in (
        "simulation",
        "dense cache",
        "paged",
        "dense copies would hold",
        "unique tokens need",
    ):
        assert name in said
    wide.check()


def test_the_legend_singles_a_line_out(wide: Visit) -> None:
    faded = (
        "() => [...document.querySelectorAll('#held .mark-line path')].filter("
        "line => Number(line.getAttribute('opacity')) < 0.5).length"
    )
    assert wide.tab.evaluate(faded) == 0
    wide.tab.locator("#held .role-legend-label text", has_text="paged").first.click()
    eventually(wide.tab, f"({faded})() === 3")
    wide.check()


def test_the_tree_shows_sizes_and_whom_a_page_serves(wide: Visit) -> None:
    nodes = wide.tab.locator("#tree-r1 .mark-symbol.role-mark path")
    count = nodes.count()
    assert count > 4
    ringed = (
        "() => [...document.querySelectorAll('#tree-r1 .mark-symbol.role-mark path')].filter("
        "node => node.getAttribute('stroke-width') === '3').length"
    )
    nodes.first.scroll_into_view_if_needed()
    nodes.first.hover()
    said = wide.tooltip()
    assert "tokens of its context" in said
    assert " B" in said or "KiB" in said
    eventually(wide.tab, f"({ringed})() >= 1")
    assert wide.tab.evaluate(ringed) <= count
    wide.tab.select_option("#tree-r1 .vega-bind select", index=1)
    wide.tab.mouse.move(0, 0)
    eventually(wide.tab, f"({ringed})() === 0")
    assert nodes.count() > 4
    wide.check()


def test_charts_follow_the_width_of_the_window(browser: Any, file: Path) -> None:
    with Visit(browser, file, WIDE) as visit:
        visit.tab.set_viewport_size(PHONE)
        eventually(
            visit.tab, "document.querySelector('#held svg').getBoundingClientRect().width < 390"
        )
        assert visit.tab.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        visit.check()


def test_the_page_map_names_owner_and_filling(browser: Any, file: Path) -> None:
    with Visit(browser, file, PHONE) as visit:
        cell = visit.tab.locator("#map-r1 .mark-rect.role-mark path[aria-label*='owner']").first
        cell.scroll_into_view_if_needed()
        cell.tap()
        said = visit.tooltip()
        for name in ("page", "held by (sequences)", "slots filled, of 2", "owner (sequence)"):
            assert name in said
        visit.check()


def test_hostile_titles_do_nothing(browser: Any, tmp_path: Path) -> None:
    recordings = both(tmp_path / "hostile.jsonl", title=HOSTILE)
    for event in recordings[1].events:
        event["name"] = HOSTILE
    path = tmp_path / "report.html"
    path.write_text(page(recordings), encoding="utf-8")
    with Visit(browser, path, WIDE) as visit:
        assert HOSTILE.split("<img")[0] in visit.tab.inner_text("h1")
        bars = visit.tab.locator("#verbs-r1 .mark-rect.role-mark path").first
        bars.scroll_into_view_if_needed()
        bars.hover()
        assert "<script>alert(1)" in visit.tooltip()
        assert visit.tab.locator("img").count() == 0
        visit.check()


@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["wide", "phone"])
def test_the_page_of_workers_is_drawn(
    browser: Any, tmp_path: Path, viewport: dict[str, int]
) -> None:
    path = tmp_path / "report.html"
    path.write_text(workers_page(of_workers(tmp_path, 3)), encoding="utf-8")
    with Visit(browser, path, viewport, "dark") as visit:
        marks = visit.tab.eval_on_selector_all(
            ".chart", "all => all.map(box => [box.id, box.querySelectorAll('svg path').length])"
        )
        assert len(marks) >= 10
        assert [name for name, count in marks if count < 2] == []
        assert visit.tab.evaluate("document.documentElement.scrollWidth") == viewport["width"]
        cell = visit.tab.locator("#memory-of-workers .mark-rect.role-mark path").first
        cell.scroll_into_view_if_needed()
        cell.hover()
        for name in ("worker", "from second", "bytes in use"):
            assert name in visit.tooltip()
        assert "the recording ends early" in visit.tab.inner_text(".notice")
        visit.check()


def test_an_empty_page_is_quiet(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "empty.html"
    path.write_text(page([]), encoding="utf-8")
    with Visit(browser, path, PHONE) as visit:
        assert "Nothing was recorded" in visit.tab.inner_text("main")
        visit.check()

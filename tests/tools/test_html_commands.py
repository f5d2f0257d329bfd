"""How `profile` and `report` write the page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from html_recordings import charts_of, counted, of_another, small_search

from paged_kv.recording import Recording
from paged_kv.tools import cli
from paged_kv.tools.commands import common
from paged_kv.tools.html import page

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

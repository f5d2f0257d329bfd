"""No file that a command reads is written over, nor one that it has just written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import SIZES, mistake, transformer

from paged_kv.tools import cli

HOWEVER: dict[str, Callable[[Path, Path], object]] = {
    "itself": lambda one, other: None,
    "a symbolic link": lambda one, other: other.symlink_to(one),
    "a hard link": lambda one, other: os.link(one, other),
    "through a folder": lambda one, other: other.symlink_to(Path("nowhere", "..", one.name)),
}


def another(folder: Path, one: Path, how: str) -> Path:
    """Another name of a file."""
    other = folder / "other" if how != "itself" else one
    (folder / "nowhere").mkdir()
    HOWEVER[how](one, other)
    return other


@pytest.mark.parametrize("option", ["--html", "--trace"])
@pytest.mark.parametrize("how", HOWEVER)
def test_a_report_leaves_its_recording(
    option: str, how: str, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recording = tmp_path / "run.jsonl"
    shutil.copy(path, recording)
    other = another(tmp_path, recording, how)
    said = mistake(capsys, "report", str(recording), option, str(other))
    assert said == (
        f"{option} {str(other)!r} is the same file as the recording {str(recording)!r}, "
        "which would be lost"
    )
    assert recording.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("there", [True, False])
def test_two_outputs_are_two_files(
    there: bool, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = tmp_path / "out"
    other = tmp_path / "link"
    other.symlink_to(one)
    if there:
        one.write_text("kept")
    said = mistake(capsys, "report", str(path), "--html", str(one), "--trace", str(other))
    assert said.startswith(f"--trace {str(other)!r} is the same file as --html {str(one)!r}")
    assert one.exists() == there
    said = mistake(capsys, "report", str(path), "--trace", str(one), "--tensorboard", str(one))
    assert "is no directory" in said if there else "is the same file as --tensorboard" in said


def test_a_folder_that_is_a_file_is_refused_first(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recording = tmp_path / "run.jsonl"
    shutil.copy(path, recording)
    for folder in (recording, recording / "inside"):
        said = mistake(capsys, "report", str(recording), "--tensorboard", str(folder))
        assert said == f"cannot write to {str(folder)!r}: {str(recording)!r} is no directory"


def test_an_estimate_leaves_its_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = transformer(tmp_path)
    config = tmp_path / "config.json"
    before = config.read_bytes()
    for given in (folder, str(config)):
        said = mistake(capsys, "estimate", "--transformers-config", given, "--json", str(config))
        assert "is the same file as the configuration" in said
    said = mistake(capsys, "estimate", "--lightzero-config", str(config), "--json", str(config))
    assert "is the same file as --lightzero-config" in said
    assert config.read_bytes() == before


def test_the_pages_of_all_presets_are_files_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    one = tmp_path / "report-long.html"
    command = ["profile", "--reference", "--preset", "all", "--html", str(page)]
    said = mistake(capsys, *command, "--json", str(one))
    assert said.startswith(f"--html {str(one)!r} is the same file as --json {str(one)!r}")
    one.mkdir()
    assert mistake(capsys, *command) == f"cannot write to {str(one)!r}: it is a directory"


def test_what_holds_nothing_may_be_written_twice(path: Path) -> None:
    assert cli.main(["report", str(path), "--html", os.devnull, "--trace", os.devnull]) == 0
    assert cli.main(["estimate", *SIZES, "--json", os.devnull]) == 0

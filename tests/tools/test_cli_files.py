"""Files that take nothing, screens that nobody reads, and what is kept of runs that end early."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import mistake

import paged_kv.tools.profile as package
from paged_kv.tools import cli
from paged_kv.tools.commands import outputs

SHORT = ["profile", "--reference", "--envs", "2", "--simulations", "2", "--roots", "2"]
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(
    not FULL.exists(), reason="this system has no file that is always full"
)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the presets that were run. The result is a real one, but of one small run."""
    result = package.profile(envs=2, simulations=2, roots=2, reference=True)
    names = list[str]()
    monkeypatch.setattr(package, "profile", lambda name, **_: names.append(name) or result)
    return names


@needs_full
def test_nothing_measured_is_lost(
    measured: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cli.main([*SHORT, "--json", str(FULL)]) == 1
    out, err = capsys.readouterr()
    assert "Actions equal: 12 of 12" in out
    (other,) = tmp_path.iterdir()
    assert err == (
        f"paged-kv: cannot write to '{FULL}': No space left on device; "
        f"what was to be written is in {other}\n"
    )
    assert json.loads(other.read_text())["schema"] == 2
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    assert cli.main([*SHORT, "--json", str(FULL)]) == 1
    assert (
        capsys.readouterr().err == f"paged-kv: cannot write to '{FULL}': No space left on device\n"
    )


def test_a_file_is_refused_before_the_run(
    measured: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # as for a file on a disk that is read-only
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    file = tmp_path / "out.json"
    assert (
        mistake(capsys, *SHORT, "--json", str(file))
        == f"cannot write to {str(file)!r}: permission denied"
    )
    assert measured == []
    assert not file.exists()


def test_the_check_leaves_files_alone(tmp_path: Path) -> None:
    there = tmp_path / "there"
    new = tmp_path / "new"
    there.write_text("kept")
    assert outputs.unusable_file(there) is outputs.unusable_file(new) is None
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert there.read_text() == "kept"


def nobody() -> int:
    """A pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize(
    ("target", "status", "said"),
    [
        pytest.param(
            lambda: os.open(FULL, os.O_WRONLY),
            1,
            "paged-kv: cannot print: no space left where the output goes\n",
            marks=needs_full,
            id="full",
        ),
        pytest.param(nobody, 141, "", id="nobody reads"),
    ],
)
def test_a_screen_that_takes_nothing_costs_no_results(
    target: Callable[[], int], status: int, said: str, tmp_path: Path
) -> None:
    file = tmp_path / "out.json"
    screen = target()
    ended = subprocess.run(
        [sys.executable, "-m", "paged_kv", *SHORT, "--json", str(file)],
        stdout=screen,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(screen)
    assert (ended.returncode, ended.stderr) == (status, said)
    assert json.loads(file.read_text())["schema"] == 2


def test_no_screen_at_all(measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (SHORT, [*SHORT, "--json", "-"], ["estimate", "--preset", "atari"]):
        monkeypatch.setattr(sys, "stdout", None)  # as python starts where standard output is closed
        assert cli.main(arguments) == 0


def test_results_on_the_screen(measured: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SHORT, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["workload"]["envs"] == 2
    assert not Path("-").exists()


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (
            MemoryError(),
            1,
            "long: memory ran out: give fewer --envs or --simulations (see paged-kv estimate)",
        ),
        (KeyboardInterrupt(), 130, "stopped after 3 of 5 presets"),
    ],
)
def test_what_was_measured_before_a_failure_is_kept(
    error: BaseException,
    status: int,
    said: str,
    measured: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ready = package.profile

    def fail_at_long(name: str, **given: Any) -> Any:
        if name == "long":
            raise error
        return ready(name, **given)

    monkeypatch.setattr(package, "profile", fail_at_long)
    file = tmp_path / "all.json"
    assert cli.main(["profile", "--reference", "--preset", "all", "--json", str(file)]) == status
    out, err = capsys.readouterr()
    assert out.count("Actions equal") == len(json.loads(file.read_text())) == 3
    assert err == f"paged-kv: {said}\n"

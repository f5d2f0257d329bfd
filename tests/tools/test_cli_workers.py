"""`paged-kv report` of several recordings: each and all, what ended early, exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paged_kv.recording import Recording, read_recording, write_recording
from paged_kv.recording.format import header
from paged_kv.tools import cli


def of_worker(worker: str, reason: str | None) -> Recording:
    """A recording of one sample."""
    first = {**header(f"run: worker {worker}", None, {"worker": worker}), "started": 5.0}
    sample: dict[str, Any] = {"bytes_in_use": 2048, "queries": 4, "hits": 3, "evictions": 2}
    end = [] if reason is None else [{"kind": "end", "t": 1.0, "reason": reason}]
    return Recording(first, samples=[{"kind": "sample", "t": 0.5, **sample}], ends=end)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two workers, of which one was killed."""
    where = tmp_path / "run"
    where.mkdir()
    write_recording(of_worker("0", "done"), where / "worker-0.jsonl")
    write_recording(of_worker("1", None), where / "worker-1.jsonl")
    return where


def test_the_command_shows_each_and_all(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(folder)]) == 0
    said = capsys.readouterr().out
    (whole,) = (line for line in said.splitlines() if line.strip().startswith("all"))
    assert whole.split() == ["all", "500", "ms", "4.0", "KiB", "8", "75.0", "%", "4"]
    assert "worker 1: the recording ends early" in said
    files = [str(path) for path in sorted(folder.iterdir())]
    assert cli.main(["report", *files]) == 0
    assert capsys.readouterr().out == said


def test_the_command_exports_each_and_all(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.json"
    one = tmp_path / "one.jsonl"
    logs = tmp_path / "logs"
    outputs = ["--trace", str(trace), "--merged", str(one), "--tensorboard", str(logs)]
    assert cli.main(["report", str(folder), *outputs]) == 0
    assert {event["pid"] for event in json.loads(trace.read_text())["traceEvents"]} == {1, 2}
    assert sorted(path.name for path in logs.iterdir()) == ["worker-0", "worker-1"]
    assert read_recording(one).samples[-1]["evictions"] == 4
    capsys.readouterr()
    inside = str(folder / "one.jsonl")
    assert cli.main(["report", str(folder), "--merged", inside]) == 2
    assert "read as one more" in capsys.readouterr().err
    (tmp_path / "none").mkdir()
    assert cli.main(["report", str(tmp_path / "none")]) == 1
    assert "without a file *.jsonl" in capsys.readouterr().err

"""`paged-kv record`, `report` and `diff`, and the trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paged_kv import PagedKVCache
from paged_kv.recording import Recording, RecordingWriter, header, read_recording, record
from paged_kv.recording.trace import trace
from paged_kv.tools import cli
from paged_kv.tools.summary import Verb, pairs, summarize, verbs


def by_hand(**changes: Any) -> Recording:
    """Two samples, one second apart, and a last one three seconds later."""
    rows: list[dict[str, Any]] = [
        {
            "t": 0.0,
            "bytes_in_use": 100,
            "bytes_unique": 50,
            "bytes_dense": 150,
            "queries": 0,
            "hits": 0,
            "forks": 0,
        },
        {
            "t": 1.0,
            "bytes_in_use": 500,
            "bytes_unique": 250,
            "bytes_dense": 900,
            "queries": 10,
            "hits": 9,
            "forks": 6,
        },
        {
            "t": 4.0,
            "bytes_in_use": 0,
            "bytes_unique": 0,
            "bytes_dense": 0,
            "queries": 30,
            "hits": 14,
            "forks": 8,
        },
    ]
    return Recording(
        header("by hand", None), samples=[{"kind": "sample", **row, **changes} for row in rows]
    )


# -- figures


def test_averages_are_over_time() -> None:
    found = {(figure.group, figure.name): figure.value for figure in summarize(by_hand())}
    assert found["average", "KV bytes in use"] == (100 * 1 + 500 * 3) / 4
    assert found["average", "dense copies / unique tokens"] == (150 + 2700) / (50 + 750)
    assert found["peak", "KV bytes in use"] == 500
    assert found["total", "forks"] == 8
    assert found["rate", "forks per second"] == 2
    assert found["rate", "hit rate"] == 14 / 30
    assert ("average", "dead slots") not in found


def test_a_peak_between_two_samples_counts() -> None:
    found = {
        (figure.group, figure.name): str(figure) for figure in summarize(by_hand(bytes_peak=2048))
    }
    assert found["peak", "KV bytes in use"] == "2.0 KiB"


def test_an_empty_recording_has_figures() -> None:
    assert [str(figure) for figure in summarize(Recording(header("empty", None)))] == ["0 ms", "0"]


def test_the_median_life_is_the_edge_above_it() -> None:
    lives = {"kind": "lives", "t": 1.0, "edges": [0.0, 0.1, 1.0, None], "counts": [1, 3, 0]}
    recording = Recording(header("lives", None), lives=[lives])
    assert str(summarize(recording)[-1]) == "1 s"
    assert (
        str(summarize(Recording(header("lives", None), lives=[{**lives, "counts": [0, 0, 0]}]))[-1])
        == "0"
    )


def test_verbs_are_summed_and_marks_left_out() -> None:
    events = [
        {
            "kind": "event",
            "t": 0.0,
            "name": "open",
            "s": 0.5,
            "count": 3,
            "sequences": 6,
            "most": 0.3,
        },
        {"kind": "event", "t": 0.1, "name": "open", "s": 0.5},
        {"kind": "event", "t": 0.2, "name": "fork", "s": 0.1, "count": 1, "sequences": 2},
        {"kind": "event", "t": 0.3, "name": "search", "s": 0.0, "count": 1, "mark": True},
    ]
    found = verbs(Recording(header("verbs", None), events=events))
    assert found == [Verb("open", 4, 6, 1.0, 0.5), Verb("fork", 1, 2, 0.1, 0.1)]
    assert found[0].us_per_call == 250_000


def test_ratios_of_two_recordings() -> None:
    rows = {
        pair.first.name: pair.ratio
        for pair in pairs(by_hand(), by_hand(forks=4))
        if pair.first and pair.first.group == "total"
    }
    assert rows == {"forks": 2.0, "queries": 1.0}
    alone = [pair for pair in pairs(by_hand(), by_hand(evictions=3)) if pair.first is None]
    assert [(str(pair.second), pair.ratio) for pair in alone] == [("3", None)]
    assert all(
        pair.ratio is None
        for pair in pairs(by_hand(), by_hand(forks=0))
        if pair.second and pair.second.value == 0
    )


# -- the trace


def test_the_trace_is_as_its_format_wants_it(path: Path) -> None:
    recording = read_recording(path)
    found = json.loads(json.dumps(trace(recording), allow_nan=False))
    assert set(found) == {"traceEvents", "displayTimeUnit", "otherData"}
    phases: dict[str, list[dict[str, Any]]] = {}
    for event in found["traceEvents"]:
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert isinstance(event["args"], dict)
        phases.setdefault(event["ph"], []).append(event)
    assert set(phases) == {"M", "X", "i", "C"}
    rows = {
        event["tid"]: event["args"]["name"]
        for event in phases["M"]
        if event["name"] == "thread_name"
    }
    assert set(rows.values()) == {
        "marks",
        *(event["name"] for event in recording.events if not event.get("mark")),
    }
    timed = [event for event in found["traceEvents"] if event["ph"] != "M"]
    assert [event["ts"] for event in timed] == sorted(event["ts"] for event in timed)
    assert timed[0]["ts"] >= 0
    ends: dict[int, float] = {}
    # Slices of one row lie side by side, or viewers draw them into each other: but for a millionth
    # of a second, and its rounding.
    for event in phases["X"]:
        assert rows[event["tid"]] == event["name"]
        assert event["ts"] >= ends.get(event["tid"], 0.0) - 1.1
        ends[event["tid"]] = event["ts"] + event["dur"]
    for event in phases["C"]:
        assert event["args"]
        assert all(isinstance(value, int | float) for value in event["args"].values())
    tracks = {event["name"] for event in phases["C"]}
    assert tracks == {
        "KV bytes",
        "sequences",
        "dead slots",
        "usage",
        "pages by references",
        "hit rate",
        "cache share",
    }
    in_use = [event["args"]["bytes_in_use"] for event in phases["C"] if event["name"] == "KV bytes"]
    assert in_use == [sample["bytes_in_use"] for sample in recording.samples]


def test_the_hit_rate_is_that_between_two_samples() -> None:
    rates = [
        e["args"]["hit_rate"] for e in trace(by_hand())["traceEvents"] if e["name"] == "hit rate"
    ]
    assert rates == [0.9, 0.25]


# -- the command


def test_report(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "trace.json"
    folder = tmp_path / "board"
    assert cli.main(["report", str(path), "--trace", str(out), "--tensorboard", str(folder)]) == 0
    said = capsys.readouterr().out
    for text in (
        "cartpole, paged (preset",
        "KV bytes in use",
        "time in the cache",
        "hit rate",
        "commit",
    ):
        assert text in said
    assert f"trace: {out}" in said
    assert json.loads(out.read_text())["otherData"]["client"] == "reference"
    assert len(list(folder.iterdir())) == 1


def test_report_of_a_run_that_was_cut_off(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    torn = tmp_path / "torn.jsonl"
    torn.write_bytes(b"".join(lines[:10]) + lines[10][:20])
    assert cli.main(["report", str(torn)]) == 0
    said = capsys.readouterr().out
    assert "The last line was cut off, and left out." in said
    assert "It was cut off." in said


def test_titles_are_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        with RecordingWriter(
            tmp_path / name, header("[bold]x[/nonsense]", None, {"[red]": "[/]"})
        ) as writer:
            writer.write("event", 0.1, name="[/x]", s=0.1)
    assert cli.main(["report", str(tmp_path / "a")]) == 0
    assert cli.main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out.count("[bold]x[/nonsense]") == 3


def test_diff(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    cache = PagedKVCache(layers=1, heads=1, head_size=2, page_size=2)
    with record(cache, tmp_path / "other.jsonl", title="another"):
        cache.new(2)
    assert cli.main(["diff", str(path), str(tmp_path / "other.jsonl")]) == 0
    said = capsys.readouterr().out
    peak = read_recording(path).samples
    ratio = max(sample["sequences_peak"] for sample in peak) / 2
    assert "A: cartpole, paged" in said
    assert "B: another" in said
    assert any("sequences" in line and f"{ratio:.3g}x" in line for line in said.splitlines())


@pytest.mark.parametrize(
    "command",
    [["report", "{foreign}"], ["diff", "{good}", "{foreign}"], ["diff", "{foreign}", "{good}"]],
)
def test_foreign_files_are_refused(
    command: list[str], path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "foreign.json"
    foreign.write_text('{"schema": 1}\n')
    assert cli.main([part.format(good=path, foreign=foreign) for part in command]) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"paged-kv: {str(foreign)!r} is not a recording that can be read: ")
    assert (said.out, said.err.count("\n")) == ("", 1)


@pytest.mark.parametrize("option", ["--trace", "--html"])
def test_outputs_that_cannot_be_written(
    option: str, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(path), option, str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err
        == f"paged-kv: cannot write to {str(tmp_path)!r}: it is a directory\n"
    )
    assert cli.main(["record", str(tmp_path / "no" / "file"), "--reference"]) == 2


def test_wrong_arguments_of_record(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("-1", "x", "inf", "nan"):
        with pytest.raises(SystemExit):
            cli.main(["record", "file", "--interval", text])
        assert f"{text!r} is not a number of milliseconds of at least 0" in capsys.readouterr().err


def test_an_interrupted_record_keeps_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from paged_kv.tools.profile.reference_client import ReferenceSide

    steps: list[int] = []
    whole_step = ReferenceSide.step

    def step(side: ReferenceSide, simulations: int, seed: int) -> Any:
        steps.append(simulations)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return whole_step(side, simulations, seed)

    monkeypatch.setattr(ReferenceSide, "step", step)
    path = tmp_path / "run.jsonl"
    assert cli.main(["record", str(path), "--reference"]) == 130
    assert (
        capsys.readouterr().err == f"paged-kv: stopped, what was recorded by then is in {path}.\n"
    )
    assert read_recording(path).reason == "KeyboardInterrupt"

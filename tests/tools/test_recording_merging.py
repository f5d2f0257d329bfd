"""Several recordings as one: sums over time, and lives of a worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paged_kv.errors import BadArgument, BadRecording
from paged_kv.recording import (
    Recording,
    by_worker,
    merged,
    read_recording,
    read_recordings,
    write_recording,
)
from paged_kv.recording.format import header
from paged_kv.tools.summary import summarize
from paged_kv.tools.workers import early, sides

Rows = list[tuple[float, dict[str, Any]]]


def made(
    started: float, rows: Rows, reason: str | None = "done", ended: float = 0.0, **labels: str
) -> Recording:
    """A recording of these samples."""
    first = {**header("run: worker x", {"page_size": 2}, labels), "started": started}
    end = [] if reason is None else [{"kind": "end", "t": ended, "reason": reason}]
    samples = [{"kind": "sample", "t": t, **fields} for t, fields in rows]
    return Recording(first, samples=samples, ends=end)


def column(recording: Recording, name: str) -> list[tuple[float, Any]]:
    return [(sample["t"], sample[name]) for sample in recording.samples if name in sample]


FIRST = made(100.0, [(0.0, {"bytes_in_use": 10}), (2.0, {"bytes_in_use": 30})], ended=4.0)
SECOND = made(101.0, [(0.0, {"bytes_in_use": 5}), (2.0, {"bytes_in_use": 7})], ended=2.0)


def test_what_is_held_adds_up_over_the_time_of_all() -> None:
    found = merged([FIRST, SECOND])
    assert column(found, "bytes_in_use") == [(0.0, 10), (1.0, 15), (2.0, 35), (3.0, 37)]
    assert (found.reason, found.seconds) == ("done", 4.0)
    assert found.header["started"] == 100.0


def test_the_time_in_the_caches_is_a_sum_and_no_share() -> None:
    both = [made(0.0, [(0.0, {"cache_s": 0.0}), (2.0, {"cache_s": 1.5})], ended=2.0)] * 2
    found = {(figure.group, figure.name): figure.value for figure in summarize(merged(both))}
    assert found["total", "time in the cache"] == 3.0
    assert ("rate", "time in the cache") not in found


def test_what_a_killed_worker_held_is_gone_and_what_it_did_stays() -> None:
    dead = made(100.0, [(0.0, {"bytes_in_use": 10, "forks": 3, "pages_by_refs": {"1": 4}})], None)
    living = made(101.0, [(0.0, {"bytes_in_use": 1, "forks": 1, "pages_by_refs": {"1": 2}})])
    found = merged([dead, living])
    assert column(found, "bytes_in_use") == [(0.0, 10), (0.0, 0), (1.0, 1)]
    assert column(found, "forks") == [(0.0, 3), (0.0, 3), (1.0, 4)]
    assert found.samples[-1]["pages_by_refs"] == {"1": 2}
    assert found.reason is None


def test_peaks_are_those_of_one_stretch_of_time_added_up() -> None:
    """Between 1 and 2 both peak: the first one's next sample tells, and the second one's."""
    first = [(0.0, 10, 10), (2.0, 10, 90)]
    second = [(1.0, 5, 5), (3.0, 5, 50), (5.0, 5, 5)]
    one, other = (
        made(0.0, [(t, {"bytes_in_use": held, "bytes_peak": peak}) for t, held, peak in rows])
        for rows in (first, second)
    )
    found = column(merged([one, other]), "bytes_peak")
    assert found == [(0.0, 10), (1.0, 95), (2.0, 140), (3.0, 60), (5.0, 15)]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 20), st.lists(st.integers(0, 40), min_size=1, max_size=6, unique=True)
        ),
        min_size=1,
        max_size=4,
    ),
    st.data(),
)
def test_a_merged_peak_is_never_below_what_was_held_at_once(
    shapes: list[tuple[int, list[int]]], data: st.DataObject
) -> None:
    """Against curves that stand at each tick, of which samples tell the end and the most."""
    recordings = []
    held: dict[int, int] = {}
    for start, times in shapes:
        rows: Rows = []
        before = 0
        most = 0
        for t in range(max(times) + 1):
            level = data.draw(st.integers(0, 9))
            held[start + t] = held.get(start + t, 0) + level
            most = max(most, level)
            if t == 0 or t in times:
                rows.append((float(t), {"bytes_in_use": level, "bytes_peak": max(most, before)}))
                before = level
                most = 0
        recordings.append(made(float(start), rows, None))
    found = column(merged(recordings), "bytes_peak")
    begun = min(start for start, _ in shapes)
    for tick, level in held.items():
        told = min(t for t, _ in found if t >= tick - begun)
        assert level <= max(peak for t, peak in found if t == told)


def test_lives_of_a_worker_are_one_and_others_stay_as_they_are() -> None:
    lives = [
        made(10.0, [(0.0, {"forks": 2})], None, worker="1", life="1"),
        made(20.0, [(1.0, {"forks": 5})], worker="1", life="2", ended=1.0),
    ]
    alone = made(12.0, [(0.0, {"forks": 1})])
    one, other = by_worker([*lives, alone])
    assert other is alone
    assert one.samples[-1]["forks"] == 7
    assert [side.name for side in sides([*lives, alone])] == ["worker 1", "run: worker x", "all"]
    assert sides([*lives, alone])[-1].cells[3] == "8"  # forks
    assert early([*lives, alone]) == [
        "worker 1: the recording ends early, after 0 ms: its process was killed, or still goes on. "
        "It came back 10 s later."
    ]


def test_odd_ends_are_named() -> None:
    stopped = made(0.0, [], "KeyboardInterrupt", worker="3", life="2")
    assert early([stopped]) == ["worker 3, life 2: the recording ended with KeyboardInterrupt."]
    assert merged([stopped, FIRST]).reason == "KeyboardInterrupt"
    with pytest.raises(BadArgument, match="at least one recording"):
        merged([])


def test_a_merged_recording_is_written_and_read(tmp_path: Path) -> None:
    found = merged([FIRST, SECOND], "both")
    write_recording(found, tmp_path / "both.jsonl")
    again = read_recording(tmp_path / "both.jsonl")
    assert (again.header, again.lines()) == (found.header, found.lines())


def test_folders_are_read_in_the_order_of_numbers(tmp_path: Path) -> None:
    for name in ("worker-10", "worker-2", "worker-2.2"):
        write_recording(made(0.0, [], "done", 0.0, name=name), tmp_path / f"{name}.jsonl")
    names = [each.header["labels"]["name"] for each in read_recordings(tmp_path)]
    assert names == ["worker-2", "worker-2.2", "worker-10"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadRecording, match="without a file"):
        read_recordings(tmp_path / "empty")

"""What goes wrong while a run is recorded stays outside the run: full disks, interrupts, errors."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recording_tools import (
    EVERYTHING,
    Memory,
    agrees,
    filled,
    in_memory,
    made,
    search,
    tokens,
    unheard,
)

from paged_kv.errors import ConcurrentCall, OutOfPages, StaleHandle
from paged_kv.events import Event
from paged_kv.recording import read_recording, record
from paged_kv.recording.mirror import Mirror


def test_errors_of_the_cache_stay_what_they_are(tmp_path: Path) -> None:
    cache = made(num_pages=2, grow=False)
    with record(cache, tmp_path / "run.jsonl", **EVERYTHING):
        (root,) = cache.new()
        with pytest.raises(OutOfPages):
            cache.append([root], *tokens(1, 9))
        cache.release(seqs=iter([root]))
        for gone in ([root], [[root]], [None]):
            with pytest.raises(ValueError, match=r"released|not a sequence"):
                cache.release(gone)  # type: ignore[arg-type]
        with pytest.raises(StaleHandle):
            cache.fork([root])
    found = read_recording(tmp_path / "run.jsonl")
    assert [event["name"] for event in found.events] == ["new", "release"]


def test_a_second_thread_is_still_refused(tmp_path: Path) -> None:
    cache = made()
    (root,) = cache.new()
    refused: list[type[BaseException]] = []

    def fork() -> None:
        try:
            cache.fork([root])
        except ConcurrentCall as error:
            refused.append(type(error))

    with record(cache, tmp_path / "run.jsonl", **EVERYTHING):
        cache.look(lambda tables: elsewhere(fork))  # while it looks, no verb may run
        assert refused == [ConcurrentCall]
        cache.fork([root])
    assert [event["name"] for event in read_recording(tmp_path / "run.jsonl").events] == ["fork"]


def test_nobody_listens_however_the_block_ended(tmp_path: Path) -> None:
    cache = made()
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), record(cache, tmp_path / "run.jsonl"):
            search(cache)
            raise error
        assert unheard(cache)
        found = read_recording(tmp_path / "run.jsonl")
        assert (found.reason, found.samples[-1]["forks"]) == (error.__name__, 6)


def test_listeners_of_others_stay(tmp_path: Path) -> None:
    cache = made()
    heard: list[str] = []

    def first(event: Event) -> None:
        heard.append(f"first {event.verb}")

    def second(event: Event) -> None:
        heard.append(f"second {event.verb}")

    cache.listen(first)
    with record(cache, tmp_path / "run.jsonl"):
        cache.listen(second)
        heard.clear()
        cache.new(1)
        assert heard == ["first new", "second new"]
    assert cache.turns.listeners == (first, second)
    cache.unlisten(first)
    cache.unlisten(second)
    assert unheard(cache)
    assert [event["name"] for event in read_recording(tmp_path / "run.jsonl").events] == ["new"]


def test_a_recording_lies_on_nothing(tmp_path: Path) -> None:
    """Whoever has replaced a method finds it replaced, and the cache is as it was."""
    cache = made()
    theirs = cache.new
    cache.new = theirs  # type: ignore[method-assign]
    before = dict(vars(cache))
    with record(cache, tmp_path / "run.jsonl"):
        cache.new(1)
        assert vars(cache) == before
    assert vars(cache) == before
    assert [event["name"] for event in read_recording(tmp_path / "run.jsonl").events] == ["new"]


@pytest.mark.parametrize("way", ["listener", "look", "hook"])
def test_a_recording_that_is_closed_inside_of_a_verb(way: str, tmp_path: Path) -> None:
    """It hears nothing more, and is out of the list at the end of the verb after it."""
    cache = made()
    (root,) = cache.new()
    with record(cache, tmp_path / "run.jsonl", **EVERYTHING) as recorder:

        def close(event: Event) -> None:
            if event.verb == "slide":
                recorder.close("early")

        cache.fork([root])
        if way == "listener":
            cache.listen(close)
            cache.slide([root], 0)
        elif way == "look":
            cache.look(lambda tables: recorder.close("early"))
        else:
            cache.open([root], 1, rebase=lambda step: recorder.close("early"))
        cache.fork([root])
        assert len(cache.turns.listeners) == (way == "listener")
    found = read_recording(tmp_path / "run.jsonl")
    assert found.reason == "early"
    last = {"listener": ["slide"], "look": [], "hook": ["open"]}[way]
    assert [event["name"] for event in found.events] == ["fork", *last]
    with record(cache, tmp_path / "run.jsonl"):  # nothing is left of the first
        pass


def test_a_recorder_that_fails_disturbs_no_verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it missed is repaired at the next sample."""
    cache = made()
    heard: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda told: heard.append(told.exc_value))
    file = Memory()
    with in_memory(cache, file) as recorder:
        with monkeypatch.context() as patched:
            patched.setattr(Mirror, "note", None)
            filled(cache, 2)
        assert [type(error) for error in heard] == [TypeError, TypeError]
        agrees(cache, recorder, file)
    assert unheard(cache)


@pytest.mark.parametrize("room", [0, 10, 400, 600, 2000, 5000])
def test_a_full_disk_stops_the_recording_and_not_the_run(room: int, tmp_path: Path) -> None:
    cache = made()
    file = Memory(room)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options: dict[str, Any] = {"opener": lambda path: file, **EVERYTHING}
        with record(cache, "full.jsonl", **options) as recorder:
            for _ in range(5):
                search(cache)
            recorder.snapshot("unwritten")
            assert unheard(cache)
    assert [str(warning.message) for warning in caught] == [
        "recording to 'full.jsonl' stopped: [Errno 28] No space left on device"
    ]
    assert len(file.data) == room
    assert cache.stats.forks == 30
    assert cache.live_sequences == 0
    (tmp_path / "kept.jsonl").write_bytes(file.data)
    if b"\n" in file.data:
        found = read_recording(tmp_path / "kept.jsonl")
        assert found.reason is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_device_that_is_full() -> None:
    cache = made()
    with (
        pytest.warns(RuntimeWarning, match=r"recording to '/dev/full' stopped"),
        record(cache, "/dev/full"),
    ):
        search(cache)
    assert cache.stats.forks == 6
    assert unheard(cache)


def elsewhere(call: Callable[[], object]) -> None:
    """Call it in another thread, to its end."""
    other = threading.Thread(target=call)
    other.start()
    other.join()


LONG_RUN = """
    import signal, sys, torch
    from paged_kv import PagedKVCache
    from paged_kv.recording import record

    signal.signal(signal.SIGINT, signal.default_int_handler)
    cache = PagedKVCache(layers=1, heads=1, head_size=2, page_size=2)
    kv = torch.ones(1, 1, 1, 3, 2)
    with record(cache, sys.argv[1], interval=0.0, budget=None):
        while True:
            root, = cache.new()
            cache.append([root], kv, kv)
            cache.release(cache.fork([root] * 3) + [root])
"""


@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGKILL, None)]
)
def test_a_run_that_is_stopped_leaves_a_file(
    number: signal.Signals, reason: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "run.jsonl"
    run = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(LONG_RUN), str(path)], stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 60
        while (not path.exists() or path.stat().st_size < 20_000) and time.monotonic() < until:
            time.sleep(0.02)
        run.send_signal(number)
        assert run.wait(60) != 0
    finally:
        run.kill()
        run.wait()
    found = read_recording(path)
    assert found.reason == reason
    assert found.torn <= (number == signal.SIGKILL)
    assert len(found.samples) > 10
    names = {event["name"] for event in found.events}
    assert names - {"recover"} == {"new", "append", "fork", "release"}
    assert "recover" not in names or reason  # where Ctrl-C came in the middle of a verb


def test_no_warning_while_all_is_well(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = made()
        with record(cache, tmp_path / "run.jsonl"):
            search(cache)

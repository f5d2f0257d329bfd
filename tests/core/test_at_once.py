"""Calls on several threads: all have ended whenever the one that made them goes on."""

from __future__ import annotations

import _thread
import signal
import time
from collections.abc import Iterator
from threading import Event

import pytest

from paged_kv.snapshot.at_once import at_once


def test_each_call_is_made_once() -> None:
    made: list[int] = []
    at_once([lambda number=number: made.append(number) for number in range(3)])  # type: ignore[misc]
    assert sorted(made) == [0, 1, 2]
    at_once([])


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_what_a_call_raises_comes_after_all_have_ended(failing: int) -> None:
    ended: list[int] = []

    def call(number: int) -> None:
        if number == failing:
            raise OSError(number)
        time.sleep(0.01)
        ended.append(number)

    with pytest.raises(OSError, match=str(failing)):
        at_once([lambda number=number: call(number) for number in range(3)])  # type: ignore[misc]
    expected = {0, 1, 2} - {failing}
    assert set(ended) == expected


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As on a terminal: who starts tests in the background may have them ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_waits_for_what_was_started() -> None:
    go = Event()
    ended = Event()

    def slow() -> None:
        _thread.interrupt_main()
        go.wait(0.05)
        ended.set()

    with pytest.raises(KeyboardInterrupt):
        at_once([lambda: None, slow])
    assert ended.is_set()

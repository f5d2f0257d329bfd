"""Calls that are timed in turns, and what the core can do.

Times are processor time of one thread: on an idle machine the same as that of a clock, on a busy
one nearly so.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Calls = Mapping[str, Callable[[], object]]
Times = dict[str, list[float]]


def in_turns(calls: Calls, rounds: int, *, warm: int = 1) -> Times:
    """Seconds of each call in every round; each round begins with another one."""
    times: Times = {name: [] for name in calls}
    names = list(calls)
    for number in range(-warm, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds = timed(calls[name])
            if number >= 0:
                times[name].append(seconds)
    return times


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


def medians(times: Times) -> dict[str, float]:
    """Of each call."""
    return {name: statistics.median(each) for name, each in times.items()}


def ratios(times: Times, below: str) -> dict[str, float]:
    """Of each call the median of its ratios to another one, round by round."""
    return {
        name: statistics.median([one / other for one, other in zip(each, times[below])])
        for name, each in times.items()
    }


def core() -> dict[str, float]:
    """Products of matrices a second, and bytes a second that are read, and that a copy moves."""
    matrix = torch.randn(1024, 1024)
    out = torch.empty_like(matrix)
    source = torch.randn(32 << 20)
    target = torch.empty_like(source)
    seconds = medians(
        in_turns(
            {
                "product": lambda: torch.mm(matrix, matrix, out=out),
                "read": lambda: source.sum(),
                "copy": lambda: target.copy_(source),
            },
            9,
        )
    )
    return {
        "sgemm_gflops": 2 * 1024**3 / seconds["product"] / 1e9,
        "read_gbytes": source.nbytes / seconds["read"] / 1e9,
        "copy_gbytes": 2 * source.nbytes / seconds["copy"] / 1e9,
    }

"""Random numbers that follow from places alone, and never change."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise

import pytest

from paged_kv.integrations.huggingface import draws
from paged_kv.integrations.huggingface.draws import seed_below, uniform

# Whoever kept a seed has these draws for ever: they are no matter of taste any more.
SEEDS = {
    (0, 0): 18_227_666_225_463_077_086,
    (0, 1): 8_540_192_903_034_435_420,
    (7, 3): 6_149_996_080_518_723_586,
    (2**64 - 1, 2**32): 3_313_320_162_281_732_345,
}
NUMBERS = {
    (0, 0): 0.8038911513018037,
    (0, 1): 0.7476923880115449,
    (7, 2047): 0.015800759880960302,
    (2**64 - 1, 5): 0.32775479264269336,
}


def test_seeds_stay_as_they_are() -> None:
    assert {place: seed_below(*place) for place in SEEDS} == SEEDS


def test_numbers_stay_as_they_are() -> None:
    assert {place: uniform(*place) for place in NUMBERS} == NUMBERS


@pytest.mark.parametrize("hashing", ["0", "1"])
def test_another_process_draws_the_same(hashing: str) -> None:
    program = (  # the module alone, which needs nothing else
        "from runpy import run_path\n"
        f"found = run_path({draws.__file__!r})\n"
        "print(found['seed_below'](7, 3), found['uniform'](7, 2047))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": hashing}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, check=True
    )
    assert ended.stdout.split() == [str(SEEDS[7, 3]).encode(), str(NUMBERS[7, 2047]).encode()]


def test_places_have_seeds_of_their_own() -> None:
    family = [seed_below(seed, ordinal) for seed in range(200) for ordinal in range(200)]
    assert len(set(family)) == len(family)
    assert all(0 <= seed < 2**64 for seed in family)


def test_numbers_are_spread_evenly_and_do_not_follow_each_other() -> None:
    """Chi-square over 64 bins of 20,000 numbers, and over pairs of neighbours in 8 x 8 bins: within
    six standard deviations of what chance gives.
    """
    for numbers in (
        [uniform(5, index) for index in range(20_000)],  # of one row
        [uniform(seed, 9) for seed in range(20_000)],  # of one column
    ):
        assert all(0 <= number < 1 for number in numbers)
        assert_even([int(number * 64) for number in numbers], 64)
        pairs = [int(one * 8) * 8 + int(other * 8) for one, other in pairwise(numbers)]
        assert_even(pairs[::2], 64)


def assert_even(found: list[int], bins: int) -> None:
    expected = len(found) / bins
    square = sum((found.count(each) - expected) ** 2 / expected for each in range(bins))
    assert abs(square - (bins - 1)) < 6 * (2 * (bins - 1)) ** 0.5

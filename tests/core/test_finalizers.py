"""Nodes that release their contexts when the collector finds them, whatever runs then, and whatever
else goes on.

`make soak` does the same for long.
"""

from __future__ import annotations

import gc
import signal
import threading

import pytest
import torch
from every_verb import TREE, World, held, tree
from garden import Garden, Weather, collecting, heard, run, ticking

from paged_kv.errors import OutOfPages

WEATHERS = {
    "at times": Weather(),
    "often": Weather(threshold=7),
    "thread": Weather(thread=True),
    "often and thread": Weather(threshold=7, thread=True),
    "signals": Weather(timer=0.0007),
    "everything": Weather(threshold=7, thread=True, timer=0.0007),
}


@pytest.mark.parametrize("weather", WEATHERS)
def test_contents_stay_right_and_nothing_leaks(weather: str) -> None:
    counts = run(list(WEATHERS).index(weather), 800, WEATHERS[weather])
    assert counts["turns"] == 800
    assert counts["finalized"] > 100
    assert counts["by hooks"] > 50
    assert counts["committed"] > 20
    assert (counts["by handlers"] > 0) == (WEATHERS[weather].timer > 0)


def test_a_program_that_leaks_is_found() -> None:
    errors: list[object] = []
    with heard(errors), collecting(700):
        garden = Garden(0, errors)
        garden.turns(10)
        garden.cache.new(1)
        with pytest.raises(AssertionError):
            garden.finish()


def test_a_program_whose_contents_are_wrong_is_found() -> None:
    errors: list[object] = []
    with heard(errors), collecting(700):
        garden = Garden(0, errors)
        garden.root.tokens = (*garden.root.tokens[:-1], -1.0)
        with pytest.raises(AssertionError):
            garden.look()


def test_a_program_whose_finalizers_fail_is_found() -> None:
    errors: list[object] = []
    with heard(errors), collecting(700):
        garden = Garden(0, errors)
        garden.cache.release([garden.root.seq])
        del garden.root
        gc.collect()
        assert [type(error).__name__ for error in errors] == ["StaleHandle"]
        garden.plant()
        with pytest.raises(AssertionError):
            garden.finish()


class Holder:
    """Releases a sequence when it is collected."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.itself = self

    def __del__(self) -> None:
        self.world.cache.release(self.world.of(self.name))


def collect_within(world: World) -> None:
    """A verb within which the collector runs."""
    world.cache.look(lambda tables: gc.collect())


def test_a_finalizer_within_a_verb_releases_when_it_ends() -> None:
    world = tree()
    Holder(world, "z")
    collect_within(world)
    assert world.cache.live_sequences == 3
    assert world.look().words == held("abc abc abcd")
    assert not world.cache.turns.tickets


def test_a_release_that_was_put_off_is_carried_out_by_the_next_verb_if_the_first_fails() -> None:
    world = World(num_pages=2, max_pages=2)
    world.root("a", "abc")
    world.root("z")

    class Greedy:
        def reclaim(self, need: int, busy: object) -> bool:
            gc.collect()
            return False

        def pinned_pages(self) -> int:
            return 0

    world.cache.set_reclaimer(Greedy())
    Holder(world, "z")
    with pytest.raises(OutOfPages):
        world.append("a", word="stuv")
    assert world.cache.live() == world.of("a")


def test_a_finalizer_in_another_thread_releases_when_the_verb_ends() -> None:
    world = tree()
    Holder(world, "z")

    def elsewhere(tables: object) -> None:
        thread = threading.Thread(target=gc.collect)
        thread.start()
        thread.join()

    world.cache.look(elsewhere)
    assert world.look().words == held("abc abc abcd")


def test_a_signal_handler_may_release_and_call_verbs() -> None:
    world = tree()
    seen: list[str] = []

    def handler(*told: object) -> None:
        if "z" in world.seqs:
            world.cache.release([world.seqs.pop("z")])
        try:
            world.cache.release(world.cache.new(1))
            seen.append("let in")
        except Exception as error:
            seen.append(type(error).__name__)

    with ticking(handler, 0.0005):
        while len(seen) < 50:
            world.append("b", word="s")
            world.cache.truncate(world.of("b"), 1)
    assert set(seen) <= {"let in", "NestedCall"}
    assert world.look().words == held("abc abc abcd")


def test_nodes_of_a_tree_that_is_dropped_give_all_pages_back() -> None:
    world = World()
    world.root("a", "abc")
    assert TREE.startswith("abc")
    cache = world.cache
    seqs = cache.fork(world.of("a") * 5)
    keys = torch.ones(1, 5, 1, 1, 1)
    cache.append(seqs, keys, -keys)
    for number, seq in enumerate(seqs):
        world.seqs[str(number)] = seq
        Holder(world, str(number))
    gc.collect()
    assert (cache.live_sequences, cache.pages_in_use) == (1, 2)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)

"""Small scopes, exhaustively: every state that short sequences of verbs reach is whole; and a rule
that is broken behind the cache's back comes to light with a shortest sequence that shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from exhaustive import Broken, Path, reach, search
from small_state import state_and_orders, state_of
from small_verbs import verbs, verify
from small_world import Text, Verb, World

from paged_kv.errors import OwnedSequence
from paged_kv.pages import block_tables
from paged_kv.pages.allocator import PageAllocator
from paged_kv.pages.block_tables import BlockTables
from paged_kv.pages.books import Books
from paged_kv.pages.change import Change, Edit
from paged_kv.pages.open_steps import OpenSteps
from paged_kv.pages.records import Fills, Record, slid
from paged_kv.pages.storage import PagePlanes

pytestmark = pytest.mark.once
DEPTH = 4


@pytest.mark.parametrize("depth", [3, DEPTH])
def test_every_state_in_reach_is_whole(depth: int) -> None:
    """With the numbers of states, so that a verb that is no longer tried does not go unnoticed."""
    levels = search(depth)
    assert [level.states for level in levels] == [3, 22, 202, 1603][:depth]
    assert all(level.refusals for level in levels[1:])


def forgets_a_page(record: Record, drop: int, page_size: int, lost: list[int]) -> tuple[Any, ...]:
    return slid(record, drop, page_size, [])


def copies_nothing(storage: PagePlanes, pairs: object) -> None:
    pass


def marks_nothing(pages: PageAllocator, fills: Fills) -> None:
    pass


def tells_no_index(tables: BlockTables, seqs: list[int]) -> None:
    tables.end(seqs, tables.books.records(seqs))


def gives_nothing_back(steps: OpenSteps, number: int, edits: Sequence[Edit] = ()) -> None:
    change = Change({})
    change.ends = (number,)
    change.edits = edits
    steps.books.apply(change)


def pins_what_it_refuses(books: Books, seqs: list[int]) -> list[Record]:
    for seq in seqs:
        if seq in books.owned:
            books.owned[seq].pins += 1
            raise OwnedSequence(seq, books.owned[seq].key)
    return books.distinct_records(seqs)


BROKEN: list[tuple[object, str, Callable[..., Any], str]] = [
    (block_tables, "slid", forgets_a_page, "new(0); append(s0, 1); slide(s0, 1)"),
    (
        PagePlanes,
        "copy_pages",
        copies_nothing,
        "new(1); append(s0, 2); open(s0, s0, 1)",
    ),
    (PageAllocator, "note", marks_nothing, "new(0); append(s0, 1)"),
    (BlockTables, "end_subtrees", tells_no_index, "new(0); put(s0, 0); release_subtree(s0)"),
    (OpenSteps, "abandon", gives_nothing_back, "new(0); open(s0, 1); close(0)"),
    (Books, "loose_records", pins_what_it_refuses, "new(0); put(s0, 0); append(s0, 1)"),
]


@pytest.mark.parametrize(
    ("owner", "name", "wrong", "shortest"), BROKEN, ids=[wrong.__name__ for *_, wrong, _ in BROKEN]
)
def test_a_broken_rule_comes_to_light_in_the_fewest_verbs(
    owner: object,
    name: str,
    wrong: Callable[..., Any],
    shortest: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(Broken) as found:
        search(DEPTH)
    assert "; ".join(map(str, found.value.path)) == shortest


NEW = Verb("new", (), (0,))
RARE: dict[str, tuple[Path, Callable[[World], object]]] = {
    "an entry goes to make room": (
        (
            NEW,
            Verb("append", (0,), (2,)),
            Verb("append", (0,), (2,)),
            Verb("put", (0,), (0,)),
            Verb("new", (), (1,)),
            Verb("append", (1,), (2,)),
        ),
        lambda world: world.index.stats.evictions,
    ),
    "the pool grows": (
        (NEW, Verb("append", (0,), (2,)), Verb("trim"), Verb("append", (0,), (1,))),
        lambda world: world.cache.turns.books.pages.growths,
    ),
    "a step is light": (
        (NEW, Verb("append", (0,), (2,)), Verb("open", (0,), (2,))),
        lambda world: world.cache.turns.books.light,
    ),
    "a light step is committed": (
        (NEW, Verb("append", (0,), (2,)), Verb("open", (0,), (2,)), Verb("commit", (), (0, 2, 2))),
        lambda world: world.texts[world.born[1]] == Text(2, (3, 4)),
    ),
    "a page is copied": (
        (NEW, Verb("append", (0,), (1,)), Verb("open", (0, 0), (1,))),
        lambda world: world.cache.turns.books.figures.copied,
    ),
    "a sequence stays as a joint": (
        (NEW, Verb("fork", (0, 0)), Verb("release", (0,))),
        lambda world: world.cache.turns.books.tree.joints,
    ),
    "a step waits to be given up": (
        (NEW, Verb("append", (0,), (1,)), Verb("open", (0,), (1,)), Verb("forget", (), (0,))),
        lambda world: world.cache.turns.tickets,
    ),
    "an entry has ended, and the index has not looked": (
        (NEW, Verb("put", (0,), (0,)), Verb("release_subtree", (0,))),
        lambda world: list(world.index.policy.victims()) and not world.texts,
    ),
}


@pytest.mark.parametrize("what", RARE)
def test_what_is_rare_is_within_reach(what: str) -> None:
    path, happened = RARE[what]
    world = World()
    for verb in path:
        assert verb in list(verbs(world))
        world.do(verb)
    assert happened(world)
    verify(world)


def test_a_path_is_shown_in_plain_words() -> None:
    path: Path = (NEW, Verb("append", (0,), (2,)))
    assert str(Broken(path, ValueError("why"))) == "new(0); append(s0, 2): ValueError('why')"


def test_states_that_differ_in_names_alone_are_one() -> None:
    one = reach((NEW, NEW, Verb("append", (0,), (1,)), Verb("release", (1,))))
    other = reach((NEW, NEW, Verb("append", (1,), (1,)), Verb("release", (0,))))
    assert state_of(one) == state_of(other)
    third = reach((NEW, NEW, Verb("append", (0,), (2,)), Verb("release", (1,))))
    assert state_of(one) != state_of(third)


def test_sequences_that_can_be_exchanged_are_known() -> None:
    world = reach((NEW, NEW))
    assert sorted(state_and_orders(world)[1]) == sorted(
        [tuple(world.born), tuple(reversed(world.born))]
    )
    world.do(Verb("append", (1,), (1,)))
    assert len(state_and_orders(world)[1]) == 1

"""The free slots of a last page belong to one sequence: who writes on in place, who copies, and
that nobody overwrites what another one reads.
"""

from __future__ import annotations

import random
from collections import Counter
from itertools import count
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paged_kv import PagedKVCache, Step
from paged_kv.errors import OutOfPages
from paged_kv.pages.allocator import PageAllocator
from paged_kv.pages.audit import audit
from paged_kv.pages.block_tables import BlockTables


def made(page_size: int, **options: Any) -> PagedKVCache:
    return PagedKVCache(
        **{"layers": 1, "heads": 1, "head_size": 1, "num_pages": 4, **options}, page_size=page_size
    )


def append(cache: PagedKVCache, seqs: list[int], tokens: int = 1) -> None:
    kv = torch.zeros(1, len(seqs), 1, tokens, 1)
    cache.append(seqs, kv, kv)


def step(cache: PagedKVCache, parents: list[int], tokens: int = 1) -> list[int]:
    batch = cache.open(parents, tokens)
    kv = torch.zeros(len(parents), 1, tokens, 1)
    batch.update(0, kv, kv)
    return batch.commit()


# -- how much is copied


@pytest.mark.parametrize("how", ["append", "fork", "step"])
@pytest.mark.parametrize("keep", [False, True], ids=["parents end", "parents live"])
def test_decoding_copies_nothing(how: str, keep: bool) -> None:
    """40 tokens, one at a time."""
    cache = made(16)
    (seq,) = cache.new(1)
    append(cache, [seq], 5)
    for _ in range(40):
        parent = seq
        if how == "step":
            (seq,) = step(cache, [parent])
        elif how == "fork":
            (seq,) = cache.fork([parent])
        if how != "step":
            append(cache, [seq])
        if seq != parent and not keep:
            cache.release([parent])
    assert cache.stats.copied_pages == 0
    assert cache.pages_in_use == -(-45 // 16)
    cache.check()


@pytest.mark.parametrize("how", ["fork", "step"])
def test_beams_copy_only_where_they_branch(how: str) -> None:
    cache = made(16)
    chance = random.Random(3)
    (prompt,) = cache.new(1)
    append(cache, [prompt], 3)
    beams = cache.fork([prompt] * 4)
    wanted = 0
    for turn in range(40):
        if turn:
            parents = [chance.choice(beams) for _ in beams]
            wanted += sum(times - 1 for times in Counter(parents).values()) * bool((3 + turn) % 16)
        else:
            parents = beams
            wanted += 3  # all begin in the page of the prompt
        if how == "step":
            children = step(cache, parents)
        else:
            children = cache.fork(parents)
            append(cache, children)
        cache.release(beams)
        beams = children
    assert cache.stats.copied_pages == wanted
    cache.check()


def test_a_tree_takes_half_of_what_a_copy_a_fork_would() -> None:
    """A search that mostly follows what it found last, with pages of 16."""
    cache = made(16)
    chance = random.Random(7)
    (root,) = cache.new(1)
    append(cache, [root], 10)
    nodes = [root]
    leaves = [root]
    plain = 1  # pages, where each child copies the last page of its parent
    for _ in range(600):
        parent = chance.choice(leaves if chance.random() < 0.7 else nodes)
        (end,) = cache.lengths([parent])
        added = chance.randint(1, 3)
        (child,) = step(cache, [parent], added)
        plain += -((end + added) // -16) - end // 16
        if parent in leaves:
            leaves.remove(parent)
        nodes.append(child)
        leaves.append(child)
    assert cache.live_sequences == 601
    assert cache.pages_in_use <= plain / 2
    cache.check()


# -- who writes on


def bare(page_size: int = 4) -> BlockTables:
    return BlockTables(PageAllocator(16, max_pages=16), page_size)


def filled(tables: BlockTables, *lengths: int) -> list[int]:
    return tables.carry_out(tables.plan(tables.new(len(lengths)), lengths))


def copies(tables: BlockTables, seqs: list[int], tokens: int = 1) -> int:
    """Let these sequences grow; how many pages are copied."""
    plan = tables.plan(seqs, tokens)
    tables.carry_out(plan)
    audit(tables.books)
    return len(plan.copies)


def test_the_first_to_write_takes_the_rest_of_the_page() -> None:
    tables = bare()
    (root,) = filled(tables, 2)
    first, second = tables.fork([root] * 2)
    assert copies(tables, [first]) == 0
    assert copies(tables, [root]) == 1, "the parent comes too late"
    assert copies(tables, [second]) == 1
    assert copies(tables, [first, second, root]) == 0, "each has a page of its own"
    assert tables.books.pages.used_count == 3


def test_in_one_batch_the_first_row_writes_on() -> None:
    tables = bare()
    (root,) = filled(tables, 3)
    children = tables.fork([root] * 3)
    plan = tables.plan([*children, root], 2)
    assert len(plan.copies) == 3
    tables.carry_out(plan)
    assert tables.books.windows(children)[0][0][0] == 1
    audit(tables.books)


def test_a_page_that_was_given_up_is_written_on_by_whoever_is_left() -> None:
    """What lies behind the end of the last reader is nobody's."""
    tables = bare()
    (root,) = filled(tables, 2)
    (child,) = tables.fork([root])
    assert copies(tables, [child]) == 0
    tables.release([child])
    assert copies(tables, [root], 2) == 0
    assert tables.books.windows([root])[0] == [(1,)]


@pytest.mark.parametrize("at", [1, 2, 3, 5, 6])
def test_a_fork_in_the_middle_never_writes_where_its_parent_reads(at: int) -> None:
    tables = bare()
    (root,) = filled(tables, 7)
    (child,) = tables.fork([root], at=at)
    assert copies(tables, [child]) == 1
    tables.release([root])
    (other,) = tables.fork([child], at=at)
    assert copies(tables, [other]) == 1


@pytest.mark.parametrize(("length", "left"), [(4, 2), (6, 5), (8, 7), (8, 3)])
def test_after_a_cut_the_only_reader_writes_in_place(length: int, left: int) -> None:
    """And where there is another one, it copies: also one that reads no further."""
    for readers in (0, 1):
        tables = bare()
        (root,) = filled(tables, length)
        others = tables.fork([root] * readers)
        tables.truncate([root], length - left)
        others += tables.fork([root] * readers)
        assert copies(tables, [root]) == readers
        assert tables.books.lengths(others) == [length, left][: 2 * readers]


def test_a_step_holds_the_rest_of_the_page_and_gives_it_back() -> None:
    cache = made(4)
    (root,) = cache.new(1)
    append(cache, [root], 1)
    batch = cache.open([root], 1)
    assert cache.pages_needed([root], 1) == 1, "the step has it"
    batch.close()
    assert cache.pages_needed([root], 1) == 0
    batch = cache.open([root], 3)
    kv = torch.zeros(1, 1, 1, 1)
    batch.update(0, kv, kv)
    (child,) = batch.commit()
    assert cache.pages_needed([root], 1) == 1, "the child has it"
    assert cache.pages_needed([child], 2) == 0, "room that was not filled is its own"
    append(cache, [child], 2)
    assert cache.stats.copied_pages == 0
    cache.check()


# -- contents


class Token(NamedTuple):
    """What was stored, and where it was placed."""

    value: int
    place: int


class Line:
    """A sequence as a list."""

    def __init__(self, tokens: list[Token], place: int) -> None:
        self.tokens = tokens
        self.place = place  # of the next token, where nothing is said of it

    def grown(self, values: list[int], places: list[int] | None) -> Line:
        if places is None:
            places = list(range(self.place, self.place + len(values)))
        tokens = [Token(value, place) for value, place in zip(values, places, strict=True)]
        return Line(self.tokens + tokens, tokens[-1].place + 1 if tokens else self.place)

    def cut(self, left: int) -> Line:
        if left == len(self.tokens):
            return self
        kept = self.tokens[:left]
        return Line(kept, kept[-1].place + 1 if kept else self.tokens[0].place)

    def slid(self, drop: int) -> Line:
        return Line(self.tokens[drop:], self.place)


class Opened(NamedTuple):
    """A step, and what its parents held when it was opened."""

    step: Step
    lines: list[Line]


PICK = st.integers(0, 1000)
PICKS = st.lists(PICK, min_size=1, max_size=3)
MOST = 10


class FillMachine(RuleBasedStateMachine):
    """Tiny pages, tokens that are told apart, and everything that cuts, shares and writes."""

    @initialize(page_size=st.integers(1, 4), value_size=st.integers(1, 2), bounded=st.booleans())
    def start(self, page_size: int, value_size: int, bounded: bool) -> None:
        options = {"max_pages": 14} if bounded else {}
        self.cache = made(page_size, value_head_size=value_size, **options)
        self.lines: dict[int, Line] = {}
        self.steps: list[Opened] = []
        self.values = count(1)

    # -- help

    def pick(self, numbers: list[int]) -> list[int]:
        live = list(self.lines)
        return [live[number % len(live)] for number in numbers] if live else []

    def distinct(self, numbers: list[int]) -> list[int]:
        return list(dict.fromkeys(self.pick(numbers)))

    def tokens(self, rows: int, new: int) -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
        """New values, and K and V [1, rows, 1, new, *] of them."""
        values = [[next(self.values) for _ in range(new)] for _ in range(rows)]
        keys = torch.tensor(values, dtype=torch.float32).reshape(1, rows, 1, new, 1)
        return values, keys, -keys.expand(1, rows, 1, new, self.cache.value_head_size)

    def places(self, rows: int, new: int, by_hand: bool) -> list[list[int]] | None:
        if not by_hand:
            return None
        return [[7 * next(self.values) for _ in range(new)] for _ in range(rows)]

    def roomy(self) -> bool:
        return len(self.lines) < MOST

    # -- verbs

    @rule(offset=PICK)
    @precondition(roomy)
    def new(self, offset: int) -> None:
        (seq,) = self.cache.new(1, start=offset % self.cache.page_size)
        self.lines[seq] = Line([], 0)

    @rule(numbers=PICKS, cut=st.none() | PICK, root=st.booleans())
    @precondition(roomy)
    def fork(self, numbers: list[int], cut: int | None, root: bool) -> None:
        parents = self.pick(numbers)
        lengths = [len(self.lines[seq].tokens) for seq in parents]
        at = lengths if cut is None else [cut % (length + 1) for length in lengths]
        children = self.cache.fork(parents, at=None if cut is None else at, root=root)
        for parent, child, left in zip(parents, children, at):
            self.lines[child] = self.lines[parent].cut(left)

    @rule(numbers=PICKS, new=st.integers(0, 5), by_hand=st.booleans())
    def append(self, numbers: list[int], new: int, by_hand: bool) -> None:
        seqs = self.distinct(numbers)
        values, keys, its_values = self.tokens(len(seqs), new)
        places = self.places(len(seqs), new, by_hand)
        given = None
        if places is not None:
            given = torch.tensor(places, dtype=torch.int64).reshape(len(seqs), new)
        try:
            self.cache.append(seqs, keys, its_values, given)
        except OutOfPages:
            return
        for row, seq in enumerate(seqs):
            placed = None if places is None else places[row]
            self.lines[seq] = self.lines[seq].grown(values[row], placed)

    @rule(numbers=PICKS, drop=PICK)
    def truncate(self, numbers: list[int], drop: int) -> None:
        seqs = self.distinct(numbers)
        drops = [drop % (len(self.lines[seq].tokens) + 1) for seq in seqs]
        self.cache.truncate(seqs, drops)
        for seq, dropped in zip(seqs, drops):
            line = self.lines[seq]
            self.lines[seq] = line.cut(len(line.tokens) - dropped)

    @rule(numbers=PICKS, drop=PICK)
    def slide(self, numbers: list[int], drop: int) -> None:
        seqs = self.distinct(numbers)
        drops = [drop % (len(self.lines[seq].tokens) + 1) for seq in seqs]
        self.cache.slide(seqs, drops)
        for seq, dropped in zip(seqs, drops):
            self.lines[seq] = self.lines[seq].slid(dropped)

    @rule(numbers=PICKS)
    def release(self, numbers: list[int]) -> None:
        seqs = self.distinct(numbers)
        self.cache.release(seqs)
        for seq in seqs:
            del self.lines[seq]

    @rule()
    def trim(self) -> None:
        self.cache.trim()
        assert self.cache.pages_reserved == max(1, self.cache.pages_in_use)

    # -- steps

    @rule(numbers=PICKS, room=st.integers(0, 5), left=st.booleans())
    @precondition(lambda self: len(self.steps) < 3)
    def open(self, numbers: list[int], room: int, left: bool) -> None:
        parents = self.pick(numbers)
        try:
            step = self.cache.open(parents, room, pad="left" if left else "right")
        except OutOfPages:
            return
        self.steps.append(Opened(step, [self.lines[seq] for seq in parents]))

    @rule(number=PICK, filled=PICK, drop=PICK, by_hand=st.booleans())
    @precondition(lambda self: self.steps)
    def commit(self, number: int, filled: int, drop: int, by_hand: bool) -> None:
        step, lines = self.steps.pop(number % len(self.steps))
        new = filled % (step.room + 1)
        rows = len(lines)
        values, keys, its_values = self.tokens(rows, new)
        step.update(0, keys[0], its_values[0])
        drops = [drop % (len(line.tokens) + 1) for line in lines]
        places = self.places(rows, new, by_hand)
        given = None
        if places is not None:
            given = torch.tensor(places, dtype=torch.int64).reshape(rows, new)
        children = step.commit(slide=drops, positions=given)
        for row, child in enumerate(children):
            placed = None if places is None else places[row]
            self.lines[child] = lines[row].grown(values[row], placed).slid(drops[row])

    @rule(number=PICK, drop=st.booleans())
    @precondition(lambda self: self.steps)
    def close(self, number: int, drop: bool) -> None:
        opened = self.steps.pop(number % len(self.steps))
        if not drop:
            opened.step.close()

    # -- what always holds

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "cache"):
            return
        cache = self.cache
        cache.check()
        seqs = list(self.lines)
        assert cache.live() == seqs
        assert cache.open_steps == len(self.steps)
        found = cache.gather(seqs)
        for row, line in enumerate(self.lines.values()):
            length = len(line.tokens)
            assert int(found.lengths[row]) == length
            values = [token.value for token in line.tokens]
            assert found.keys[0, row, 0, :length, 0].tolist() == values
            assert found.values[0, row, 0, :length, 0].tolist() == [-value for value in values]
            placed = [token.place for token in line.tokens]
            assert found.positions[row, :length].tolist() == placed
            assert not found.keys[0, row, 0, length:].any()
        for step, lines in self.steps:
            self.reads_on(step, lines)

    def reads_on(self, step: Step, lines: list[Line]) -> None:
        """An open step has what its parents held when it was opened."""
        keys = step.keys(0)
        then = step.then
        for row, (line, pad) in enumerate(zip(lines, step.pads)):
            end = pad + len(line.tokens)
            assert keys[row, 0, pad:end, 0].tolist() == [token.value for token in line.tokens]
            assert then[row, pad:end].tolist() == [token.place for token in line.tokens]

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.steps.clear()
            self.cache.release(list(self.lines))
            assert (self.cache.pages_in_use, self.cache.open_steps) == (0, 0)
            self.cache.check()


TestFill = FillMachine.TestCase
TestFill.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)

"""Which verbs a small world may be asked for next, and whether both its sides say the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations

import torch
from small_state import known
from small_world import ROWS, STEPS, Opened, Verb, World

from paged_kv.stats import IndexStats

SUBTREE = ("release_subtree", "promote")


def verbs(world: World) -> Iterator[Verb]:
    """All that may be called, also what is going to be refused; a few counts of each."""
    names = {seq: name for name, seq in enumerate(world.born)}
    seqs = [names[seq] for seq in world.texts]
    lengths = {names[seq]: len(text.tokens) for seq, text in world.texts.items()}
    spare = ROWS - len(seqs) - sum(len(opened.parents) for opened in world.steps.values())
    yield from _of_sequences(seqs, lengths)
    yield from _of_more(seqs, lengths, spare, len(world.steps) < STEPS)
    for name, opened in world.steps.items():
        yield from _of_step(name, opened)
    yield from _of_index(world, seqs)
    yield Verb("trim")


def _of_sequences(seqs: Sequence[int], lengths: dict[int, int]) -> Iterator[Verb]:
    """Verbs that make no sequence."""
    for seq in seqs:
        for count in (1, 2):
            yield Verb("append", (seq,), (count,))
        for count in range(1, lengths[seq] + 1):
            yield Verb("slide", (seq,), (count,))
            yield Verb("truncate", (seq,), (count,))
        for name in ("release", *SUBTREE):
            yield Verb(name, (seq,))
    for pair in permutations(seqs, 2):
        yield Verb("append", pair, (1,))


def _of_more(
    seqs: Sequence[int], lengths: dict[int, int], spare: int, may_open: bool
) -> Iterator[Verb]:
    """Verbs that make sequences, at most `spare`."""
    if spare >= 1:
        for start in (0, 1):
            yield Verb("new", (), (start,))
        for seq in seqs:
            yield Verb("fork", (seq,))
            yield Verb("fork_root", (seq,))
            for left in range(lengths[seq]):
                yield Verb("fork_at", (seq,), (left,))
            if may_open:
                yield Verb("open", (seq,), (1,))
                yield Verb("open", (seq,), (2,))
    if spare >= 2:
        for pair in [*((seq, seq) for seq in seqs), *permutations(seqs, 2)]:
            yield Verb("fork", pair)
            if may_open:
                yield Verb("open", pair, (1,))
                yield Verb("open", pair, (2,))


def _of_step(name: int, opened: Opened) -> Iterator[Verb]:
    """How a step may end."""
    shortest = min(len(text.tokens) for text in opened.texts)
    for new in range(opened.step.room + 1):
        for drop in range(min(shortest, 2) + 1):
            yield Verb("commit", (), (name, new, drop))
    yield Verb("close", (), (name,))
    yield Verb("forget", (), (name,))


def _of_index(world: World, seqs: Sequence[int]) -> Iterator[Verb]:
    keys = [entry.key for entry in known(world.index)]
    for seq in seqs:
        for key in (*keys, world.keys):
            yield Verb("put", (seq,), (key,))
    for key in keys:
        entry = world.naive.find(key)
        for name in ("get", "unpin", "remove", *(() if entry and entry.pins else ("pin",))):
            yield Verb(name, (), (key,))
    if keys:
        yield Verb("clear")
        yield Verb("reclaim", (), (1,))
        yield Verb("reclaim", (), (2,))


def verify(world: World) -> None:
    """Raise unless both sides hold the same, and the cache and the index are whole."""
    world.cache.check()
    world.index.check()
    _verify_contents(world)
    _verify_tree(world)
    for opened in world.steps.values():
        _verify_step(opened)
    assert world.cache.open_steps == len(world.steps)
    _verify_index(world)


def _verify_contents(world: World) -> None:
    """Tokens, values, and positions, also that of the next token."""
    cache = world.cache
    seqs = cache.live()
    assert seqs == list(world.texts)
    read = cache.gather(seqs, reuse=True)
    keys = read.keys[0, :, 0, :, 0].tolist()
    values = read.values[0, :, 0, :, 0].tolist()
    positions = read.positions.tolist()
    places = [record[4] for _, record in cache.books.items()]
    for row, text in enumerate(world.texts.values()):
        padding = [0] * (len(keys[row]) - len(text.tokens))
        assert keys[row] == [*text.tokens, *padding]
        assert values[row] == [-token for token in text.tokens] + padding
        assert positions[row] == [*range(text.first, text.place), *padding]
        assert places[row] == text.place


def _verify_tree(world: World) -> None:
    living = world.family.parents
    above = {}
    for seq in living:
        above[seq] = next((each for each in world.family.line(seq) if each in living), None)
    for seq in living:
        assert world.cache.parent(seq) == above[seq]
        children = world.cache.children(seq)
        assert len(children) == len(set(children))
        assert set(children) == {child for child in living if above[child] == seq}


def _verify_step(opened: Opened) -> None:
    step = opened.step
    past = max(len(text.tokens) for text in opened.texts)
    rows = [[0] * (past - len(text.tokens)) + list(text.tokens) for text in opened.texts]
    wanted = torch.tensor(rows, dtype=torch.float32).reshape(len(rows), 1, past, 1)
    assert torch.equal(step.keys(0), wanted)
    assert torch.equal(step.values(0), -wanted)
    places = [
        [0] * (past - len(text.tokens)) + list(range(text.first, text.place))
        for text in opened.texts
    ]
    assert step.then.tolist() == places


def _verify_index(world: World) -> None:
    entries = world.naive.victims()
    assert world.index.victims() == [entry.key for entry in entries]
    assert dict(zip(world.index, world.index.handles())) == {
        entry.key: entry.handle for entry in world.naive.entries
    }
    for entry in world.naive.entries:
        assert world.index.pinned(entry.key) == (entry.pins > 0)
    assert world.index.stats == IndexStats(**world.naive.stats)

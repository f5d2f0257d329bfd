"""A cache of three pages with an index beside it, and plain lists that say what both should hold.

Every verb runs on both sides at once: a refusal is predicted and must leave all as it was, the
entries that make room are the fewest in their order, contents are compared token by token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from naive_index import FullError, NaiveIndex
from naive_index import World as Family
from small_state import state_of

from paged_kv import CacheIndex, PagedKVCache, Step
from paged_kv.errors import (
    CapacityExceeded,
    HandleInUse,
    NotPinned,
    OutOfPages,
    OwnedSequence,
    PagedKVError,
    PinnedEntry,
    UnknownKey,
)

PAGES = 3
PAGE_SIZE = 2
ROWS = 3  # sequences and rows of open steps together
STEPS = 2  # that are open at once
ENTRIES = 2


class Verb(NamedTuple):
    """A call, in names that mean the same in every world that came the same way.

    Sequences, steps and keys are numbered as they come to be.
    """

    name: str
    seqs: tuple[int, ...] = ()
    more: tuple[int, ...] = ()

    def __str__(self) -> str:
        seqs = [f"s{seq}" for seq in self.seqs]
        return f"{self.name}({', '.join([*seqs, *map(str, self.more)])})"


class Text(NamedTuple):
    """What a sequence should hold: distinct tokens at positions that follow each other."""

    first: int  # the position of the first token, or of the next one where there is none
    tokens: tuple[int, ...]

    @property
    def place(self) -> int:
        """The position of the next token."""
        return self.first + len(self.tokens)

    def more(self, tokens: Sequence[int]) -> Text:
        return Text(self.first, (*self.tokens, *tokens))

    def cut(self, left: int) -> Text:
        return Text(self.first, self.tokens[:left])

    def slid(self, count: int) -> Text:
        return Text(self.first + count, self.tokens[count:])


class Opened(NamedTuple):
    """An open step, the parents that it has, and what it was opened on."""

    step: Step
    parents: list[int]
    texts: list[Text]


class World:
    """Both sides, and the names."""

    def __init__(self, pages: int = PAGES) -> None:
        sizes = {"layers": 1, "heads": 1, "head_size": 1, "page_size": PAGE_SIZE}
        self.cache = PagedKVCache(**sizes, num_pages=pages, grow=False)
        self.index = CacheIndex(self.cache, "lru", max_entries=ENTRIES)
        self.cache.set_reclaimer(self.index)
        self.naive = NaiveIndex("lru", max_entries=ENTRIES)
        self.family = Family([self.naive])
        self.texts: dict[int, Text] = {}  # by handle
        self.born: list[int] = []  # handles, by name
        self.steps: dict[int, Opened] = {}  # by name
        self.opened = 0
        self.keys = 0
        self.token = 0

    def do(self, verb: Verb) -> bool:
        """Call a verb on both sides. Returns whether it was refused."""
        call = getattr(self, f"_{verb.name}")
        return call([self.born[seq] for seq in verb.seqs], *verb.more) is REFUSED

    # -- what is expected

    def refused(self, error: type[PagedKVError], call: Callable[[], Any]) -> object:
        """Call what must be refused, by this name, and must change nothing."""
        self.cache.settle()
        before = state_of(self).tidied()
        try:
            call()
        except error as told:
            assert type(told) is error, f"{told!r} instead of {error.__name__}"
        else:
            raise AssertionError(f"not refused: {error.__name__}")
        assert state_of(self).tidied() == before, "a refusal changed something"
        return REFUSED

    def making_room(self, call: Callable[[], Any], need: int, busy: Collection[int]) -> Any:
        """Call what takes `need` pages: the fewest entries go for it, or else it is refused."""
        pages = self.cache.books.pages
        taken = self.cache.books.figures.allocated
        evicted = self.evicted(need - pages.free_count - pages.growable, busy)
        if evicted is None:
            return self.refused(OutOfPages, call)
        result = call()
        self.family.evict(evicted)
        self.drop(evicted)
        books = self.cache.turns.books
        if not books.light:
            took = books.figures.allocated - taken
            assert took <= need if evicted else took == need, f"{need} pages foretold, took {took}"
        return result

    def evicted(self, short: int, busy: Collection[int]) -> list[int] | None:
        """The fewest entries, in order, whose end frees as many pages; None where all do not."""
        books = self.cache.books
        held = Counter(page for record in books.all_records() for page in record[0])
        run: list[int] = []
        victims = [entry.handle for entry in self.naive.victims(busy)]
        freed = 0
        while freed < short:
            if not victims:
                return None
            run.append(victims.pop(0))
            for page in books.windows(run[-1:])[0][0]:
                held[page] -= 1
                freed += not held[page]
        return run

    def end(self, seqs: Collection[int]) -> None:
        """These sequences end, and their entries with them."""
        self.family.end(seqs)
        self.drop(seqs)

    def drop(self, seqs: Collection[int]) -> None:
        """Forget what these sequences held."""
        for seq in seqs:
            del self.texts[seq]

    def owned(self, seqs: Sequence[int]) -> bool:
        return not set(seqs).isdisjoint(self.naive.handles())

    def make(self, seqs: list[int], parents: Sequence[int | None], texts: Sequence[Text]) -> None:
        """These sequences begin."""
        self.family.make(seqs, parents)
        self.texts.update(zip(seqs, texts, strict=True))
        self.born += seqs

    def tokens(self, rows: int, count: int) -> list[list[int]]:
        """Tokens that never were before."""
        first = self.token + 1
        self.token += rows * count
        return [list(range(first + row * count, first + (row + 1) * count)) for row in range(rows)]

    # -- sequences

    def _new(self, seqs: list[int], start: int) -> None:
        self.make(self.cache.new(1, start=start), [None], [Text(0, ())])

    def _fork(self, parents: list[int]) -> None:
        self.make(self.cache.fork(parents), parents, [self.texts[seq] for seq in parents])

    def _fork_at(self, parents: list[int], left: int) -> None:
        texts = [self.texts[seq].cut(left) for seq in parents]
        self.make(self.cache.fork(parents, at=left), parents, texts)

    def _fork_root(self, parents: list[int]) -> None:
        texts = [self.texts[seq] for seq in parents]
        self.make(self.cache.fork(parents, root=True), [None] * len(parents), texts)

    def _append(self, seqs: list[int], count: int) -> object:
        rows = self.tokens(len(seqs), count)
        keys = torch.tensor(rows, dtype=torch.float32).reshape(1, len(seqs), 1, count, 1)

        def call() -> None:
            self.cache.append(seqs, keys, -keys)

        if self.owned(seqs):
            return self.refused(OwnedSequence, call)
        need = self.cache.pages_needed(seqs, count)
        if self.making_room(call, need, seqs) is REFUSED:
            return REFUSED
        for seq, row in zip(seqs, rows, strict=True):
            self.texts[seq] = self.texts[seq].more(row)
        return None

    def _slide(self, seqs: list[int], count: int) -> object:
        if self.owned(seqs):
            return self.refused(OwnedSequence, lambda: self.cache.slide(seqs, count))
        self.cache.slide(seqs, count)
        self.texts.update({seq: self.texts[seq].slid(count) for seq in seqs})
        return None

    def _truncate(self, seqs: list[int], count: int) -> object:
        if self.owned(seqs):
            return self.refused(OwnedSequence, lambda: self.cache.truncate(seqs, count))
        self.cache.truncate(seqs, count)
        for seq in seqs:
            self.texts[seq] = self.texts[seq].cut(len(self.texts[seq].tokens) - count)
        return None

    def _release(self, seqs: list[int]) -> object:
        if self.owned(seqs):
            return self.refused(OwnedSequence, lambda: self.cache.release(seqs))
        self.cache.release(seqs)
        self.end(seqs)
        return None

    def _release_subtree(self, seqs: list[int]) -> object:
        return self._end_tree(self.cache.release_subtree, seqs[0], self.family.subtree(seqs[0]))

    def _promote(self, seqs: list[int]) -> object:
        return self._end_tree(self.cache.promote, seqs[0], self.family.beside(seqs[0]))

    def _end_tree(self, call: Callable[[int], int], seq: int, doomed: list[int]) -> object:
        if not set(self.naive.pinned()).isdisjoint(doomed):
            return self.refused(PinnedEntry, lambda: call(seq))
        assert call(seq) == len(doomed)
        self.end(doomed)
        return None

    def _trim(self, seqs: list[int]) -> None:
        self.cache.trim()
        assert self.cache.pages_reserved == max(1, self.cache.pages_in_use)

    # -- steps

    def _open(self, parents: list[int], room: int) -> object:
        need = self.cache.pages_needed(parents, room, fork=True)
        step = self.making_room(lambda: self.cache.open(parents, room), need, parents)
        if step is REFUSED:
            return REFUSED
        self.steps[self.opened] = Opened(step, parents, [self.texts[seq] for seq in parents])
        self.opened += 1
        return None

    def _commit(self, seqs: list[int], name: int, new: int, drop: int) -> None:
        step, parents, texts = self.steps.pop(name)
        rows = self.tokens(len(parents), new)
        keys = torch.tensor(rows, dtype=torch.float32).reshape(len(parents), 1, new, 1)
        step.update(0, keys, -keys)
        children = step.commit(slide=drop)
        grown = [text.more(row).slid(drop) for text, row in zip(texts, rows, strict=True)]
        self.make(children, parents, grown)

    def _close(self, seqs: list[int], name: int) -> None:
        self.steps.pop(name).step.close()

    def _forget(self, seqs: list[int], name: int) -> None:
        """Nobody holds the step any more."""
        del self.steps[name]

    # -- the index

    def _put(self, seqs: list[int], key: int) -> object:
        self.keys = max(self.keys, key + 1)
        entry = next((entry for entry in self.naive.entries if entry.handle == seqs[0]), None)
        if entry is not None and entry.key != key:
            return self.refused(HandleInUse, lambda: self.index.put(key, seqs[0]))
        try:
            ended = self.naive.put(key, seqs[0], None)
        except FullError:
            return self.refused(CapacityExceeded, lambda: self.index.put(key, seqs[0]))
        self.index.put(key, seqs[0])
        self.end(ended)
        return None

    def _get(self, seqs: list[int], key: int) -> None:
        assert self.index.get(key) == self.naive.get(key)

    def _pin(self, seqs: list[int], key: int) -> object:
        entry = self.naive.find(key)
        if entry is None:
            return self.refused(UnknownKey, lambda: self.index.pin(key))
        self.index.pin(key)
        entry.pins += 1
        return None

    def _unpin(self, seqs: list[int], key: int) -> object:
        entry = self.naive.find(key)
        if entry is None:
            return self.refused(UnknownKey, lambda: self.index.unpin(key))
        if not entry.pins:
            return self.refused(NotPinned, lambda: self.index.unpin(key))
        self.index.unpin(key)
        entry.pins -= 1
        return None

    def _remove(self, seqs: list[int], key: int) -> object:
        entry = self.naive.find(key)
        if entry is None:
            return self.refused(UnknownKey, lambda: self.index.remove(key))
        if entry.pins:
            return self.refused(PinnedEntry, lambda: self.index.remove(key))
        self.index.remove(key)
        self.end([entry.handle])
        return None

    def _clear(self, seqs: list[int]) -> None:
        self.index.clear()
        self.end(self.naive.handles())

    def _reclaim(self, seqs: list[int], need: int) -> None:
        evicted = self.evicted(need, ())
        assert self.index.reclaim(need) is (evicted is not None)
        self.family.evict(evicted or ())
        self.drop(evicted or ())


REFUSED = object()

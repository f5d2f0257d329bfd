"""Which paths have K/V in the pages, found by number or by how they begin; who goes first."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Hashable, Iterable

import torch

from paged_kv.cache import PagedKVCache
from paged_kv.errors import NotPinned
from paged_kv.eviction import Policy
from paged_kv.index import CacheIndex
from paged_kv.integrations.huggingface.kept import Kept, States, Watch, Watched
from paged_kv.integrations.huggingface.token_tree import Match, Tokens, TokenTree


class Residents:
    """K/V and hidden states of numbered paths.

    Sequences belong to an index, which evicts leaves first; who is evicted is forgotten as soon as
    anybody comes upon it. `max_bytes` bounds pages in use and hidden states together.
    """

    def __init__(
        self, pages: PagedKVCache, policy: str | Callable[[], Policy], max_bytes: int
    ) -> None:
        self.pages = pages
        self.index = CacheIndex(pages, policy)
        self.tree = TokenTree()
        self.max_bytes = max_bytes
        self._kept: dict[int, Kept] = {}
        self._states = States()  # of `_kept`, as `tree` is
        self._torn = False  # whether these two were left half changed
        self._swept = 0  # evictions after which what is gone was forgotten
        self._pins: dict[int, int] = {}  # of nodes, whether they have K/V now or not
        self._gone: deque[Watch] = deque()  # of nodes that were dropped: finalizers add to it
        self._spare: dict[int, None] = {}  # numbers that are no node's, within one call
        self._numbers = itertools.count(1)
        self._watched: dict[int, Watch] = {}
        pages.set_reclaimer(self.index)

    # -- numbers, and whose they are

    def number(self) -> int:
        """The number of another path."""
        return next(self._numbers)

    def spare(self) -> int:
        """The number of a path that is no node's: to be released before the call ends."""
        number = self.number()
        self._spare[number] = None
        return number

    def watch(self, number: int, node: Watched) -> None:
        """Let go of what is kept under a number once `node` is dropped."""
        watch = Watch(node, self._gone.append)
        watch.number = number
        self._watched[number] = watch

    def alive(self) -> list[Watched]:
        """All watched nodes that exist, the oldest first."""
        found = [watched() for watched in self._watched.values()]
        return [node for node in found if node is not None]

    def since(self, mark: int) -> list[int]:
        """Numbers of nodes that were watched since `mark` was given out."""
        return [number for number in self._watched if number > mark]

    def node(self, number: int) -> Watched | None:
        """The node that is watched under a number."""
        watched = self._watched.get(number)
        return None if watched is None else watched()

    def __contains__(self, number: int) -> bool:
        """Whether a node of this number was watched, and not released."""
        return number in self._watched

    # -- what is kept

    def put(self, number: int, seq: int, path: Tokens, hidden: torch.Tensor | None) -> None:
        """Keep K/V of a path, and take ownership of its sequence."""
        self.mend()
        self._torn = True
        self.index.put(number, seq)
        self._drop(number)
        if number in self._pins and not self.index.pinned(number):
            self.index.pin(number)
        self._kept[number] = Kept(path, hidden)
        self._states.add(hidden)
        self.tree.add(path, number)
        self._torn = False
        self._unbind(number)

    def _unbind(self, number: int) -> None:
        """Let a node hold what it went on from no longer."""
        node = self.node(number)
        if node is not None:
            node.basis = None

    def hidden(self, number: int) -> torch.Tensor | None:
        """The hidden state behind a path that was fed to its end, if it is kept."""
        kept = self._kept.get(number)
        return None if kept is None else kept.hidden

    def holds(self, number: int, path: Tokens) -> bool:
        """Whether K/V of the whole path are kept under a number."""
        kept = self._kept.get(number)
        return kept is not None and len(kept.path) == len(path) and number in self.index

    def longest(self, path: Tokens) -> Match | None:
        """Whose K/V begin with the longest beginning of a path."""
        self.mend()
        while True:
            match = self.tree.longest(path)
            if match is None or match.name in self.index:
                return match
            self._forget(match.name)

    def ending(self, path: Tokens) -> list[int]:
        """Whose K/V are those of just this path."""
        self.mend()
        return [number for number in self.tree.ending(path) if number in self.index]

    def sequence(self, number: int) -> int | None:
        """The sequence of a path, which stays the index's own; counted as a use of it."""
        return self.index.get(number)

    def sequences(self) -> dict[int, int]:
        """The sequences by number, not counted as uses. Cost: O(paths)."""
        numbers = [number for number in self.index if isinstance(number, int)]
        return dict(zip(numbers, self.index.handles()))

    # -- pins

    def pin(self, number: int) -> None:
        """Keep what a number holds, now and whenever it is put, until `unpin` was called as
        often.
        """
        if number in self.index and not self.index.pinned(number):
            self.index.pin(number)
        self._pins[number] = self._pins.get(number, 0) + 1

    def unpin(self, number: int) -> None:
        """Undo one `pin`. Raises NotPinned."""
        count = self._pins.get(number, 0)
        if not count:
            raise NotPinned(number)
        if count > 1:
            self._pins[number] = count - 1
            return
        self._unpin(number)
        del self._pins[number]

    def pins(self, number: int) -> int:
        """How often `unpin` may be called."""
        return self._pins.get(number, 0)

    def _end(self, number: Hashable) -> None:
        if number in self.index:
            self._unpin(number)
            self.index.remove(number)

    def _unpin(self, number: Hashable) -> None:
        while self.index.pinned(number):
            self.index.unpin(number)

    # -- what goes

    def release(self, numbers: Iterable[int]) -> None:
        """Give up what is kept under these numbers, pinned or not."""
        for number in numbers:
            self._end(number)
            self._forget(number)
            self._pins.pop(number, None)
            self._spare.pop(number, None)
            self._unbind(number)
            # last: whoever interrupts this leaves a node that is fed again, or released again
            self._watched.pop(number, None)

    def release_spare(self) -> None:
        """Give up what is kept under `spare` numbers."""
        if self._spare:
            self.release(list(self._spare))

    def settle(self) -> None:
        """Finish what an interrupt left half done, and give up what dropped nodes have left."""
        self.mend()
        self.release_spare()
        while self._gone:
            self.release([self._gone[0].number])
            self._gone.popleft()

    def mend(self) -> None:
        """Make anew what follows from what is kept, where an interrupt came between, and give up
        K/V of which nothing else was noted.
        """
        if not self._torn:
            return
        for number in set(self.index) - self._kept.keys():
            self._end(number)
        self.tree = TokenTree()
        for number, kept in self._kept.items():
            self.tree.add(kept.path, number)
        self._states = States(self._kept.values())
        self._torn = False

    def clear(self) -> None:
        """Give up all K/V and hidden states. Nodes stay, and are fed again."""
        self.index.clear()
        for number in list(self._kept):
            self._forget(number)

    def fit(self) -> None:
        """Evict until pages and hidden states are within `max_bytes`, as far as that can be."""
        self.sweep()
        while self._over > 0 and self._evict():
            self.sweep()
        for number in list(self._kept) if self._over > 0 else ():
            if self._over <= 0:
                return
            self._forget_state(number)

    @property
    def _over(self) -> int:
        return self.pages.bytes_in_use + self._states.nbytes - self.max_bytes

    def _evict(self) -> bool:
        """Evict as many pages as there are too many; what cannot be had as a whole, in part."""
        need = -(-self._over // self.pages.page_bytes)
        while need > 0:
            if self.index.reclaim(need):
                return True
            need //= 2
        return False

    def sweep(self) -> None:
        """Forget what was evicted."""
        evicted = self.evicted
        if evicted == self._swept and len(self._kept) <= len(self.index):
            return
        for number in [number for number in self._kept if number not in self.index]:
            self._forget(number)
        self._swept = evicted

    def _forget(self, number: int) -> None:
        self.mend()
        self._torn = True
        self._drop(number)
        self._torn = False

    def _drop(self, number: int) -> None:
        kept = self._kept.get(number)
        if kept is None:
            return
        self.tree.remove(kept.path, number)
        self._states.drop(kept.hidden)
        del self._kept[number]

    def _forget_state(self, number: int) -> None:
        """Give up a hidden state alone: to have it again, one token is fed."""
        kept = self._kept[number]
        self._torn = True
        self._states.drop(kept.hidden)
        kept.hidden = None
        self._torn = False

    @property
    def evicted(self) -> int:
        """Paths that were evicted so far."""
        return self.index.stats.evictions

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the hidden states that are kept."""
        self.mend()
        return self._states.nbytes

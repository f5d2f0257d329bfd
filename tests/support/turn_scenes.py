"""Calls in whose midst something else is called: from a hook, or amid an operation on tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from small_caches import filled, grow, tiny_cache

from paged_kv import KVCacheManager
from paged_kv.eviction import LRU, EntryView
from paged_kv.index import CacheIndex

Call = Callable[[], Any]


class Hooked(LRU):
    """A policy that calls something from its hooks."""

    def __init__(self, scene: Scene) -> None:
        super().__init__()
        self.scene = scene

    def on_add(self, entry: EntryView) -> None:
        super().on_add(entry)
        self.scene.call()

    def on_hit(self, entry: EntryView) -> None:
        super().on_hit(entry)
        self.scene.call()


class Scene:
    """A cache, a manager, an index whose policy calls `call` from its hooks, and sequences in and
    out of it.
    """

    def __init__(self) -> None:
        self.call: Call = lambda: None
        self.cache = tiny_cache(16)
        self.index = CacheIndex(self.cache, lambda: Hooked(self))
        self.manager = KVCacheManager(self.cache, 1)
        self.one, self.two, self.entry, self.spare = filled(self.cache, 3, 2, 1, 1)
        (self.child,) = self.cache.fork([self.one])
        self.index.put("a", self.entry)
        self.manager.set_wm_cache("w", filled(self.cache, 1)[0])
        self.step = self.cache.open([self.two], 1)
        self.kv = torch.zeros(1, 1, 1, 1, 2)
        self.step.update(0, self.kv[0], self.kv[0])

    @contextmanager
    def amid(self, verb: str, call: Call) -> Iterator[Call]:
        """A call of `verb` in whose midst something else is called: gives the verb."""
        verbs: dict[str, tuple[Call, str]] = {
            "put": (lambda: self.index.put("b", self.spare), ""),
            "get": (lambda: self.index.get("a"), ""),
            "append": (lambda: grow(self.cache, [self.one], 4), "write_slots"),
            "gather": (lambda: self.cache.gather([self.one]), "gather"),
            "open": (lambda: self.cache.open([self.one], 1), "gather"),
            "commit": (self.step.commit, "write_pages"),
            "trim": (self.cache.trim, "trimmed"),
        }
        run, method = verbs[verb]
        storage = self.cache._pool.storage
        if not method:
            self.call = call
        else:
            real = getattr(storage, method)

            def interrupted(*args: Any) -> Any:
                call()
                return real(*args)

            setattr(storage, method, interrupted)
        try:
            yield run
        finally:
            self.call = lambda: None
            if method:
                delattr(storage, method)

    def verbs(self) -> dict[str, Call]:
        """Every verb, by the name under which it is refused."""
        cache = self.cache
        return {
            "new": cache.new,
            "fork": lambda: cache.fork([self.one]),
            "append": lambda: cache.append([self.one], self.kv, self.kv),
            "slide": lambda: cache.slide([self.one], 1),
            "truncate": lambda: cache.truncate([self.one], 1),
            "release_subtree": lambda: cache.release_subtree(self.one),
            "promote": lambda: cache.promote(self.child),
            "gather": lambda: cache.gather([self.one]),
            "open": lambda: cache.open([self.one], 1),
            "commit": self.step.commit,
            "trim": cache.trim,
            "set_reclaimer": lambda: cache.set_reclaimer(None),
            "listen": lambda: cache.listen(print),
            "unlisten": lambda: cache.unlisten(print),
            "put": lambda: self.index.put("x", self.two),
            "put_batch": lambda: self.index.put_batch(["x"], [self.two]),
            "get": lambda: self.index.get("a"),
            "set_priorities": lambda: self.index.set_priorities(["a"], [1]),
            "remove": lambda: self.index.remove("a"),
            "clear": self.index.clear,
            "pin": lambda: self.index.pin("a"),
            "unpin": lambda: self.index.unpin("a"),
            "reclaim": lambda: self.index.reclaim(1),
            "victims": self.index.victims,
            "retrieve_cache_hierarchical": lambda: self.manager.retrieve_cache_hierarchical(0, "w"),
            "set_init_caches": lambda: self.manager.set_init_caches([0], ["i"], [self.two]),
            "clear_init_caches": self.manager.clear_init_caches,
            "clear_recur_cache": self.manager.clear_recur_cache,
            "clear_wm_cache": self.manager.clear_wm_cache,
            "clear_all": self.manager.clear_all,
        }

    def readers(self) -> dict[str, Call]:
        """Every reader, and what it finds."""
        cache = self.cache
        one = [self.one]
        return {
            "lengths": lambda: cache.lengths(one),
            "live": cache.live,
            "block_tables": lambda: [part.tolist() for part in cache.block_tables(one)],
            "page_tables": lambda: cache.page_tables(one),
            "pages_needed": lambda: cache.pages_needed(one, 5),
            "pages_freed_by": lambda: cache.pages_freed_by(one),
            "parent": lambda: cache.parent(self.child),
            "children": lambda: cache.children(self.one),
            "descendants": lambda: cache.descendants(self.one),
            "positions": lambda: self.step.then.tolist(),
            "look": lambda: cache.look(lambda tables: tables.items()),
            "check": cache.check,
            "pinned": lambda: self.index.pinned("a"),
            "pinned_pages": self.manager.pinned_pages,
            "index check": self.index.check,
        }

    def figures(self) -> list[Any]:
        """What is read without a turn."""
        cache = self.cache
        return [
            cache.stats,
            cache.pages_in_use,
            cache.live_sequences,
            cache.open_steps,
            cache.stored_tokens,
            cache.logical_tokens,
            len(self.index),
            list(self.index),
            "a" in self.index,
            self.index.stats,
            self.index.handles(),
            self.manager.stats,
        ]


HOOKS = ["put", "get"]
AMID = [*HOOKS, "append", "gather", "open", "commit", "trim"]


class Elsewhere:
    """A call in another thread, and how it ended; `then` is called once it has."""

    def __init__(self, call: Call, then: Call = lambda: None) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self.ended = False
        self.call = call
        self.then = then
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        try:
            self.result = self.call()
        except BaseException as error:
            self.error = error
        self.ended = True
        self.then()

    def end(self) -> Elsewhere:
        self.thread.join()
        return self

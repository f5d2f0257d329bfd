"""Sequences leave for another cache and come back, among all other verbs."""

from __future__ import annotations

from typing import Any

import pytest
from cache_machine import CacheMachine
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from small_caches import Fault, fault

from paged_kv import PagedKVCache
from paged_kv.bundles.bundle import Bundle, Source

FAULTS = st.sampled_from([None, None, "import_pages", "place", "grow"])


class BundleMachine(CacheMachine):
    """As `CacheMachine`, with bundles."""

    def twin(self) -> PagedKVCache:
        """A cache of the same shape, with nothing in it."""
        cache = self.cache
        return PagedKVCache(
            layers=cache.layers,
            heads=cache.heads,
            head_size=cache.head_size,
            value_head_size=cache.value_head_size,
            page_size=cache.page_size,
            dtype=cache.dtype,
            device=cache.device,
            storage=cache.storage,
            num_pages=1,
        )

    def send(self, seqs: list[int], data: Any) -> Source:
        """What another cache adopts."""
        return self.cache.export(seqs, data=data)

    def can_export(self) -> bool:
        """Whether pages can be read at all."""
        return True

    def receive(self, source: Source) -> list[int]:
        """It is adopted."""
        return self.cache.adopt(source)

    @rule(data=st.data(), name=FAULTS, after=st.booleans())
    @precondition(lambda self: len(self.names) < 10)
    def there_and_back(self, data: st.DataObject, name: str | None, after: bool) -> None:
        seqs = self.draw(data, distinct=True)
        source = self.send(seqs, {"seqs": tuple(seqs)})
        other = self.twin()
        theirs = other.adopt(source)
        self.compare_twin(seqs, other, theirs)
        back = other.export(theirs)
        assert back.records.nbytes == other.pages_in_use * other.page_bytes
        with fault(self.cache, name, after):
            done, made = self.attempt(lambda: self.receive(back), other.pages_in_use)
        if done:
            names = self.oracle.adopt(self.theirs(seqs))
            self.names.update(zip(made, names, strict=True))

    def compare_twin(self, seqs: list[int], other: PagedKVCache, theirs: list[int]) -> None:
        """Another cache holds the same, shares the same, and goes on the same."""
        other.check()
        self.same(other.gather(theirs), self.oracle.gather(self.theirs(seqs)))
        held = {page for table in self.cache.page_tables(seqs) for page in table}
        assert other.pages_in_use == len(held)
        keys, values = self.tokens(len(seqs), 2)
        children = other.fork(theirs)
        other.append(children, keys, values)
        self.same(other.gather(theirs), self.oracle.gather(self.theirs(seqs)))
        names = self.oracle.fork(self.theirs(seqs))
        self.oracle.append(names, keys, values)
        self.same(other.gather(children), self.oracle.gather(names))
        self.oracle.release(names)
        other.release(children)
        other.check()

    @rule(data=st.data(), after=st.booleans())
    @precondition(lambda self: self.names)
    def a_failed_export_changes_nothing(self, data: st.DataObject, after: bool) -> None:
        seqs = self.draw(data, distinct=True)
        if not self.can_export():
            return
        if any(self.cache.lengths(seqs)):
            with fault(self.cache, "export_pages", after), pytest.raises(Fault):
                self.cache.export(seqs)
        assert isinstance(self.cache.export(seqs), Bundle)

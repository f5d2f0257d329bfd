"""Steps that attend in pages, among all other verbs, against dense attention."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from cache_machine import STEPS, CacheMachine, faults
from dense_attention import attended
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from small_caches import fault

from paged_kv.attention.choice import BACKENDS
from paged_kv.errors import BadCount, ClosedStep
from paged_kv.paged_step import PagedStep
from paged_kv.tools.reference.dense import Window

# Results of order 1, whose sums are taken in float32: what the last rounding may do.
CLOSE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


class Attending(NamedTuple):
    """An open step, what it was opened on, and the new tokens that it takes."""

    step: PagedStep
    windows: list[tuple[int, Window]]
    keys: torch.Tensor  # [layers, rows, heads, n, size]
    values: torch.Tensor
    left: list[int]  # layers that were not attended


class PagedMachine(CacheMachine):
    """As `CacheMachine`, with paged steps that stay open while all else goes on."""

    @property
    def other_steps(self) -> int:
        return len(self.__dict__.setdefault("attending", []))

    @rule(data=st.data(), name=faults, after=st.booleans(), backend=st.sampled_from(BACKENDS))
    @precondition(lambda self: self.names and self.other_steps < STEPS)
    def attend(self, data: st.DataObject, name: str | None, after: bool, backend: str) -> None:
        parents = self.draw(data, distinct=False)
        counts = [data.draw(st.integers(0, 5)) for _ in parents]
        need = self.cache.pages_needed(parents, counts, fork=True)
        with fault(self.cache, name, after):
            done, step = self.attempt(
                lambda: self.cache.attend(parents, counts, backend=backend), need
            )
        if done:
            assert step.lengths == self.cache.lengths(parents)
            keys, values = self.tokens(len(parents), max(counts))
            layers = list(range(self.cache.layers))
            windows = self.oracle.open(self.theirs(parents))
            self.attending.append(Attending(step, windows, keys, values, layers))

    def as_read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [heads, n, size] as attention reads them, once they are in pages."""
        return tokens

    def some_attending(self, data: st.DataObject) -> Attending:
        return self.attending[data.draw(st.integers(0, len(self.attending) - 1))]

    @rule(data=st.data(), groups=st.integers(1, 2), name=faults, after=st.booleans())
    @precondition(lambda self: self.other_steps)
    def see_a_layer(self, data: st.DataObject, groups: int, name: str | None, after: bool) -> None:
        """Whatever was done to parents, pages and pool since the step was opened."""
        found = self.some_attending(data)
        if not found.left:
            return
        layer = data.draw(st.sampled_from(found.left))
        options: dict[str, Any] = data.draw(
            st.sampled_from(
                [{}, {}, {"window": 1}, {"window": 3}, {"soft_cap": 2.0}, {"scale": 0.3}]
            )
        )
        step = found.step
        keys = found.keys[layer]
        values = found.values[layer]
        queries = self.tokens(len(step.parents) * groups, keys.shape[2])[0][0]
        queries = queries.reshape(len(step.parents), groups * keys.shape[1], *keys.shape[2:])
        with fault(self.cache, name, after):
            done, seen = self.attempt(
                lambda: step.layers[layer].attend(queries, keys, values, **options)
            )
        if not done:
            return
        found.left.remove(layer)
        wanted = torch.zeros(seen.shape, dtype=torch.float64)
        for row, ((_, window), new) in enumerate(zip(found.windows, step.counts)):
            all_keys = torch.cat((window.keys[layer], keys[row, :, :new]), dim=1)
            all_values = torch.cat((window.values[layer], values[row, :, :new]), dim=1)
            all_keys, all_values = self.as_read(all_keys), self.as_read(all_values)
            wanted[row, :, :new] = attended(queries[row, :, :new], all_keys, all_values, **options)
        close = CLOSE[seen.dtype]
        torch.testing.assert_close(seen.double().cpu(), wanted, atol=close, rtol=close)

    @rule(data=st.data(), name=faults, after=st.booleans())
    @precondition(lambda self: self.other_steps and len(self.names) < 10)
    def publish(self, data: st.DataObject, name: str | None, after: bool) -> None:
        """It takes no page, and copies nothing."""
        found = self.some_attending(data)
        step = found.step
        kept = [data.draw(st.integers(0, new)) for new in step.counts]
        counts = None if kept == step.counts and data.draw(st.booleans()) else kept
        if found.left and any(kept):
            with pytest.raises(BadCount):
                step.commit(counts)
            return
        taken = self.cache.stats.allocated_pages
        with fault(self.cache, name, after):
            done, children = self.attempt(lambda: step.commit(counts))
        if not done:
            assert not step.closed, "it may be tried again"
            return
        assert self.cache.stats.allocated_pages == taken
        names = self.oracle.commit(found.windows, found.keys, found.values, counts=kept)
        self.names.update(zip(children, names, strict=True))
        self.attending.remove(found)
        self.see_it_closed(step)

    @rule(data=st.data(), way=st.sampled_from(["close", "drop", "leave"]))
    @precondition(lambda self: self.other_steps)
    def let_go(self, data: st.DataObject, way: str) -> None:
        found = self.some_attending(data)
        self.attending.remove(found)
        step = found.step
        if way == "drop":
            del found, step
        else:
            with step:
                pass
            self.see_it_closed(step)
        self.see_steps()

    def see_it_closed(self, step: PagedStep) -> None:
        """A step that has ended says so, and can be closed again."""
        empty = torch.zeros(0)
        for call in (step.commit, lambda: step.layers[0].attend(empty, empty, empty)):
            with pytest.raises(ClosedStep):
                call()
        step.close()

    def teardown(self) -> None:
        self.__dict__.pop("attending", None)  # and so they are dropped
        super().teardown()

"""Steps whose windows stay in their pages, while all else goes on."""

from __future__ import annotations

from cache_machine import STEPS, CacheMachine, Opened
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule


class InPagesMachine(CacheMachine):
    """As `CacheMachine`, with windows that can be attended to where they lie in most steps."""

    dtypes = CacheMachine.wide
    value_sizes = (None,)

    @rule(
        data=st.data(),
        rows=st.integers(1, 3),
        room=st.integers(1, 4),
        shifted=st.booleans(),
        number=st.integers(1, 3),
    )
    @precondition(lambda self: self.names and len(self.steps) < STEPS)
    def open_alike(
        self, data: st.DataObject, rows: int, room: int, shifted: bool, number: int
    ) -> None:
        """Several rows go on from one sequence; some tokens follow at once."""
        parents = self.draw(data, distinct=True)[:1] * rows
        need = self.cache.pages_needed(parents, room, fork=True)
        done, step = self.attempt(lambda: self.cache.open(parents, room, gather="later"), need)
        if done:
            windows = self.oracle.open(self.theirs(parents))
            opened = Opened(step, windows, *self.tokens(rows, 0), self.can_stay())
            self.steps.append(opened)
            for _ in range(min(number, room)):
                self.see(opened, shifted)

    @rule(data=st.data())
    @precondition(lambda self: self.steps)
    def go_on(self, data: st.DataObject) -> None:
        """One more token, by what was looked up before."""
        opened = self.some_step(data)
        if opened.step.size < opened.step.past + opened.step.room:
            self.see(opened, False)

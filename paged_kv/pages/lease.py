"""What keeps a step open. No tensors in here."""

from __future__ import annotations

from paged_kv.errors import ClosedStep
from paged_kv.pages.books import Books
from paged_kv.pages.records import Record


class Lease:
    """An open step, as it stands in the books. Whoever works on the step shares it.

    It points at none of them, so that all are freed by reference count; and the step is given up
    when its lease is.
    """

    __slots__ = ("__weakref__", "light", "number", "parents", "pending", "records")

    def __init__(
        self, books: Books, number: int, parents: list[int], records: list[Record]
    ) -> None:
        self.number = number
        self.parents = parents
        self.records = records  # as they were when it was opened
        self.pending = books.pending
        self.light = books.light

    @property
    def closed(self) -> bool:
        """Whether the step was committed or closed."""
        return self.number not in self.pending and self.number not in self.light

    def check(self, what: str) -> None:
        """Raise ClosedStep, which names the call, unless the step is open."""
        if self.closed:
            raise ClosedStep(what)

    def windows(self, what: str) -> list[Record]:
        """Whose pages the windows lie in: of the children that the step will publish, or else of
        its parents, where it is light.

        Raises ClosedStep, which names the call.
        """
        if self.number in self.light:
            return self.records
        step = self.pending.get(self.number)
        if step is None:
            raise ClosedStep(what)
        return step.records

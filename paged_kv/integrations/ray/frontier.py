"""Rows about nodes go to the workers of their trees, and answers come back in their order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Any, NamedTuple

from paged_kv.errors import OutOfPages
from paged_kv.integrations.ray.dispatch import Ask, Dispatch
from paged_kv.integrations.ray.mover import Mover
from paged_kv.integrations.ray.placement import Placement

Told = Callable[[int, int], object]


class Question(NamedTuple):
    """One verb about many rows."""

    verb: str
    trees: Sequence[int]  # of each row
    columns: Sequence[Sequence[Any]]  # arguments of the verb, a value for each row
    options: Mapping[str, Any] | None  # the last argument, the same for all rows
    version: int  # of the weights


class Frontier:
    """Asks all workers at once. `rows`: of one message at most; None: all."""

    def __init__(
        self,
        dispatch: Dispatch,
        placement: Placement,
        mover: Mover,
        rows: int | None,
        told: Told | None,
    ) -> None:
        self._dispatch = dispatch
        self._placement = placement
        self._mover = mover
        self._rows = rows
        self._told = told

    def ask(self, question: Question) -> list[list[Any]]:
        """What is said of each row: a list, as long for each.

        Where a worker runs out of pages, a tree is moved away, each at most once, and its rows are
        asked again. Raises what a worker did, or WorkerLost.
        """
        found: dict[int, list[Any]] = {}
        moved: set[int] = set()
        total = len(question.trees)
        while len(found) < total:
            left = [row for row in range(total) if row not in found]
            errors = self._once(question, left, found)
            for worker in sorted(errors, key=lambda each: isinstance(errors[each], OutOfPages)):
                error = errors.pop(worker)
                tree = None
                if isinstance(error, OutOfPages):
                    tree = self._mover.relieve(worker, question.version, moved)
                if tree is None:
                    try:
                        raise error
                    finally:
                        del error  # else it would hold, by this frame, itself and all nodes
                moved.add(tree)
        return [found[row] for row in range(total)]

    def _once(
        self, question: Question, left: Sequence[int], found: dict[int, list[Any]]
    ) -> dict[int, Exception]:
        """Ask for the rows that are left; what was wrong, by worker."""
        pieces = self._pieces(question, left)
        asks = {worker: [_ask(question, rows) for rows in each] for worker, each in pieces.items()}
        done = len(found)

        def told(rows: int) -> None:
            nonlocal done
            done += rows
            if self._told is not None:
                self._told(done, len(question.trees))

        answers = self._dispatch.gather(asks, question.version, told)
        errors: dict[int, Exception] = {}
        for worker, each in answers.items():
            for rows, answer in zip(pieces[worker], each):
                error = answer.reply.error
                if error is None:
                    found.update(_by_row(rows, answer.reply.value))
                elif isinstance(errors.get(worker), (OutOfPages, NoneType)):
                    errors[worker] = error  # any other one counts more
        return errors

    def _pieces(self, question: Question, left: Sequence[int]) -> dict[int, list[list[int]]]:
        """The rows of each message to each worker."""
        rows: dict[int, list[int]] = {}
        for row in left:
            rows.setdefault(self._placement.worker(question.trees[row]), []).append(row)
        size = self._rows
        return {
            worker: [
                each[first : first + (size or len(each))]
                for first in range(0, len(each), size or len(each))
            ]
            for worker, each in rows.items()
        }


def _ask(question: Question, rows: Sequence[int]) -> Ask:
    columns = tuple([column[row] for row in rows] for column in question.columns)
    more = () if question.options is None else (dict(question.options),)
    return Ask(question.verb, (*columns, *more), len(rows))


def _by_row(rows: Sequence[int], value: Any) -> dict[int, list[Any]]:
    """What a message said of each of its rows, which stands side by side."""
    each = len(value) // len(rows) if value else 0
    return {
        row: list(value[place * each : (place + 1) * each]) if value else []
        for place, row in enumerate(rows)
    }

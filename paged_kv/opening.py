"""Steps are opened: what they attend to is read, and the pages that their room needs are taken."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from weakref import ref

from paged_kv import checks
from paged_kv.attention.choice import BACKENDS
from paged_kv.attention.in_pages import PageRows, why_not
from paged_kv.attention.scratch import Scratch
from paged_kv.checks import Counts, amount, choice, function, handles
from paged_kv.errors import OutOfPages
from paged_kv.paged_step import PagedStep, Work
from paged_kv.pages.lease import Lease
from paged_kv.pages.plan import Plan
from paged_kv.pages.pool import Pool
from paged_kv.pages.records import Record
from paged_kv.step import Hook, Late, Step
from paged_kv.tensors import is_left
from paged_kv.turns import Turns, verb

LATER = "later"
GATHER = ("now", LATER)


class Opener:
    """Opens the steps on one pool."""

    def __init__(self, pool: Pool, turns: Turns) -> None:
        self.pool = pool
        self.turns = turns
        self.scratch = Scratch(pool.storage.form.device)  # of attention, one layer at a time

    def open(
        self, seqs: Iterable[int], room: int, pad: str, hook: Hook | None, gather: str
    ) -> Step:
        """A step on a dense copy of these sequences: see `PagedKVCache.open`."""
        if hook is not None:
            function("rebase", hook, "None or a function of the step")
        parents = handles(seqs)
        room = amount("room", room, 0)
        left = is_left(pad)
        later = choice("gather", gather, GATHER) == LATER and self._stays()
        try:
            step = self._open(parents, room, left, later, hook)
        except OutOfPages as full:
            self.pool.reclaim(full, parents)
            step = self._open(parents, room, left, later, hook)
        if hook is not None and not later:
            try:
                hook(step)
            except BaseException:
                step.close()
                raise
        return step

    def attend(self, seqs: Iterable[int], new: Counts, backend: str) -> PagedStep:
        """A step on the pages of these sequences: see `PagedKVCache.attend`."""
        parents = handles(seqs)
        counts = checks.counts("counts", new, len(parents))
        choice("backend", backend, BACKENDS)
        try:
            return self._attend(parents, counts, backend)
        except OutOfPages as full:
            self.pool.reclaim(full, parents)
        return self._attend(parents, counts, backend)

    @verb
    def _open(
        self, parents: list[int], room: int, left: bool, later: bool, hook: Hook | None
    ) -> Step:
        """Gather, take the pages, keep the children."""
        pool = self.pool
        books = pool.books
        records = books.records(parents)
        sizes = [record[1:3] for record in records]
        alike = bool(sizes) and sizes.count(sizes[0]) == len(sizes)
        light = alike and pool.steps.can_be_light(records, room)
        plan = None if light else pool.plan_step(parents, records, [room] * len(records))
        buffer = pool.buffers.take(books.pending)
        if later:
            layout = buffer.layout((len(records), 0, room, None))
            layout.blank_room()
        else:
            layout = pool.read(records, room, buffer, left=left, alike=alike)
        number = pool.steps.number()
        lease = Lease(books, number, parents, records)
        buffer.step = number
        if plan is None:
            books.light[number] = ref(lease)
        else:
            self._keep(lease, plan)
            records = plan.becomes
        late = Late(hook, self._page_rows(records, sizes)) if later else None
        return Step(pool, self.turns, lease, layout, sizes, left, alike, late)

    def _stays(self) -> bool:
        """Whether windows can be attended to where they lie; else they are copied now."""
        storage = self.pool.storage
        form = storage.form
        return storage.token_rows() is not None and why_not(form.device, form.dtype) is None

    def _page_rows(self, records: list[Record], sizes: list[tuple[int, int]]) -> PageRows:
        """Where windows lie."""
        storage = self.pool.storage
        rows = storage.token_rows()
        assert rows is not None  # or they do not stay there
        part = storage.form.parts[0]
        tables = [record[0] for record in records]
        return PageRows(rows, part.parts, part.heads, storage.form.page_size, tables, sizes)

    @verb
    def _attend(self, parents: list[int], counts: list[int], backend: str) -> PagedStep:
        """Take the pages, keep the children."""
        pool = self.pool
        records = pool.books.records(parents)
        plan = pool.plan_step(parents, records, counts)
        lease = Lease(pool.books, pool.steps.number(), parents, records)
        self._keep(lease, plan, at_hand=True)
        return PagedStep(Work(pool, self.turns, lease, counts, backend, self.scratch))

    def _keep(self, lease: Lease, plan: Plan, *, at_hand: bool = False) -> None:
        """Let the children of a plan hold their pages, as long as the lease lives; and have them at
        hand.
        """
        pool = self.pool
        if plan.copies:
            pool.storage.copy_pages(plan.copies)
        if at_hand:
            held = chain.from_iterable([record[0] for record in plan.becomes])
            pool.storage.hold(lease.number, held)
        pool.steps.open(lease.number, plan, self.turns.watch(lease, lease.number))

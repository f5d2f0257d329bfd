"""What a verb that needs pages is going to do, computed before anything changes. No tensors in
here.
"""

from __future__ import annotations

from collections.abc import Sequence

from paged_kv.pages.allocator import PageAllocator
from paged_kv.pages.records import Record


class Plan:
    """What `carry_out` will do: the records that come to be, where new tokens go, pages to copy
    first.

    `becomes[r]` is the record of row r, of the child where the plan forks: with `counts[r]` new
    tokens, from index `ends[r]` of its table on. `copies` pairs (source page, fresh page); `fresh`
    counts the pages taken from the free stack; `lost` are pages that rows which grow in place hold
    no longer; `fills` says how far pages are written to by then, where it is not to the end.
    """

    fork: bool = True
    copies: Sequence[tuple[int, int]] = ()
    fills: Sequence[tuple[int, int]] = ()
    lost: Sequence[int] = ()

    def __init__(
        self,
        seqs: list[int],
        counts: list[int],
        page_size: int,
        becomes: list[Record],
        ends: list[int],
        fresh: int,
    ) -> None:
        self.seqs = seqs
        self.counts = counts
        self.page_size = page_size
        self.becomes = becomes
        self.ends = ends
        self.fresh = fresh

    @property
    def slots(self) -> list[int]:
        """The slots of the new tokens, row by row."""
        size = self.page_size
        return [
            record[0][index // size] * size + index % size
            for record, end, new in zip(self.becomes, self.ends, self.counts)
            for index in range(end, end + new)
        ]

    def row_pages(self) -> tuple[list[int], int] | None:
        """The page that each row writes to and the offset in it, where one page a row is enough.

        None where rows write different numbers of tokens, or at different offsets. In a tree search
        children take a fresh page each.
        """
        counts = self.counts
        ends = self.ends
        size = self.page_size
        if not counts:
            return None
        new = counts[0]
        offset = ends[0] % size
        if not 0 < new <= size - offset or counts.count(new) != len(counts):
            return None
        if ends.count(ends[0]) == len(ends):
            at = ends[0] // size
            return [record[0][at] for record in self.becomes], offset
        if any(end % size != offset for end in ends):
            return None
        return [record[0][end // size] for record, end in zip(self.becomes, ends)], offset


def plan_growth(
    seqs: list[int],
    records: Sequence[Record],
    counts: list[int],
    page_size: int,
    pages: PageAllocator,
    *,
    fork: bool,
) -> Plan:
    """Plan to append `counts` tokens, in place or in forked children of `seqs`.

    Changes nothing. Where `plan.fresh` exceeds the free pages it is only a count: make room and
    plan again.
    """
    free = pages.free
    fill = pages.fill
    refs = pages.refs
    becomes: list[Record] = []
    ends: list[int] = []
    copies: list[tuple[int, int]] = []
    fills: list[tuple[int, int]] = []
    claimed: set[int] = set()  # last pages that a row of this plan writes on in
    available = len(free)
    fresh = 0
    parents = seqs if fork else [record[3] for record in records]
    for (table, start, length, _, place), parent, new in zip(records, parents, counts):
        end = start + length
        ends.append(end)
        if new:
            offset = end % page_size
            if offset and table:
                tail = table[-1]
                # Nobody reads the slots from `offset` on, nor will: this is the first to come of
                # the rows that end where the page is written to, or the only holder of the page.
                if tail not in claimed and (fill[tail] == offset or refs[tail] == 1):
                    claimed.add(tail)
                else:
                    fresh += 1
                    page = free[-fresh] if fresh <= available else 0
                    copies.append((tail, page))
                    table = table[:-1] + (page,)
                fills.append((table[-1], min(page_size, offset + new)))
            total = end + new
            missing = -(total // -page_size) - len(table)
            if missing:
                table += _peek(free, fresh, missing)
                fresh += missing
                if total % page_size:
                    fills.append((table[-1], total % page_size))
        becomes.append((table, start, length + new, parent, place + new))
    plan = Plan(seqs, counts, page_size, becomes, ends, fresh)
    plan.fork = fork
    plan.copies = copies
    plan.fills = fills
    if not fork:
        plan.lost = [tail for tail, _ in copies]
    return plan


def _peek(free: list[int], first: int, count: int) -> tuple[int, ...]:
    """The next pages of the free stack behind the first ones, which all stay there.

    The null page where the stack is too short: such a plan is only a count.
    """
    last = first + count
    if last > len(free):
        return (0,)
    return (free[-last],) if count == 1 else tuple(free[-first - 1 : -last - 1 : -1])

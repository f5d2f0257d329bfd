"""What a verb that needs pages is going to do, computed before anything changes. No tensors in here."""

from __future__ import annotations


class Plan:
    """What `apply` will do: new tables of the sequences, where new tokens go, pages to copy first.

    Row r gets `counts[r]` new tokens from index `ends[r]` of `tables[r]` on. `copies` pairs (source page, fresh page);
    `fresh` counts the pages taken from the free stack.
    """

    __slots__ = ("copies", "counts", "ends", "fork", "fresh", "lengths", "page_size", "seqs", "starts", "tables")

    def __init__(self, seqs: list[int], counts: list[int], page_size: int, fork: bool) -> None:
        self.seqs, self.counts, self.page_size, self.fork = seqs, counts, page_size, fork
        self.tables: list[tuple[int, ...]] = []
        self.starts: list[int] = []
        self.lengths: list[int] = []
        self.ends: list[int] = []
        self.copies: list[tuple[int, int]] = []
        self.fresh = 0

    @property
    def slots(self) -> list[int]:
        """The slots of the new tokens, row by row."""
        size = self.page_size
        return [
            pages[index // size] * size + index % size
            for pages, end, new in zip(self.tables, self.ends, self.counts)
            for index in range(end, end + new)
        ]

    def run(self) -> tuple[int, int] | None:
        """First page and offset, where row r writes as many tokens at the same offset of page first + r; else None.

        So it is in a tree search, whose children take fresh pages that lie side by side. Such a batch is written as one
        strided block, without an index.
        """
        counts, ends, size = self.counts, self.ends, self.page_size
        if not counts:
            return None
        new, offset = counts[0], ends[0] % size
        first = self.tables[0][-1] if self.tables[0] else 0
        if (
            offset + new > size
            or counts.count(new) != len(counts)
            or [pages[-1:] for pages in self.tables] != [(page,) for page in range(first, first + len(counts))]
            or (ends.count(ends[0]) != len(ends) and any(end % size != offset for end in ends))
        ):
            return None
        return first, offset

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

    def row_pages(self) -> tuple[list[int], int] | None:
        """The page that each row writes to and the offset in it, where all write as many tokens at one offset; or None.

        So it is in a tree search, whose children take a fresh page each.
        """
        counts, ends, size = self.counts, self.ends, self.page_size
        if not counts:
            return None
        new, offset = counts[0], ends[0] % size
        if (
            not 0 < new <= size - offset
            or counts.count(new) != len(counts)
            or (ends.count(ends[0]) != len(ends) and any(end % size != offset for end in ends))
        ):
            return None
        return [pages[-1] for pages in self.tables], offset

"""What a verb that needs pages is going to do, computed before anything changes. No tensors in
here.
"""

from __future__ import annotations

from paged_kv.pages.change import Record


class Plan:
    """What `carry_out` will do: the records that come to be, where new tokens go, pages to copy
    first.

    `becomes[r]` is the record of row r, of the child where the plan forks: with `counts[r]` new
    tokens, from index `ends[r]` of its table on. `copies` pairs (source page, fresh page); `fresh`
    counts the pages taken from the free stack; `lost` are pages that tables hold no longer, where
    rows grow in place.
    """

    __slots__ = (
        "becomes",
        "copies",
        "counts",
        "ends",
        "fork",
        "fresh",
        "lost",
        "page_size",
        "seqs",
    )

    def __init__(self, seqs: list[int], counts: list[int], page_size: int, fork: bool) -> None:
        self.seqs = seqs
        self.counts = counts
        self.page_size = page_size
        self.fork = fork
        self.lost: list[int] = []
        self.becomes: list[Record] = []
        self.ends: list[int] = []
        self.copies: list[tuple[int, int]] = []
        self.fresh = 0

    @property
    def slots(self) -> list[int]:
        """The slots of the new tokens, row by row."""
        size = self.page_size
        return [
            pages[index // size] * size + index % size
            for (pages, _, _, _), end, new in zip(self.becomes, self.ends, self.counts)
            for index in range(end, end + new)
        ]

    def row_pages(self) -> tuple[list[int], int] | None:
        """The page that each row writes to and the offset in it, where all write as many tokens at
        one offset; or None.

        So it is in a tree search, whose children take a fresh page each.
        """
        counts = self.counts
        ends = self.ends
        size = self.page_size
        if not counts:
            return None
        new = counts[0]
        offset = ends[0] % size
        if (
            not 0 < new <= size - offset
            or counts.count(new) != len(counts)
            or (ends.count(ends[0]) != len(ends) and any(end % size != offset for end in ends))
        ):
            return None
        return [record[0][-1] for record in self.becomes], offset

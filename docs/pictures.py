"""The pictures of how_it_works.md, drawn from real caches: `python docs/pictures.py` writes them
into docs/images.

Every token holds its own number as its key. What stands in a slot is therefore read back from the
cache, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from drawing import DEAD, EMPTY, ZERO, Drawing, Point, Table, Token

from paged_kv import PagedKVCache
from paged_kv.tools.reference.dense import DenseOracle

IMAGES = Path(__file__).parent / "images"


class Story:
    """A cache whose sequences have names, and whose tokens say who wrote them."""

    def __init__(self, page_size: int, pages: int) -> None:
        self.cache = PagedKVCache(
            layers=1, heads=1, head_size=1, page_size=page_size, num_pages=pages
        )
        self.seqs: dict[str, int] = {}
        self.kinds: dict[str, str] = {}
        self.written: list[Token] = []

    def new(self, name: str, kind: str, start: int = 0) -> None:
        """An empty sequence."""
        (self.seqs[name],) = self.cache.new(start=start)
        self.kinds[name] = kind

    def fork(self, parent: str, **children: str) -> None:
        """Children of one sequence, by name and kind."""
        handles = self.cache.fork([self.seqs[parent]] * len(children))
        self.seqs.update(zip(children, handles))
        self.kinds.update(children)

    def keys(self, name: str, count: int, after: str) -> torch.Tensor:
        """Keys [1, 1, 1, count, 1] of new tokens that `name` writes where the sequence `after`
        ends.
        """
        (length,) = self.cache.lengths([self.seqs[after]])
        first = len(self.written)
        letter = self.kinds[name][0]
        self.written += [
            Token(f"{letter}{length + index}", self.kinds[name]) for index in range(count)
        ]
        return torch.arange(first, first + count, dtype=torch.float32).reshape(1, 1, 1, count, 1)

    def append(self, name: str, count: int) -> None:
        """Write tokens."""
        kv = self.keys(name, count, after=name)
        self.cache.append([self.seqs[name]], kv, kv)

    def release(self, *names: str) -> None:
        """Let sequences go."""
        self.cache.release([self.seqs.pop(name) for name in names])

    def tokens(self, name: str) -> list[Token]:
        """What a sequence reads."""
        return [
            self.written[int(key)] for key in self.cache.gather([self.seqs[name]]).keys.flatten()
        ]

    def tables(self) -> dict[str, Table]:
        """The block table of every sequence that lives."""
        handles = list(self.seqs.values())
        _, lengths, starts = self.cache.block_tables(handles)
        windows = zip(self.cache.page_tables(handles), starts.tolist(), lengths.tolist())
        return {name: Table(*window) for name, window in zip(self.seqs, windows)}

    def refs(self) -> dict[int, int]:
        """How many tables hold each page."""
        held = [page for table in self.tables().values() for page in table.pages]
        return {page: held.count(page) for page in range(1, self.cache.pages_reserved + 1)}

    def pages(self) -> dict[int, list[Token]]:
        """Every page of the pool with what stands in its slots."""
        size = self.cache.page_size
        tables = self.tables()
        pages = {page: [EMPTY] * size for page in range(1, self.cache.pages_reserved + 1)}
        # slots in front of every window first: other windows may read them
        for table in tables.values():
            if table.pages:
                pages[table.pages[0]][: table.start] = [DEAD] * table.start
        for name, table in tables.items():
            for index, token in enumerate(self.tokens(name), table.start):
                pages[table.pages[index // size]][index % size] = token
        return pages

    def draw(self, drawing: Drawing) -> dict[int, Point]:
        """The block tables, and the pool below them."""
        drawing.tables(self.tables(), self.kinds)
        drawing.gap(6)
        return drawing.pool(self.pages(), self.refs())


def root_of_six() -> Story:
    """Six tokens in pages of four."""
    story = Story(page_size=4, pages=4)
    story.new("root", "root")
    story.append("root", 6)
    return story


def copies() -> Drawing:
    """The problem, and what is done about it."""
    story = Story(page_size=3, pages=4)
    story.new("root", "root")
    story.append("root", 6)
    story.fork("root", left="left", right="right")
    story.append("left", 3)
    story.append("right", 3)
    copies = DenseOracle(layers=1, heads=1, head_size=1)
    (root,) = copies.new()
    copies.append([root], torch.zeros(1, 1, 1, 6, 1), torch.zeros(1, 1, 1, 6, 1))
    children = copies.fork([root, root])
    copies.append(children, torch.zeros(1, 2, 1, 3, 1), torch.zeros(1, 2, 1, 3, 1))
    held = sum(copies.lengths([root, *children]))
    assert held == story.cache.logical_tokens
    drawing = Drawing("Three contexts as tensors of their own, and as pages that are shared")
    drawing.heading("One tensor a node", f"{held} tokens in memory")
    for name in story.seqs:
        drawing.row(name, story.tokens(name))
    drawing.gap(34)
    drawing.heading(
        "Pages of three tokens, and a block table a node",
        f"{story.cache.stored_tokens} tokens in memory",
    )
    story.draw(drawing)
    return drawing


def fork() -> Drawing:
    """Three tables over the same two pages."""
    story = root_of_six()
    drawing = Drawing("A fork: three block tables over the same two pages")
    drawing.heading("A root of six tokens", "page size 4")
    story.draw(drawing)
    drawing.gap()
    story.fork("root", left="left", right="right")
    drawing.heading("fork: two children", "no key and no value was copied")
    story.draw(drawing)
    return drawing


def append() -> Drawing:
    """Copy-on-write."""
    story = root_of_six()
    story.fork("root", left="left", right="right")
    drawing = Drawing(
        "Two appends: the first writes on in the shared, half-filled page, for the second it is "
        "copied first"
    )
    story.append("left", 3)
    assert story.cache.stats.copied_pages == 0
    drawing.heading("append: three tokens to left", "no page copied, one page more")
    story.draw(drawing)
    drawing.gap()
    story.append("right", 1)
    assert story.cache.stats.copied_pages == 1
    drawing.heading("append: one token to right", "one page copied")
    tables = story.tables()
    places = story.draw(drawing)
    drawing.copy(places[tables["root"].pages[1]], places[tables["right"].pages[1]])
    return drawing


def head_offset() -> Drawing:
    """The same tree with its root moved by a slot, and not."""
    drawing = Drawing(
        "A root of five tokens whose children add two, with and without a head offset"
    )
    for start in (0, 1):
        drawing.gap(18 * start)
        story = Story(page_size=2, pages=5 if start else 6)
        story.new("root", "root", start)
        story.append("root", 5)
        story.fork("root", left="left", right="right")
        story.append("left", 2)
        story.append("right", 2)
        copied = story.cache.stats.copied_pages
        used = story.cache.pages_in_use
        pages = "1 page" if copied == 1 else f"{copied} pages"
        drawing.heading(f"new(start={start})", f"{pages} copied, {used} pages in use")
        story.draw(drawing)
    return drawing


def slide() -> Drawing:
    """A window that moves on while its parent stays."""
    story = Story(page_size=2, pages=5)
    story.new("root", "root", 1)
    story.append("root", 5)
    story.fork("root", left="left")
    story.append("left", 2)
    drawing = Drawing("A slide: the front page falls out of one window, and stays in the other")
    drawing.heading("A root, and a child with two tokens more", "page size 2")
    story.draw(drawing)
    drawing.gap()
    story.cache.slide([story.seqs["left"]], 2)
    drawing.heading("slide: left drops its first two tokens", "nothing moves, nothing is written")
    story.draw(drawing)
    drawing.gap()
    freed = story.cache.pages_freed_by([story.seqs["root"]])
    story.release("root")
    drawing.heading("release: root", f"pages that come back: {freed}")
    story.draw(drawing)
    return drawing


def step() -> Drawing:
    """What a model step reads and writes."""
    story = Story(page_size=2, pages=8)
    for name, kind, length in (("root", "root", 5), ("top", "third", 3)):
        story.new(name, kind, start=1)
        story.append(name, length)
    drawing = Drawing(
        "A model step: contexts are gathered into a dense batch, new tokens stored in pages of "
        "children"
    )
    drawing.heading("Before", "page size 2")
    story.draw(drawing)
    drawing.gap()
    parents = ["root", "root", "top"]
    batch = story.cache.open([story.seqs[name] for name in parents], room=2)
    children = {"left": "left", "right": "right", "tip": "third"}
    story.kinds.update(children)
    fresh = torch.cat(
        [story.keys(name, 2, after=parent)[0] for name, parent in zip(children, parents)]
    )
    batch.update(0, fresh, fresh)
    drawing.heading("open, and the model has run", "one read for all layers and rows")
    columns = batch.keys(0)[:, 0, :, 0]
    mask = batch.mask()
    for row, name in enumerate(parents):
        shown = [
            story.written[int(key)] if kept else ZERO for key, kept in zip(columns[row], mask[row])
        ]
        drawing.row(f"row {row}: {name}", shown, new=2)
    drawing.note("0: padding, masked. Thick edges: what the model has just written.")
    drawing.gap()
    story.seqs.update(zip(children, batch.commit()))
    drawing.heading("commit: three children", "one write; the parents are as they were")
    story.draw(drawing)
    return drawing


def positions() -> Drawing:
    """Where tokens were written, and where each window reads them."""
    story = Story(page_size=2, pages=4)
    story.new("root", "root")
    story.append("root", 6)
    story.kinds["left"] = "left"
    tokens = story.keys("left", 2, after="root")
    batch = story.cache.open([story.seqs["root"]], room=2)
    batch.update(0, tokens[0], tokens[0])
    (story.seqs["left"],) = batch.commit(slide=2)
    drawing = Drawing("Positions: stored once beside each token, and moved when a window is read")
    drawing.heading("A root, and a child that slid by two and wrote two", "page size 2")
    batch = story.cache.open(list(story.seqs.values()), room=0)  # to be read alone
    for row, name in enumerate(story.seqs):
        drawing.row(name, story.tokens(name))
        drawing.numbers("written at", batch.then[row].tolist())
        drawing.numbers("read at", batch.now[row].tolist())
        drawing.gap(8)
    drawing.pool(story.pages(), story.refs())
    return drawing


def promote() -> Drawing:
    """A search whose root moves on."""
    story = Story(page_size=2, pages=7)
    story.new("root", "root")
    story.append("root", 4)
    story.fork("root", left="left", right="right")
    story.append("left", 2)
    story.append("right", 2)
    story.fork("right", deeper="third")
    story.append("deeper", 2)
    drawing = Drawing("promote: the chosen child and what descends from it stay")
    drawing.heading("A tree: root, left and right, deeper below right", "page size 2")
    story.draw(drawing)
    drawing.gap()
    assert story.cache.promote(story.seqs["right"]) == 1
    del story.seqs["left"]
    story.release("root")
    drawing.heading("promote(right), then release(root)", "the pages that right needs stay")
    story.draw(drawing)
    story.cache.check()
    return drawing


SCENES: list[Callable[[], Drawing]] = [
    copies,
    fork,
    append,
    head_offset,
    slide,
    step,
    positions,
    promote,
]


def main() -> None:
    """Write every picture."""
    IMAGES.mkdir(exist_ok=True)
    for scene in SCENES:
        (IMAGES / f"{scene.__name__}.svg").write_text(scene().svg())


if __name__ == "__main__":
    main()

"""Block tables and pages as SVG, legible in light and dark.

These are diagrams, not charts: boxes with words in them, whose places mean nothing on any axis. So
they are drawn by hand here, while everything with axes is a chart of altair (see
`paged_kv/tools/html/picture.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

WIDTH = 560
MARGIN = 18
# a slot's width and height, the gap between pages
SLOT = 27
TALL = 27
GAP = 11
NAME = 92  # room for the names in front of rows


class Slot(NamedTuple):
    """The colours of a slot."""

    fill: str
    edge: str


class Scheme(NamedTuple):
    """Colours for light or for dark: of the sheet, of words, of fainter words, and of what each
    kind of sequence wrote.
    """

    paper: str
    ink: str
    faint: str
    kinds: Mapping[str, Slot]


LIGHT = Scheme(
    paper="#ffffff",
    ink="#1d2530",
    faint="#69737f",
    kinds={
        "root": Slot("#d3e5fa", "#2f6db0"),
        "left": Slot("#fde2c0", "#b8690f"),
        "right": Slot("#cfeede", "#23805a"),
        "third": Slot("#e9dbf6", "#7a48a8"),
    },
)
DARK = Scheme(
    paper="#14181e",
    ink="#e4e8ee",
    faint="#98a2ae",
    kinds={
        "root": Slot("#1d4369", "#74aee6"),
        "left": Slot("#67400f", "#eaad63"),
        "right": Slot("#145039", "#63cb9e"),
        "third": Slot("#4a2d69", "#c09ae4"),
    },
)


class Token(NamedTuple):
    """What stands in a slot: a label, and who wrote it."""

    label: str
    kind: str


EMPTY = Token("", "empty")
DEAD = Token("", "dead")
ZERO = Token("0", "zero")


class Point(NamedTuple):
    """A place in a picture."""

    x: float
    y: float


class Table(NamedTuple):
    """A block table: its pages, the slot of the first one where its tokens begin, and how many."""

    pages: Sequence[int]
    start: int
    length: int


def _scheme(scheme: Scheme) -> str:
    paper, ink, faint, kinds = scheme
    rules = [
        f".paper{{fill:{paper}}} text{{fill:{ink}}} .faint{{fill:{faint}}}",
        f".empty,.zero{{fill:none;stroke:{faint}}} .dead{{fill:url(#hatch);stroke:{faint}}}",
        f".rule{{stroke:{faint}}} .arrow{{stroke:{ink}}} .tip{{fill:{ink}}} .page{{stroke:{ink}}}",
    ]
    rules += [f".{kind}{{fill:{fill};stroke:{edge}}}" for kind, (fill, edge) in kinds.items()]
    return " ".join(rules)


STYLE = (
    "text{font:14px system-ui,-apple-system,'Segoe UI',sans-serif} .small{font-size:12px} "
    ".head{font-weight:600}"
    " .mid{text-anchor:middle} .end{text-anchor:end}"
    " .page{fill:none;stroke-width:1.6} .free{stroke-dasharray:4 4;opacity:.5}"
    " .empty,.zero{stroke-dasharray:2 3} .arrow{fill:none;stroke-width:1.6} .new{stroke-width:2.6}"
    f" {_scheme(LIGHT)} @media (prefers-color-scheme:dark){{{_scheme(DARK)}}}"
)


class Drawing:
    """A picture that grows downwards: each call draws below what is there."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.y = 2 * MARGIN
        self.parts: list[str] = []

    def text(self, x: float, y: float, words: str, look: str = "") -> None:
        """Words, their base line at `y`."""
        self.parts.append(f'<text x="{x:g}" y="{y:g}"{_class(look)}>{escape(words)}</text>')

    def box(self, x: float, y: float, wide: float, look: str, tall: float = TALL) -> None:
        """A box with its corner at (x, y)."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{wide:g}" height="{tall:g}" rx="3"{_class(look)}/>'
        )

    def slot(self, x: float, y: float, token: Token, look: str = "") -> None:
        """One token in its slot."""
        self.box(x, y, SLOT, f"{token.kind} {look}".strip())
        if token.label:
            self.text(
                x + SLOT / 2,
                y + TALL - 9,
                token.label,
                "small mid" + (" faint" if token == ZERO else ""),
            )

    def heading(self, words: str, says: str) -> None:
        """The head of the next part, and what to see in it on a fainter line."""
        self.text(MARGIN, self.y, words, "head")
        self.text(MARGIN, self.y + 18, says, "small faint")
        self.y += 32

    def note(self, words: str) -> None:
        """A fainter line."""
        self.text(MARGIN, self.y + 9, words, "small faint")
        self.y += 24

    def gap(self, by: float = 18) -> None:
        """Room before the next part."""
        self.y += by

    def row(self, name: str, tokens: Sequence[Token], new: int = 0) -> None:
        """A name, and tokens side by side; the last `new` of them with a thick edge."""
        self.text(MARGIN, self.y + TALL - 9, name)
        x = MARGIN + NAME
        for index, token in enumerate(tokens):
            self.slot(x, self.y, token, "new" if index >= len(tokens) - new else "")
            x += SLOT
        self.y += TALL + 7

    def numbers(self, name: str, values: Sequence[int | str]) -> None:
        """A name, and numbers in the columns of `row`."""
        self.text(MARGIN, self.y + 12, name, "small faint")
        for index, value in enumerate(values):
            self.text(MARGIN + NAME + (index + 0.5) * SLOT, self.y + 12, str(value), "small mid")
        self.y += 22

    def pool(
        self, pages: Mapping[int, Sequence[Token]], refs: Mapping[int, int]
    ) -> dict[int, Point]:
        """Pages with their slots, number above and references below; returns the middle of the
        bottom of each.
        """
        x = float(MARGIN)
        places = {}
        for page, tokens in pages.items():
            wide = SLOT * len(tokens)
            if x + wide > WIDTH - MARGIN:
                x = float(MARGIN)
                self.y = self.y + TALL + 48
            if refs[page]:
                self.page(x, str(page), tokens, refs[page])
            else:
                self.free_page(x, tokens)
            places[page] = Point(x + wide / 2, self.y + TALL + 36)
            x += wide + GAP
        self.y += TALL + 48
        return places

    def page(self, x: float, name: str, tokens: Sequence[Token], held: int) -> None:
        """A page that so many sequences hold, its left edge at `x`."""
        middle = x + SLOT * len(tokens) / 2
        self.text(middle, self.y + 10, name, "small mid")
        self._slots(x, tokens, "page")
        words = f"held by {held}" if len(tokens) > 2 else f"by {held}"
        self.text(middle, self.y + TALL + 32, words, "small mid faint")

    def free_page(self, x: float, tokens: Sequence[Token]) -> None:
        """A page that nobody holds."""
        self.text(x + SLOT * len(tokens) / 2, self.y + 10, "free", "small mid faint")
        self._slots(x, tokens, "page free")

    def _slots(self, x: float, tokens: Sequence[Token], look: str) -> None:
        top = self.y + 16
        for index, token in enumerate(tokens):
            self.slot(x + index * SLOT, top, token)
        self.box(x, top, SLOT * len(tokens), look)

    def tables(self, tables: Mapping[str, Table], kinds: Mapping[str, str]) -> None:
        """Block tables: a name, the numbers of its pages, and in words where its tokens are."""
        for name, (pages, start, length) in tables.items():
            self.text(MARGIN, self.y + TALL - 9, name)
            x = MARGIN + NAME
            for page in pages:
                self.box(x, self.y, SLOT, kinds[name])
                self.text(x + SLOT / 2, self.y + TALL - 9, str(page), "small mid")
                x += SLOT + 4
            offset = f", from slot {start} of the first page" if start else ""
            self.text(x + 8, self.y + TALL - 9, f"{length} tokens{offset}", "small faint")
            self.y += TALL + 7

    def copy(self, source: Point, target: Point) -> None:
        """An arrow below the pool from a page to its copy."""
        x, y = source
        to = target.x
        low = y + 24
        self.parts.append(
            f'<path d="M{x:g} {y:g}C{x:g} {low:g} {to:g} {low:g} {to:g} {y + 5:g}" class="arrow"/>'
        )
        self.parts.append(f'<path d="M{to:g} {y - 1:g}l-5 9h10z" class="tip"/>')
        self.text((x + to) / 2, low + 10, "copied", "small mid")
        self.y += 26

    def svg(self) -> str:
        """The picture as a document."""
        tall = self.y + 4
        hatch = (
            '<pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" '
            'patternTransform="rotate(45)">'
            '<path d="M0 0v6" class="rule" stroke-width="1.4"/></pattern>'
        )
        return (
            "\n".join(
                [
                    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {tall:g}" '
                    f'width="{WIDTH}" height="{tall:g}" '
                    'role="img">',
                    f"<title>{escape(self.title)}</title><style>{STYLE}</style><defs>{hatch}</defs>",
                    f'<rect width="{WIDTH}" height="{tall:g}" rx="8" class="paper"/>',
                    *self.parts,
                    "</svg>",
                ]
            )
            + "\n"
        )


def _class(look: str) -> str:
    return f' class="{look}"' if look else ""

"""Colours, dashes and sizes of the charts.

A chart names its colours as CSS variables, such as `var(--paged)`, and `COLOURS` says what they are
in light and in dark: so it is drawn once and follows the scheme by itself. The colours are chosen
so that colour-blind readers tell them apart (after Okabe and Ito, and a ramp of one direction in
lightness), and lines differ by their dashes, too.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Colour(NamedTuple):
    """One colour in both schemes."""

    light: str
    dark: str


COLOURS = {
    "back": Colour("#f6f7f9", "#10151b"),
    "sheet": Colour("#ffffff", "#182029"),
    "text": Colour("#1b2430", "#e8edf3"),
    "muted": Colour("#5a6675", "#a3afbd"),
    "line": Colour("#aab4c0", "#596675"),
    "grid": Colour("#e4e8ed", "#2a3541"),
    "accent": Colour("#0b5cad", "#7cbcf5"),
    "good": Colour("#0a6b4a", "#5fd3a5"),
    "bad": Colour("#a8321b", "#ff9d85"),
    "mark": Colour("#d0006f", "#ff6fbf"),
    "paged": Colour("#0072b2", "#56b4e9"),
    "paged-2": Colour("#3a3f9e", "#a6b2ff"),
    "other": Colour("#d55e00", "#f5934a"),
    "other-2": Colour("#8a5a00", "#e0c060"),
    "unique": Colour("#1b2430", "#f2f5f8"),
    "dense": Colour("#a94c86", "#e39cc8"),
    "reserved": Colour("#8b95a1", "#8c98a6"),
    "shared": Colour("#008a63", "#3fcf9f"),
    "cache": Colour("#7a4fb5", "#b493e6"),
    "rest": Colour("#cfd6de", "#3d4a58"),
    "ramp-1": Colour("#c4e6ae", "#2c4486"),
    "ramp-2": Colour("#86cfb9", "#2a73ad"),
    "ramp-3": Colour("#41abc6", "#2fa3b8"),
    "ramp-4": Colour("#2181ba", "#6ccbaa"),
    "ramp-5": Colour("#24509c", "#bfe79a"),
    "ramp-6": Colour("#101f5c", "#fdfbc0"),
}

# How many sequences hold a page, in the steps of a recording's `pages_by_refs`: upper bound, label,
# colour.
BINS = ((1, "1"), (2, "2"), (4, "3-4"), (8, "5-8"), (16, "9-16"), (None, "17+"))
BIN_LABELS = [label for _, label in BINS]
BIN_COLOURS = [f"var(--ramp-{step})" for step in range(1, len(BINS) + 1)]

SOLID = [1, 0]
LONG = [10, 4]
SHORT = [6, 3]
DOTS = [2, 2]
HEIGHT = 250

CONFIG: dict[str, Any] = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "gridColor": "var(--grid)",
        "tickColor": "var(--grid)",
        "domainColor": "var(--line)",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titlePadding": 8,
        "labelOverlap": "greedy",
        "labelSeparation": 6,
    },
    "legend": {
        "orient": "bottom",
        "columns": {"signal": "width < 420 ? 1 : width < 720 ? 2 : 4"},
        "offset": 12,
        "labelColor": "var(--text)",
        "titleColor": "var(--muted)",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "labelLimit": 200,
        "titleLimit": 320,
        "symbolSize": 120,
    },
    "line": {"strokeWidth": 2, "strokeJoin": "round"},
    "text": {"color": "var(--text)", "fontSize": 12},
}


def variables() -> str:
    """The CSS that sets all colours: as the reader's system wants them, or as the page was told
    to.
    """
    light = " ".join(f"--{name}: {colour.light};" for name, colour in COLOURS.items())
    dark = " ".join(f"--{name}: {colour.dark};" for name, colour in COLOURS.items())
    return (
        f":root {{ color-scheme: light; {light} }}\n"
        "@media (prefers-color-scheme: dark) { "
        f':root:not([data-scheme="light"]) {{ color-scheme: dark; {dark} }} }}\n'
        f':root[data-scheme="dark"] {{ color-scheme: dark; {dark} }}\n'
    )


def bin_of(holders: int) -> str:
    """The label of a number of holders.

    >>> [bin_of(n) for n in (1, 3, 16, 40)]
    ['1', '3-4', '9-16', '17+']
    """
    return next(label for bound, label in BINS if bound is None or holders <= bound)

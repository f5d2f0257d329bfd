"""Colours, dashes and sizes of the charts.

Colours are names of CSS variables, which page.css sets once for light and once for dark: a chart is
drawn once and follows the scheme by itself. They are chosen so that colour-blind readers tell them
apart (after Okabe and Ito, and a ramp of one direction in lightness), and lines differ by their
dashes, too.
"""

from __future__ import annotations

from typing import Any

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


def bin_of(holders: int) -> str:
    """The label of a number of holders.

    >>> [bin_of(n) for n in (1, 3, 16, 40)]
    ['1', '3-4', '9-16', '17+']
    """
    return next(label for bound, label in BINS if bound is None or holders <= bound)

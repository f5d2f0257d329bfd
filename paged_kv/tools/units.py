"""Numbers as people read them."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes for people.

    >>> size(512), size(1536), size(10_321_920)
    ('512 B', '1.5 KiB', '9.8 MiB')
    """
    value = float(count)
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value = value / 1024
        units = units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def micros(value: float) -> str:
    """Microseconds, with thousands separated.

    >>> micros(21115.2), micros(7.25)
    ('21,115 us', '7.2 us')
    """
    return f"{value:,.0f} us" if value >= 100 else f"{value:.1f} us"


def count(value: float) -> str:
    """A count or an average of counts.

    >>> count(1720), count(2.04)
    ('1,720', '2.04')
    """
    return f"{value:,.0f}" if float(value).is_integer() or value >= 1000 else f"{value:.3g}"

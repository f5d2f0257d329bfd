"""What callers of a pool give, checked and as it is sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from paged_kv.checks import listed
from paged_kv.errors import BadArgument

TOKENS = "a list of token ids"


def options_of_lm(options: Any) -> dict[str, Any]:
    """Options of each `PagedLM`."""
    if options is None:
        return {}
    if not isinstance(options, Mapping) or "progress" in options:
        raise BadArgument("options", options, "a dictionary of options of PagedLM but `progress`")
    return dict(options)


def token_rows(name: str, given: Iterable[Any]) -> list[Any]:
    """Rows of tokens that can be sent; texts as they are."""
    rows = listed(name, given, "a list of rows of tokens")
    return [row if isinstance(row, str) else listed("tokens", row, TOKENS) for row in rows]

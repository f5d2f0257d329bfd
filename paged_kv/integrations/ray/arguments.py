"""What callers of a pool give, checked and as it is sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from paged_kv.checks import listed
from paged_kv.errors import BadArgument


def options_of_lm(options: Any) -> dict[str, Any]:
    """Options of each `PagedLM`."""
    if options is None:
        return {}
    if not isinstance(options, Mapping) or "progress" in options:
        raise BadArgument("options", options, "a dictionary of options of PagedLM but `progress`")
    return dict(options)


def row(tokens: Any) -> Any:
    """A row of tokens that can be sent; a text as it is."""
    return tokens if isinstance(tokens, str) else listed("tokens", tokens, "a list of token ids")


def rows(token_lists: Iterable[Any]) -> list[Any]:
    """Rows of tokens that can be sent."""
    return [row(each) for each in listed("token_lists", token_lists, "a list of rows of tokens")]

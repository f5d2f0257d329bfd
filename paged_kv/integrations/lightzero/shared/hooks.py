"""Methods of LightZero's classes, with something of ours around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MARK = "has_paged_kv_hook"

Method = Callable[..., Any]


def put_around(owner: type, name: str, around: Callable[[Method], Method]) -> None:
    """Replace a method that a class defines by `around(method)`, once.

    Wrappers of others may lie inside and outside: `functools.wraps` hands the mark on. One that
    does not gets a second hook around it, so hooks have to bear being nested.
    """
    method = vars(owner).get(name)
    if method is None or hasattr(method, MARK):
        return
    hooked = around(method)
    setattr(hooked, MARK, True)
    setattr(owner, name, hooked)

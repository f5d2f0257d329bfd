"""The storage that a caller chose by a word."""

from __future__ import annotations

from paged_kv.checks import choice
from paged_kv.pages.buffers import Form
from paged_kv.pages.quantised import QuantisedPages
from paged_kv.pages.storage import PagePlanes, Storage, planes_of

EXACT = "exact"
INT8 = "int8"
KINDS = (EXACT, INT8)


def make_storage(kind: str, form: Form) -> Storage:
    """Pages of that kind, of which the null page is there. Raises BadArgument."""
    if choice("storage", kind, KINDS) == INT8:
        return QuantisedPages(form)
    return PagePlanes(form, planes_of(form))

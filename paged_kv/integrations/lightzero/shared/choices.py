"""What a user chooses when a model is put on pages; `attach` explains each."""

from __future__ import annotations

from typing import NamedTuple

from paged_kv.errors import BadCount
from paged_kv.pages.kinds import EXACT, INT8, KINDS

CHOICES = {
    "at": ("read", "write"),
    "keys": ("node", "latent"),
    "padding": ("masked", "attended"),
    "window": ("cached", "exact"),
    "weights": ("keep", "drop", "refuse"),
    "eviction": ("search", "lru", "fifo"),
    "step": ("lightzero", "lean"),
    "linears": ("torch", "packed"),
    "attention": ("gathered", "pages"),
    "storage": KINDS,
    "compile": (False, True),
}


class Choices(NamedTuple):
    """One of each."""

    at: str = "read"
    keys: str = "node"
    padding: str = "masked"
    window: str = "cached"
    weights: str = "keep"
    eviction: str = "search"
    step: str = "lean"
    linears: str = "torch"
    attention: str = "gathered"
    storage: str = EXACT
    compile: bool = False

    def check(self) -> None:
        """Raise BadCount for an unknown choice, and where two do not go together."""
        for name, value in self._asdict().items():
            if value not in CHOICES[name]:
                raise BadCount(name, value, " or ".join(map(repr, CHOICES[name])))
        if self.storage == INT8 and self.at == "write":
            allowed = f"'read' where storage is {INT8!r}: a window would be rounded at every slide"
            raise BadCount("at", self.at, allowed)
        if self.compile:
            self._only("compile is True", step="lean")
        if self.attention == "pages":
            self._only("attention is 'pages'", step="lean", compile=False, storage=EXACT)
        if self.window == "exact":
            self._only("window is 'exact'", at="read", padding="masked", attention="gathered")

    def _only(self, where: str, **allowed: str | bool) -> None:
        """Raise BadCount where a choice is another than the one that goes with `where`."""
        for name, only in allowed.items():
            value = getattr(self, name)
            if value != only:
                raise BadCount(name, value, f"{only!r} where {where}")

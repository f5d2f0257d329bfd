"""What a user chooses when a model is put on pages; `attach` explains each."""

from __future__ import annotations

from typing import NamedTuple

from paged_kv.errors import BadCount

CHOICES = {
    "at": ("read", "write"),
    "keys": ("node", "latent"),
    "padding": ("masked", "attended"),
    "window": ("cached", "exact"),
    "weights": ("keep", "drop", "refuse"),
    "eviction": ("search", "lru", "fifo"),
    "step": ("lightzero", "lean"),
    "linears": ("torch", "packed"),
}


class Choices(NamedTuple):
    """One of each."""

    at: str = "read"
    keys: str = "node"
    padding: str = "masked"
    window: str = "cached"
    weights: str = "keep"
    eviction: str = "search"
    step: str = "lightzero"
    linears: str = "torch"

    def check(self) -> None:
        """Raise BadCount for an unknown choice, and where two do not go together."""
        for name, value in self._asdict().items():
            if value not in CHOICES[name]:
                raise BadCount(name, value, " or ".join(map(repr, CHOICES[name])))
        if self.window == "exact":
            for name, value, only in (("at", self.at, "read"), ("padding", self.padding, "masked")):
                if value != only:
                    raise BadCount(name, value, f"{only!r} where window is 'exact'")

"""What is searched, in numbers: the shape of the model, the windows and the search. Checked when it
is made.
"""

from __future__ import annotations

from dataclasses import dataclass

from paged_kv.checks import choice
from paged_kv.errors import BadCount, BadDtype

DTYPES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}  # bytes
STORAGES = ("exact", "int8")  # of pages
PEAK = 2  # bytes of the scale of a row of codes
MOST = 2**31 - 1  # of any count
MOST_BYTES = 2**63 - 1  # of a tensor
LONGEST_PAGE = 256
SHORTEST_CONTEXT = 3  # a window of two tokens or less is dropped at every step


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One search load; see `estimate` for the fields. Raises BadCount, BadDtype, BadArgument."""

    layers: int
    heads: int
    head_size: int
    context: int
    envs: int
    simulations: int
    kv_heads: int | None = None
    value_head_size: int | None = None
    dtype: str = "float32"
    storage: str = "exact"
    tokens_per_step: int = 2
    root_tokens: int | None = None
    root_steps: int | None = None
    ring_simulations: int | None = None
    max_cache_size: int = 5000

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "head_size", "envs", "simulations", "max_cache_size"):
            check(name, getattr(self, name), 1)
        check("context", self.context, SHORTEST_CONTEXT)
        check("tokens_per_step", self.tokens_per_step, 1, self.context - 1, "context - 1")
        for name in ("kv_heads", "value_head_size", "root_steps", "ring_simulations"):
            if getattr(self, name) is not None:
                check(name, getattr(self, name), 1)
        if self.root_tokens is not None:
            check("root_tokens", self.root_tokens, 1, self.context - 1, "context - 1")
        if self.heads % self.stored_heads:
            raise BadCount("kv_heads", self.kv_heads, f"a divisor of heads = {self.heads}")
        if self.dtype not in DTYPES:
            raise BadDtype("the cache", repr(self.dtype), ", ".join(DTYPES))
        choice("storage", self.storage, STORAGES)

    @property
    def stored_heads(self) -> int:
        """Heads of keys and values."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def token_bytes(self) -> int:
        """Bytes of one token: K and V of all layers."""
        return self._numbers * DTYPES[self.dtype]

    @property
    def stored_token_bytes(self) -> int:
        """Bytes of one token in pages."""
        if self.storage == "exact":
            return self.token_bytes
        rows = self.layers * self.stored_heads * 2
        return self._numbers + rows * PEAK

    @property
    def _numbers(self) -> int:
        """Numbers of one token: K and V of all layers."""
        value_size = self.head_size if self.value_head_size is None else self.value_head_size
        return self.layers * self.stored_heads * (self.head_size + value_size)

    @property
    def ring(self) -> int:
        """Simulations that LightZero's ring of search nodes has places for, in each environment."""
        return max(50, self.simulations) if self.ring_simulations is None else self.ring_simulations

    @property
    def first_tokens(self) -> int:
        """Tokens of the first root of an episode: an observation, which no action precedes."""
        return max(1, self.tokens_per_step - 1)

    def window(self, steps: int | None = None) -> int:
        """Tokens of a root's window after so many root steps; of one that has stopped growing
        (None).

        A window that reaches context - 1 tokens loses those of its oldest step.
        """
        if self.root_tokens is not None:
            return self.root_tokens
        most = max(0, (self.context - 2 - self.first_tokens) // self.tokens_per_step)
        return self.first_tokens + self.tokens_per_step * (
            most if steps is None else min(most, steps - 1)
        )


def check(name: str, value: object, low: int, high: int = MOST, meaning: str = "") -> None:
    """Raise BadCount unless `value` is a whole number in [low, high]."""
    if type(value) is not int or not low <= value <= high:
        top = f"{meaning} = {high}" if meaning else f"{high}"
        raise BadCount(name, value, f"an int from {low} to {top}")

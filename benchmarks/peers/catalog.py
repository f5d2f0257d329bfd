"""All peers, as far as their libraries are installed."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from .peer import Peer

# Name of the row; module and class of its tables and of its K/V, where it has the one and the
# other.
ROWS = (
    ("paged_kv", "paged", "PagedTables", "PagedCache"),
    ("python floor", "floors", "PythonFloor", ""),
    ("numpy floor", "floors", "NumpyTables", "NumpyFloor"),
    ("vLLM BlockPool", "vllm_pool", "VllmPoolPeer", ""),
    ("HF paged cache", "huggingface", "PagedAttentionPeer", "PagedAttentionPeer"),
    ("torch PagedAttention", "torch_paged", "", "TorchPagedPeer"),
    ("HF DynamicCache, deep copy", "huggingface", "DynamicCachePeer", "DynamicCachePeer"),
    ("LightZero deep copy", "lightzero", "LightZeroPeer", "LightZeroPeer"),
)


@dataclass(frozen=True)
class Row:
    """One peer: the classes that keep its tables and its K/V, or why there are none."""

    name: str
    tables: type[Peer] | None
    contents: type[Peer] | None
    missing: str = ""

    @property
    def kind(self) -> type[Peer] | None:
        """Any of its classes."""
        return self.tables or self.contents


def row(name: str, module: str, tables: str, contents: str) -> Row:
    """Load one peer."""
    try:
        loaded = importlib.import_module(f".{module}", __package__)
    except ImportError as error:
        return Row(name, None, None, f"not installed ({error})")
    found = [getattr(loaded, kind) if kind else None for kind in (tables, contents)]
    return Row(name, *found)


def rows() -> list[Row]:
    """Every peer, in the order of the tables."""
    return [row(*entry) for entry in ROWS]

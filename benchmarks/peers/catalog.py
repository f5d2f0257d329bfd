"""All peers, as far as their libraries are installed."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import NamedTuple

from .peer import Peer


class Entry(NamedTuple):
    """Name of a row, module of the peer, and the classes of its tables and of its K/V, where it has
    the one and the other.
    """

    name: str
    module: str
    tables: str = ""
    contents: str = ""


ROWS = (
    Entry("paged_kv", "paged", "PagedTables", "PagedCache"),
    Entry("python floor", "floors", "PythonFloor"),
    Entry("numpy floor", "floors", "NumpyTables", "NumpyFloor"),
    Entry("vLLM BlockPool", "vllm_pool", "VllmPoolPeer"),
    Entry("HF paged cache", "huggingface", "PagedAttentionPeer", "PagedAttentionPeer"),
    Entry("torch PagedAttention", "torch_paged", contents="TorchPagedPeer"),
    Entry("HF DynamicCache, deep copy", "huggingface", "DynamicCachePeer", "DynamicCachePeer"),
    Entry("LightZero deep copy", "lightzero", "LightZeroPeer", "LightZeroPeer"),
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


def row(entry: Entry) -> Row:
    """Load one peer."""
    try:
        loaded = importlib.import_module(f".{entry.module}", __package__)
    except ImportError as error:
        return Row(entry.name, None, None, f"not installed ({error})")
    tables = getattr(loaded, entry.tables) if entry.tables else None
    contents = getattr(loaded, entry.contents) if entry.contents else None
    return Row(entry.name, tables, contents)


def rows() -> list[Row]:
    """Every peer, in the order of the tables."""
    return [row(entry) for entry in ROWS]

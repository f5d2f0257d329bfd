"""Linear layers of few rows, on the CPU: weights packed once, read faster."""

from paged_kv.linears.packed import PackedLinears

__all__ = ["PackedLinears"]

"""Where cold pages lie: on the host, or in a file.

>>> import tempfile, torch
>>> from paged_kv import PagedKVCache
>>> from paged_kv.tiers import FileTier, Tiers
>>> tiers = Tiers(frames=4, cold=FileTier(tempfile.mkdtemp()))
>>> cache = PagedKVCache(layers=1, heads=1, head_size=2, page_size=2, tiers=tiers)
>>> seqs = cache.new(10)
>>> kv = torch.randn(1, 10, 1, 3, 2)
>>> for seq, own in zip(seqs, kv.split(1, dim=1)):
...     cache.append([seq], own, own)
>>> torch.equal(cache.gather(seqs[:2]).keys, kv[:, :2]), cache.pages_in_use
(True, 20)
>>> [(tier.name, tier.pages) for tier in cache.tiers]
[('frames', 4), ('file', 20)]
"""

from paged_kv.pages.tiers.contract import (
    Candidates,
    ColdTier,
    FramePolicy,
    LeavesFirst,
    RecordCodec,
    Tiers,
)
from paged_kv.pages.tiers.file import FileTier
from paged_kv.pages.tiers.host import HostTier

__all__ = [
    "Candidates",
    "RecordCodec",
    "ColdTier",
    "FileTier",
    "FramePolicy",
    "HostTier",
    "LeavesFirst",
    "Tiers",
]

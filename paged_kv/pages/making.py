"""A pool of the sizes that a caller names, once all of them were checked."""

from __future__ import annotations

from typing import NamedTuple

import torch

from paged_kv.checks import amount, flag, limit
from paged_kv.errors import BadDevice, BadDtype
from paged_kv.pages.buffers import Form, Part
from paged_kv.pages.kinds import make_storage
from paged_kv.pages.pool import Pool
from paged_kv.pages.tiers.checks import checked_tiers
from paged_kv.pages.tiers.contract import Tiers

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Sizes(NamedTuple):
    """What a token takes, and how many a page holds."""

    layers: int
    heads: int
    head_size: int
    value_head_size: int | None  # None: as `head_size`
    page_size: int


class Bounds(NamedTuple):
    """How many pages there are, and may be."""

    num_pages: int
    max_pages: int | None
    max_bytes: int | None
    grow: bool


def make_pool(
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device | str,
    bounds: Bounds,
    storage: str,
    tiers: Tiers | None = None,
) -> Pool:
    """A pool with memory for its first pages, of a storage of that kind.

    Raises BadCount, BadArgument, BadDtype, BadDevice.
    """
    parts = _parts(sizes)
    page_size = amount("page_size", sizes.page_size, 1)
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        allowed = (
            "torch.float32, float64, float16 or bfloat16, in which tokens come and go; "
            'storage="int8" keeps them in a byte a number'
        )
        raise BadDtype("the cache", dtype, allowed)
    num_pages = amount("num_pages", bounds.num_pages, 1)
    allowed = f"None or an int >= num_pages = {num_pages}"
    most = limit("max_pages", bounds.max_pages, num_pages, allowed)
    bytes_allowed = limit("max_bytes", bounds.max_bytes, 0, "None or an int >= 0")
    growing = flag("grow", bounds.grow)
    held = make_storage(storage, Form(parts, page_size, dtype, _device(device)))
    if bytes_allowed is not None:
        least = num_pages * held.page_bytes
        allowed = f"None or an int >= num_pages * page_bytes = {least}"
        limit("max_bytes", bounds.max_bytes, least, allowed)
        pages_allowed = bytes_allowed // held.page_bytes
        most = pages_allowed if most is None else min(most, pages_allowed)
    return Pool(held, num_pages, most if growing else num_pages, checked_tiers(tiers))


def _parts(sizes: Sizes) -> list[Part]:
    """What a dense batch takes of K and V: one plane for both where they are of one size. Raises
    BadCount.
    """
    layers = amount("layers", sizes.layers, 1)
    heads = amount("heads", sizes.heads, 1)
    head_size = amount("head_size", sizes.head_size, 1)
    value_head_size = head_size
    if sizes.value_head_size is not None:
        value_head_size = amount("value_head_size", sizes.value_head_size, 1)
    if head_size == value_head_size:
        return [Part(2 * layers, heads, head_size)]
    return [Part(layers, heads, head_size), Part(layers, heads, value_head_size)]


def _device(device: torch.device | str) -> torch.device:
    """A device that torch can put a tensor on, with its number. Raises BadDevice."""
    allowed = "a device of this machine that holds data, as 'cpu' or 'cuda:0'"
    if not isinstance(device, (str, torch.device)):
        raise BadDevice("the cache", device, allowed)
    try:
        where = torch.device(device)
        found = torch.empty(1, device=where).device
    except Exception as error:  # torch has many kinds for what is not there
        raise BadDevice("the cache", device, allowed) from error
    if where.type == "meta":
        raise BadDevice("the cache", device, allowed)
    return found

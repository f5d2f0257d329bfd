"""Whether a profile fits into memory: asked before it runs, and recognized where it did not."""

from __future__ import annotations

import os
from typing import Any

from paged_kv.tools.units import size


def too_large(
    preset: str, given: dict[str, int | None], page_size: int, there: int | None
) -> str | None:
    """Why a preset with other sizes does not fit into `there` bytes, or None. Raises BadCount and
    BadDtype.
    """
    from paged_kv.tools.estimate import configs, estimate
    from paged_kv.tools.profile.presets import PRESETS

    sizes = {name: value for name, value in given.items() if value is not None}
    found = estimate(**{**configs.preset(PRESETS[preset]), **sizes, "page_size": page_size})
    # both are there at once
    needed = sum(held.kv + held.working for held in (found.lightzero, found.paged))
    if there is None or needed <= there:
        return None
    return (
        f"{preset}: the two caches would take {size(needed)}, and {size(there)} are there "
        "(see paged-kv estimate)"
    )


def memory(device: str, torch: Any) -> int | None:
    """Bytes of memory of a device, those in use included; None where nobody says."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of python, numpy or torch says that memory ran out. On a CPU, torch has no
    class for it.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("shapes differ"))
    (True, False)
    """
    torch_on_gpu = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or torch_on_gpu or "allocate memory" in str(error)

"""One call that estimates one workload, and its result."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from paged_kv.errors import BadCount
from paged_kv.tools.estimate import lightzero
from paged_kv.tools.estimate.pages import Pages, Span
from paged_kv.tools.estimate.workload import LONGEST_PAGE, MOST_BYTES, Workload

TOLERATED = 1.05  # bytes of the advised page size over those of the best one

FIRST_PAGES = 64  # of a pool, where nobody says more; it doubles
NUMBER = 8  # bytes
DIGEST = 16  # bytes of the checksum of a page in a snapshot


@dataclass(frozen=True)
class Held:
    """Bytes of the contexts that are held, and of the buffers of the batch in work."""

    kv: int
    working: int


@dataclass(frozen=True)
class Estimate:
    """What `estimate` found. Bytes are those at the end of a search, when most is held.

    `older_root_pages` are those of the roots that LightZero's main, and pages attached to it, keep
    beyond the present.
    """

    workload: Workload
    root_tokens: int
    token_bytes: int
    unique_tokens: int
    unique_bytes: int
    lightzero: Held
    lightzero_main: Held
    dense: Held
    page_size: int
    pages: Span
    paged: Held
    older_roots: int
    older_root_pages: int
    advised_page_size: int
    num_pages: int
    why: str

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.page_size * self.workload.stored_token_bytes

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of a snapshot: its pages, with the positions of their slots and a checksum each.

        Tables and the data of nodes come on top: some ten bytes a node and page of its table.
        """
        return self.pages.likely * (self.page_bytes + NUMBER * self.page_size + DIGEST)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data, ready for JSON."""
        found = dataclasses.asdict(self)
        return {
            **found,
            "pages": self.pages._asdict(),
            "page_bytes": self.page_bytes,
            "snapshot_bytes": self.snapshot_bytes,
        }


def estimate(
    *,
    layers: int,
    heads: int,
    head_size: int,
    context: int,
    envs: int,
    simulations: int,
    kv_heads: int | None = None,
    value_head_size: int | None = None,
    dtype: str = "float32",
    storage: str = "exact",
    tokens_per_step: int = 2,
    root_tokens: int | None = None,
    root_steps: int | None = None,
    page_size: int | None = None,
    ring_simulations: int | None = None,
    max_cache_size: int = 5000,
) -> Estimate:
    """Say how many bytes a tree search's KV caches will take: arithmetic only, nothing runs.

    Every simulation expands one node in each of `envs` trees, and a node appends `tokens_per_step`
    tokens (2: an action and an observation) to its parent's window; a window that reaches `context`
    - 1 tokens loses its oldest step. `root_tokens` are those of a root's window: by default as many
    as it has after `root_steps` root steps, or once it has stopped growing. `root_steps` also says
    how far LightZero's rings are filled (by default: wholly). `page_size` is the advised one by
    default. `storage` is that of the pages: "exact" or "int8". `ring_simulations` and
    `max_cache_size` are the world model's `num_simulations` and `max_cache_size` in LightZero's
    configuration. Raises BadCount, BadDtype and BadArgument.

    >>> found = estimate(layers=2, heads=2, head_size=32, context=8, envs=8, simulations=25)
    >>> found.lightzero.kv, found.unique_bytes, found.paged.kv
    (3473408, 450560, 458752)
    >>> found.advised_page_size, found.num_pages
    (2, 224)
    """
    load = Workload(
        layers=layers,
        heads=heads,
        head_size=head_size,
        context=context,
        envs=envs,
        simulations=simulations,
        kv_heads=kv_heads,
        value_head_size=value_head_size,
        dtype=dtype,
        storage=storage,
        tokens_per_step=tokens_per_step,
        root_tokens=root_tokens,
        root_steps=root_steps,
        ring_simulations=ring_simulations,
        max_cache_size=max_cache_size,
    )
    return of(load, page_size)


def of(load: Workload, page_size: int | None = None) -> Estimate:
    """The estimate of a workload that was made before."""
    token = load.token_bytes
    window = load.window(load.root_steps)
    entry = load.context * token
    advised = advise(load)
    pages = advised if page_size is None else Pages(load, page_size)
    held = pages.held()
    older = _older_roots(load)
    unique = unique_tokens(load)
    working = lightzero.working(load) * entry
    found = Estimate(
        workload=load,
        root_tokens=window,
        token_bytes=token,
        unique_tokens=unique,
        unique_bytes=unique * token,
        lightzero=Held(lightzero.of_0_2_0(load).total * entry, working),
        lightzero_main=Held(lightzero.of_main(load).total * entry, working),
        dense=Held(load.envs * (1 + load.simulations) * entry, load.envs * entry),
        page_size=pages.size,
        pages=held,
        paged=Held(held.likely * pages.size * load.stored_token_bytes, _working(pages)),
        older_roots=older,
        older_root_pages=pages.older_roots(older),
        advised_page_size=advised.size,
        num_pages=advised.held().most + advised.transient(),
        why=_why(load, advised),
    )
    _check_bytes(found)
    return found


def unique_tokens(load: Workload) -> int:
    """Tokens that the contexts at the end of a search need, each counted once."""
    window = load.window(load.root_steps)
    step = load.tokens_per_step
    # a full window may be shorter than a step
    own = min(step, window) if window + step >= load.context - 1 else step
    return load.envs * (window + load.simulations * own)


def advise(load: Workload) -> Pages:
    """The page size to choose: the largest that divides the tokens of a step, where it costs
    little.

    Children then fill whole pages: none is copied, and only slots in front of a root stay empty.
    """
    most = min(load.tokens_per_step, load.context, LONGEST_PAGE)
    sizes = [size for size in range(1, most + 1) if load.tokens_per_step % size == 0]
    slots = {size: Pages(load, size).held().most * size for size in sizes}
    return Pages(
        load, max(size for size in sizes if slots[size] <= TOLERATED * min(slots.values()))
    )


def _working(pages: Pages) -> int:
    """Bytes beside the pages: a dense batch, the numbers of its rows, the positions of all slots.

    Where windows end at different offsets of their pages, the rows are numbered token by token, and
    take as many times more as a page has slots: not counted here.
    """
    load = pages.load
    tokens = pages.working_tokens()
    rows = tokens // pages.size * 2 * load.layers * (load.kv_heads or load.heads)
    reserved = FIRST_PAGES
    while reserved < pages.held().most + pages.transient():
        reserved *= 2
    return tokens * load.token_bytes + NUMBER * (rows + (reserved + 1) * pages.size)


def _why(load: Workload, pages: Pages) -> str:
    if pages.size == 1:
        size = "pages of one token leave no slot empty and are never copied"
    else:
        size = (
            f"the {load.tokens_per_step} tokens of a step fill whole pages, so none is copied "
            "and only slots in front of a root stay empty"
        )
    most = pages.held().most + pages.transient()
    return f"{size}; {most:,} pages are the most in use at once, so the pool never grows"


def _older_roots(load: Workload) -> int:
    kept = lightzero.kept_roots(load)
    return kept - 1 if load.root_steps is None else min(kept, load.root_steps) - 1


def _check_bytes(found: Estimate) -> None:
    largest = max(
        held.kv + held.working
        for held in (found.lightzero, found.lightzero_main, found.dense, found.paged)
    )
    if largest > MOST_BYTES:
        raise BadCount("the total of bytes", largest, f"less than 2^63 = {MOST_BYTES + 1}")

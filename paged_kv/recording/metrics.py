"""Names and meanings of what monitors are told of a cache."""

from __future__ import annotations

from paged_kv.cache import PagedKVCache

Gauges = dict[tuple[str, str], float]  # name and description -> value

# Usage, queries and hits mean what vLLM's kv_cache_usage_perc, prefix_cache_queries and
# prefix_cache_hits mean, but that a query is a lookup of a context here, and of a token there.
USAGE = (
    "paged_kv_cache_usage_perc",
    "Share of the pages in use, of the limit or of those reserved. 1 means all.",
)
LOOKUPS = {
    "queries": ("paged_kv_cache_queries", "Lookups of contexts."),
    "hits": ("paged_kv_cache_hits", "Lookups that found their context."),
    "evictions": ("paged_kv_cache_evictions", "Contexts that went for lack of room."),
}
COUNTERS = {
    "forks": ("paged_kv_forks", "Sequences made from a parent."),
    "appends": ("paged_kv_appends", "Sequences that got new tokens."),
    "allocated_pages": ("paged_kv_allocated_pages", "Pages that were taken."),
    "copied_pages": ("paged_kv_copied_pages", "Shared pages that were copied to be written to."),
    "freed_pages": ("paged_kv_freed_pages", "Pages that were given back."),
    "growths": ("paged_kv_growths", "Times that the pool grew."),
}


def gauges(cache: PagedKVCache) -> Gauges:
    """What is held now. Cost: nothing is counted for it."""
    used = cache.pages_in_use
    peak = cache.stats.peak_pages
    page_bytes = cache.page_bytes
    return {
        USAGE: used / (cache.max_pages or cache.pages_reserved),
        ("paged_kv_bytes_in_use", "Bytes of the pages in use."): used * page_bytes,
        (
            "paged_kv_bytes_reserved",
            "Bytes of all pages that there is memory for.",
        ): cache.bytes_reserved,
        ("paged_kv_bytes_in_use_peak", "Most bytes in use so far."): peak * page_bytes,
        (
            "paged_kv_working_bytes",
            "Bytes held beside the pages: buffers, and positions of tokens.",
        ): cache.working_bytes,
        ("paged_kv_sequences", "Sequences that exist."): cache.live_sequences,
    }

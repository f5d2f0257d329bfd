"""Clients of the cache. One file each, imported on demand: nothing here is loaded by ``import
paged_kv``.
"""

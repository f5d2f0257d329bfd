"""Sequences on their way from one cache to another: pages, tables, indexes and a caller's data."""

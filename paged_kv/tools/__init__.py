"""What the command `paged-kv` needs, and nothing else does."""

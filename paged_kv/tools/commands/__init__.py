"""One file a command of `paged-kv`: its arguments, and what it runs; and what commands share
(common, parser, memory).

Heavy imports (torch, LightZero, rich) wait until a command runs: `--help` answers at once, and
Ctrl-C while they load is handled like any other.
"""

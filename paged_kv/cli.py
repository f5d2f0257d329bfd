"""The `paged-kv` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .commands import diff, profile, record, report

COMMANDS = (profile, record, report, diff)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, 1 for a failure, 2 for bad arguments, 130 after Ctrl-C."""
    options = parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        return status
    except KeyboardInterrupt:
        print("paged-kv: stopped, nothing was written.", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    top = argparse.ArgumentParser(prog="paged-kv", description="A paged key/value cache for tree search.")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return top


if __name__ == "__main__":
    sys.exit(main())

"""The `paged-kv` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .commands import estimate, profile

COMMANDS = (profile, estimate)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    0, 1 for a failure, 2 for bad arguments, 130 after Ctrl-C, 141 where nobody reads what is printed.
    """
    options = parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads, as `| head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it ends
        return 141
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

"""The `paged-kv` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from . import __version__
from .commands import estimate, profile
from .commands.parser import Parser

COMMANDS = (profile, estimate)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    0, 1 for a failure, 2 for bad arguments, 130 after Ctrl-C, 141 where nobody reads what is printed.
    """
    try:
        options = parser().parse_args(arguments)
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
    top = Parser(prog="paged-kv", description="Paged key/value caches for tree search: measure, and plan.",
                 epilog="`paged-kv COMMAND --help` says what a command takes.")
    top.add_argument("--version", action="version", version=f"paged-kv {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)

    def show_help(options: argparse.Namespace) -> int:
        top.print_help()
        return 0

    top.set_defaults(run=show_help)  # without a command
    return top


if __name__ == "__main__":
    sys.exit(main())

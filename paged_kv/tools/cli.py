"""The `paged-kv` command."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence

from paged_kv import __version__
from paged_kv.tools.commands import diff, estimate, profile, record, report, search, snapshot
from paged_kv.tools.commands.common import fail
from paged_kv.tools.commands.parser import Parser

COMMANDS = (profile, search, estimate, record, report, diff, snapshot)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    0, 1 for a failure, 2 for bad arguments, 130 after Ctrl-C, 141 where nobody reads what is
    printed.
    """
    try:
        options = parser().parse_args(arguments)
        status: int = options.run(options)
        if sys.stdout is not None:  # it may have been closed
            sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads, as `| head`, has seen enough
        _print_no_more()
        return 141
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _print_no_more()
        return fail("cannot print: no space left where the output goes")
    except KeyboardInterrupt:
        print("paged-kv: stopped, nothing was written.", file=sys.stderr)
        return 130


def _print_no_more() -> None:
    """Let what was not printed yet go nowhere, or the interpreter complains when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    top = Parser(
        prog="paged-kv",
        description="Paged key/value caches for tree search: measure, and plan.",
        epilog="`paged-kv COMMAND --help` says what a command takes.",
    )
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

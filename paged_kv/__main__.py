"""The entry of the command. It loads nothing but itself, so that Ctrl-C while the rest loads ends
in one line, too.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command and return its exit status, which is that of `cli.main`."""
    try:
        from paged_kv.tools import cli

        return cli.main()
    except KeyboardInterrupt:  # before `cli` could say so itself
        print("paged-kv: stopped, nothing was written.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

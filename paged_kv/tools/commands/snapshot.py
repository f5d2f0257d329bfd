"""`paged-kv snapshot`: what a folder holds, and whether all of it can be read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paged_kv.tools.commands.common import fail

if TYPE_CHECKING:
    from paged_kv.snapshot import Snapshot

DESCRIPTION = """\
Say what a snapshot holds, and read all of it: every page is compared with its
checksum. Exit status 1 if anything is missing or damaged."""
EXAMPLES = """\
examples:
  paged-kv snapshot runs/search                      all of it
  paged-kv snapshot runs/search --quick              its tables only"""

WHOLE = "every page is as it was saved"
QUICK = "pages were not read"


def add(commands: Any) -> None:
    """Add the command to the subparsers of `paged-kv`."""
    command = commands.add_parser(
        "snapshot",
        help="what a snapshot holds, and whether it is whole",
        usage="%(prog)s FOLDER [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    command.add_argument("folder", type=Path, metavar="FOLDER", help="a folder that was saved into")
    command.add_argument("--quick", action="store_true", help="leave out reading the pages")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    from paged_kv.errors import BadSnapshot, MissingPackage, SnapshotFailed

    try:
        from paged_kv.snapshot import Snapshot
    except MissingPackage as error:
        return fail(str(error))
    try:
        with Snapshot(options.folder) as snapshot:
            if not options.quick:
                snapshot.verify()
            found = figures(snapshot)
    except (BadSnapshot, SnapshotFailed) as error:
        return fail(str(error))
    found["state"] = QUICK if options.quick else WHOLE
    print(told(options.folder, found))
    return 0


def figures(snapshot: Snapshot) -> dict[str, Any]:
    """What a snapshot holds."""
    manifest = snapshot.manifest
    contents = snapshot.contents
    stored = sum(segment.pages for segment in manifest.segments)
    return {
        **contents.fingerprint,
        "sequences": contents.tables.sequences,
        "named": contents.named,
        "tokens": int(contents.tables.tokens.sum()),
        "pages": contents.pages,
        "bytes": contents.pages * manifest.sizes.page_bytes,
        "segments": len(manifest.segments),
        "pages_stored": stored,
        "bytes_stored": stored * manifest.sizes.page_bytes,
        "extra_bytes": len(contents.extra),
    }


def told(folder: Path, found: dict[str, Any]) -> str:
    """The figures as lines."""
    from paged_kv.tools.units import count, size

    shape = f"{found['layers']} layers x {found['heads']} heads x {found['head_size']}"
    if found["value_head_size"] != found["head_size"]:
        shape += f" and {found['value_head_size']}"
    lines = {
        "cache": f"{shape}, {found['dtype']}, pages of {found['page_size']} tokens",
        "sequences": f"{count(found['sequences'])}, {count(found['tokens'])} tokens",
        "pages": f"{count(found['pages'])}, {size(found['bytes'])}",
        "in files": f"{count(found['pages_stored'])} pages, {size(found['bytes_stored'])}, "
        f"{count(found['segments'])} segments",
        "keys and data": size(found["extra_bytes"]),
        "identity": ", ".join(f"{name}: {value}" for name, value in found["identity"].items()),
        "state": found["state"],
    }
    width = max(map(len, lines))
    shown = [f"{name:<{width}}  {text}" for name, text in lines.items() if text]
    return "\n".join([str(folder), *shown])

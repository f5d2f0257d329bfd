"""`paged_kv` beside other keepers of K/V contexts, on the same tree searches, in one run.

    python benchmarks/peers/run.py --json benchmarks/results/peers.json --plots benchmarks/results/

Every peer is first checked for right contents: each node of a search is read back and compared with
a dense copy. Then, one thread, in turns: bookkeeping alone (fork + append of a batch of 8, release
of 8), a whole step (fork, write, gather), attention over what was gathered, bytes of K/V over what
is really needed, fork + append beside up to a million live sequences, and host memory of a
sequence. A peer whose library is not installed is a line that says so. `make bench` sets up an
environment with all of them.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from machine import processor

import paged_kv
from peers import measure, table
from peers.catalog import Row, rows
from peers.checks import WrongContents, check_contents, check_tables
from peers.workload import LONG, SMALL, WORKLOADS, Workload

PACKAGES = ("torch", "numpy", "transformers", "vllm", "LightZero")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    memory = None
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gib": memory and round(memory / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Of the packages that take part; one that is missing is left out."""
    found = {"paged_kv": paged_kv.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def checked(found: Sequence[Row], work: Workload) -> tuple[list[Row], dict[str, Any]]:
    """The peers that keep what they are given, and the number of contexts read back from each, or
    what was wrong.
    """
    few = 10 if work.window <= 64 else 4
    short = replace(work, simulations=min(few, work.simulations), searches=min(3, work.searches))
    passed = []
    report = {}
    for row in found:
        if row.kind is None:
            continue
        try:
            read = check_tables(row.tables, short) if row.tables and not row.tables.copies else 0
            read += check_contents(row.contents, short) if row.contents else 0
        except WrongContents as error:
            report[row.name] = {"wrong": str(error)[:200]}
        else:
            report[row.name] = {"contexts_read_back": read}
            passed.append(row)
    return passed, report


def described(row: Row) -> dict[str, Any]:
    """A peer, for the table."""
    if row.kind is None:
        return {"name": row.name, "missing": row.missing}
    kind = row.kind
    return {"name": row.name, "note": kind.note, "cannot": kind.cannot, "copies": kind.copies}


def shown(work: Workload) -> dict[str, Any]:
    """A workload as JSON has it."""
    return {
        **asdict(work),
        "dtype": str(work.dtype).removeprefix("torch."),
        "token_bytes": work.token_bytes,
    }


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """All of it."""
    found = [row for row in rows() if not options.only or row.name in options.only]
    results: dict[str, Any] = {
        "schema": 1,
        "command": "python " + " ".join(sys.argv),
        "when": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions(),
        "peers": [described(row) for row in found],
        "workloads": {},
    }
    for work in (WORKLOADS[name] for name in options.workloads):
        say(f"{work.name}: reading back what every peer keeps")
        passed, report = checked(found, work)
        say(f"{work.name}: timing {len(passed)} peers")
        results["workloads"][work.name] = {
            "sizes": shown(work),
            "checks": report,
            "tables": measure.tables(passed, work, options.repeats),
            "contents": measure.contents(passed, work, options.content_repeats),
        }
    say(f"beside {', '.join(f'{count:,}' for count in options.live)} live sequences")
    work = SMALL if SMALL.name in options.workloads else WORKLOADS[options.workloads[0]]
    results["scaling"] = measure.scaling(found, work, options.live, options.rounds)
    results["host_bytes"] = {
        "live": options.host_live,
        **measure.host_bytes(found, work, options.host_live),
    }
    results["machine"]["load_at_end"] = round(os.getloadavg()[0], 2)
    return results


def say(text: str) -> None:
    """Progress, beside the tables."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plots", type=Path, help="write pictures to this folder (needs altair)")
    parser.add_argument(
        "--workloads", nargs="+", choices=sorted(WORKLOADS), default=[SMALL.name, LONG.name]
    )
    parser.add_argument(
        "--only", nargs="+", metavar="PEER", help="these peers only, by their names in the table"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="times that all searches are played on the tables"
    )
    parser.add_argument("--content-repeats", type=int, default=1, help="the same with K/V")
    parser.add_argument("--live", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6])
    parser.add_argument(
        "--rounds", type=int, default=60, help="rounds of 8 batches beside so many live sequences"
    )
    parser.add_argument(
        "--host-live", type=int, default=20_000, help="sequences whose host memory is counted"
    )
    options = parser.parse_args()
    if options.plots:
        from peers import plots  # now, lest its libraries are missed after the run
    measure.pin_threads()
    results = json.loads(json.dumps(benchmark(options)))  # as a reader of the file will have it
    print(table.markdown(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.plots:
        for path in plots.draw(results, options.plots):
            say(f"wrote {path}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # what the libraries have to say at length when they are loaded
    logging.disable(logging.WARNING)
    main()

"""What the memory order of the pool costs, on fresh pools and on well-used ones.

    python benchmarks/memory_orders/run.py --json benchmarks/results/memory_orders.json

The orders are one family, [chunk, layer, K/V, head, slot, size]: a chunk is a run of consecutive
pages whose slots lie side by side inside each layer, K or V and head. Chunks of one page are the
order of the package. Measured are a gather of 8 windows, writes to fresh pages and to single
slots, copies of pages, growth by doubling, and attention of 8 rows over a prefix that they share:
gathered for each row, as today; gathered once; read where it lies, with a call for each part that
is one strided view, parts merged by the sums of their weights; and from a dense copy that is kept.

Each workload runs on a fresh pool, whose pages were taken in order; on one after many random forks,
appends and releases, the worst we could think of; on the same with an allocator that prefers runs;
and on one after many tree searches. Before anything is timed
all orders must give the same batches and the same attention. One thread, rounds interleaved,
medians; a ratio is the median of the ratios to chunks of one page in the same round, or to what is
done today: chunks of one page, gathered for each row.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from memory_orders.measure import WORKLOADS, Bench, Workload, growth
from memory_orders.page_runs import ALLOCATORS, at_least, mean_run, spans, used

# name: operations of sequences before, allocator
POOLS = {
    "fresh": ("fresh", "of the package"),
    "used": ("random", "of the package"),
    "used, best fit": ("random", "best fit"),
    "searched": ("searches", "of the package"),
}
CHUNKS = (64, 0)
Row = dict[str, Any]


def processor() -> str:
    """Name of the processor, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def machine() -> Row:
    """What the figures were measured on."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def runs_of(name: str, work: Workload, operations: int) -> Iterator[Row]:
    """How far windows lie in runs, for each allocator."""
    for kind in ("random", "searches"):
        for allocator in ALLOCATORS:
            _, tables = used(work.shape, allocator, kind, operations)
            windows = at_least(work.window, tables)
            row: Row = {"workload": name, "after": kind, "allocator": allocator}
            row["pages"] = sum(map(len, windows)) / len(windows)
            row["mean_run"] = mean_run(windows)
            row["runs_of_a_prefix"] = {
                str(pages * work.sizes.page): mean_parts(
                    [t[:pages] for t in windows if len(t) >= pages]
                )
                for pages in work.prefixes
            }
            yield row


def mean_parts(tables: list[tuple[int, ...]]) -> float | None:
    """Runs that a table falls into."""
    if not tables:
        return None
    return sum(sum(1 for _ in spans(table)) for table in tables) / len(tables)


def timings(name: str, work: Workload, options: argparse.Namespace) -> Iterator[Row]:
    """All cases of a workload, on each pool."""
    bench = Bench(work, CHUNKS)
    for state, (kind, allocator) in POOLS.items():
        bench.use(*used(work.shape, allocator, kind, options.operations))
        worst = bench.check()
        yield {"workload": name, "pool": state, "case": "check", "largest_difference": worst}
        for row in bench.measure(options.rounds):
            yield {"workload": name, "pool": state, **row}


def measure(options: argparse.Namespace, found: Row) -> Iterator[str]:
    """Fill `found`, and tell line by line what was found."""
    for name in options.only:
        work = WORKLOADS[name]
        for row in runs_of(name, work, options.operations):
            found["runs"].append(row)
            prefixes = "".join(
                f"  prefix {tokens}: {'-' if runs is None else f'{runs:.1f}'} runs"
                for tokens, runs in row["runs_of_a_prefix"].items()
            )
            yield (
                f"{name:9} {row['after']:9} {row['allocator']:15} {row['pages']:6.1f} pages, "
                f"mean run {row['mean_run']:6.2f}{prefixes}"
            )
        row = {"workload": name, "pool": "any", **growth(work, CHUNKS, options.rounds)}
        found["times"].append(row)
        yield line(row)
        for row in timings(name, work, options):
            found["times"].append(row)
            yield line(row)


def line(row: Row) -> str:
    """A row of the table."""
    head = f"{row['workload']:9} {row['pool']:15} {row['case']:25}"
    if row["case"] == "check":
        return f"{head} all orders alike, attention within {row['largest_difference']:.1e}"
    figures = row["orders"].values()
    times = "".join(f"{figure['us']:12,.1f}" for figure in figures)
    ratios = "".join(f"{figure['ratio']:8.2f}" for figure in list(figures)[1:])
    today = "".join(f"{f['over_today']:7.3f}" for f in figures if "over_today" in f)
    parts = "".join(f"{count:7.1f}" for count in row.get("parts", {}).values())
    more = f"  of today{today}" if today else ""
    return f"{head}{times:36} {ratios:16}{more}{f'  parts{parts}' if parts else ''}"


def parsed() -> argparse.Namespace:
    """The options, checked."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=300, help="a tenth where much is moved")
    parser.add_argument("--operations", type=int, default=100_000, help="that wear a pool")
    some = f"some of: {', '.join(WORKLOADS)}"
    several: Row = {"nargs": "+", "choices": list(WORKLOADS), "default": list(WORKLOADS)}
    parser.add_argument("--only", **several, metavar="WORKLOAD", help=some)
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("there must be at least one round")
    return options


def command(options: argparse.Namespace) -> str:
    """The command, without the paths of this machine."""
    words = ["python benchmarks/memory_orders/run.py", "--rounds", str(options.rounds)]
    words += ["--operations", str(options.operations)]
    words += [] if options.only == list(WORKLOADS) else ["--only", *options.only]
    return " ".join(words)


def main() -> int:
    """Print the table; write it to a file where one is named, what was measured before Ctrl-C
    too.
    """
    options = parsed()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: Row = {"schema": 1, "machine": machine(), "command": command(options)}
    found |= {"stopped": None, "runs": [], "times": []}
    names = "".join(f"{name:>12}" for name in ("page", "64 pages", "pool"))
    print(f"{'':9} {'chunks, us; ratios to page':41}{names} {'64':>8}{'pool':>8}")
    try:
        for text in measure(options, found):
            print(text, flush=True)
    except KeyboardInterrupt:
        found["stopped"] = "by hand"
        print("memory_orders: stopped early by hand", file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 130 if found["stopped"] else 0


if __name__ == "__main__":
    sys.exit(main())

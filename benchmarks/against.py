"""Whether this checkout is as fast as another one of the project.

    python benchmarks/against.py ../other --rounds 15 --json benchmarks/results/against.json

Each part is run on both checkouts in turn, right after each other, and who goes first changes from
round to round: what slows the machine down for a while then touches both sides of a pair. Each run
is a process of its own with one thread, and fails where it would import the package from anywhere
but its checkout. The parts are `benchmarks/control_plane.py` and `benchmarks/data_plane.py`, each
checkout's own copy, and `paged-kv profile` for each preset, with few simulations; of a profile only
the side with pages counts. The command also runs LightZero's own cache and counts kernels. With
`--pages-only` the root steps with pages are timed without all that, as the command times them,
through inner names that both checkouts must have: the same figures in a third of the time.

Each round gives one ratio new / old of each figure. The table has their median, and the upper end
of a 95 % confidence interval for it: a percentile bootstrap of the median of the logarithms, which
single disturbed rounds hardly move. A figure is `kept` where the upper end is at most 1.10, `lost`
where the lower end is above that, and `unclear` between the two. With fewer than 6 pairs no
interval that is drawn from the pairs can reach 95 %, and the verdict is `too few`.

Ctrl-C ends it early, with a table of what was measured by then. The verdicts do not change the exit
status; it is 1 where a run failed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

from against_rows import CONFIDENCE, LIMIT, Measured, Pair, Row, rows_of, table
from machine import processor

HERE = Path(__file__).resolve()
INSIDE = "--inside"  # first argument of the processes this script starts
SCRIPTS = {
    "control_plane": ["--rounds", "30", "--live", "1000", "100000"],
    "data_plane": [],
}


class Size(NamedTuple):
    """How much of a preset is run: one half of the root steps times the search, one the cache."""

    roots: int
    simulations: int


PRESETS = {
    "cartpole": Size(16, 25),
    "atari": Size(6, 5),
    "atari-8l": Size(6, 5),
    "long": Size(6, 5),
    "memory": Size(6, 5),
}
PARTS = (*SCRIPTS, *PRESETS)
Figures = dict[str, float]  # name -> microseconds


class RunFailed(Exception):
    """A process did not give its figures."""


class Checkout(NamedTuple):
    """One side of the comparison."""

    name: str
    path: Path


def control_figures(part: str, told: dict[str, Any]) -> Figures:
    """Of `control_plane.py`: a step and the verbs, by live sequences and parents."""
    return {
        f"{part} {name}, {line['live_sequences']:,} live, {line['parents']}": line[f"{name}_us"]
        for line in told["results"]
        for name in ("step", "verbs")
    }


def data_figures(part: str, told: dict[str, Any]) -> Figures:
    """Of `data_plane.py`: staging, by workload."""
    lines = told["results"]
    return {f"{part} staging, {line['workload']}": line["staging"]["staging"] for line in lines}


def profile_figures(part: str, told: dict[str, Any]) -> Figures:
    """Of `paged-kv profile`: the time inside the cache and of the whole search, with pages."""
    paged = told["caches"]["paged"]
    return {f"{part} {name}": paged[f"{name}_us_per_simulation"] for name in ("cache", "search")}


READERS: dict[str, Callable[[str, dict[str, Any]], Figures]] = {
    "control_plane": control_figures,
    "data_plane": data_figures,
    **dict.fromkeys(PRESETS, profile_figures),
}


def inside(checkout: Path, job: str, arguments: list[str]) -> None:
    """Do one job with the package of this checkout, or end the process."""
    sys.path[0] = str(checkout / "benchmarks")  # as if its own copy of a script had been started
    import paged_kv

    found = Path(str(paged_kv.__file__)).resolve()
    if checkout not in found.parents:
        sys.exit(f"paged_kv is {found}, which is not in {checkout}")
    if job == "pages":
        time_pages(arguments[0], Path(arguments[1]))
        return
    sys.argv[1:] = arguments
    if job == "command":
        runpy.run_module("paged_kv", run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(checkout / "benchmarks" / f"{job}.py"), run_name="__main__")


def time_pages(name: str, out: Path) -> None:
    """The timed pass of `paged-kv profile`, with pages alone; written as the command writes it."""
    import torch

    from paged_kv.integrations.ties import fixed_ties
    from paged_kv.tools.profile import client, workload
    from paged_kv.tools.profile.presets import PRESETS as KNOWN
    from paged_kv.tools.profile.side import Setting, Side

    torch.set_num_threads(1)
    preset = KNOWN[name]
    size = PRESETS[name]
    setting = Setting(preset.envs, size.simulations, 0, torch.device("cpu"), 2, "read")
    measured = {"paged": workload.Measured()}
    with client.quiet():
        tree = client.tree_file()
    with fixed_ties(tree):
        sides: dict[str, Side] = {"paged": client.LightZeroSide("paged", preset, setting)}
        steps = workload._steps(preset, setting, size.roots)
        fidelity = workload.Fidelity()
        timed = workload._timed_pass
        last = [size.roots] if "roots" in signature(timed).parameters else []
        timed(sides, measured, fidelity, steps, setting, lambda stage: None, *last)
    figures = {
        "cache_us_per_simulation": workload.typical(measured["paged"].cache_us),
        "search_us_per_simulation": workload.typical(measured["paged"].search_us),
    }
    out.write_text(json.dumps({"caches": {"paged": figures}}))


def job_of(part: str, out: Path, pages_only: bool) -> list[str]:
    """What the process of a part has to do, and where it leaves its figures."""
    if part in SCRIPTS:
        return [part, *SCRIPTS[part], "--json", str(out)]
    if pages_only:
        return ["pages", part, str(out)]
    size = PRESETS[part]
    sizes = ["--roots", str(size.roots), "--simulations", str(size.simulations)]
    return ["command", "profile", "--preset", part, *sizes, "--json", str(out)]


def run_part(checkout: Checkout, part: str, pages_only: bool) -> Figures:
    """The figures of one part of one side."""
    environment = os.environ | {"PYTHONPATH": str(checkout.path), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, str(HERE), INSIDE, str(checkout.path)]
        command += job_of(part, out, pages_only)
        done = subprocess.run(
            command, cwd=checkout.path, env=environment, capture_output=True, text=True
        )
        if done.returncode or not out.exists():
            said = done.stderr.strip()[-4000:]
            raise RunFailed(f"{part} failed in the {checkout.name} checkout:\n{said}")
        figures = READERS[part](part, json.loads(out.read_text()))
    if min(figures.values(), default=0.0) <= 0:
        raise RunFailed(f"{part} gave no times in the {checkout.name} checkout: {figures}")
    return figures


def run_pair(
    old: Checkout, new: Checkout, part: str, new_first: bool, pages_only: bool
) -> dict[str, Pair]:
    """One part on both sides; what only the new side measures is left out."""
    order = (new, old) if new_first else (old, new)
    told = {side.name: run_part(side, part, pages_only) for side in order}
    missing = told["old"].keys() - told["new"].keys()
    if missing:
        raise RunFailed(f"{part} has no {', '.join(sorted(missing))} in the new checkout")
    return {figure: Pair(time_, told["new"][figure]) for figure, time_ in told["old"].items()}


def measure(
    old: Checkout, new: Checkout, options: argparse.Namespace, found: Measured
) -> Iterator[str]:
    """Fill `found`, pair by pair; yields a line about every round."""
    begin = time.monotonic()
    for number in range(options.rounds):
        spent = []
        for part in options.only:
            started = time.monotonic()
            pairs = run_pair(old, new, part, number % 2 == 1, options.pages_only)
            for figure, pair in pairs.items():
                found.setdefault(figure, []).append(pair)
            spent.append(f"{part} {time.monotonic() - started:.1f} s")
        left = (time.monotonic() - begin) / (number + 1) * (options.rounds - number - 1)
        rounds = f"round {number + 1} of {options.rounds}"
        yield f"{rounds}: {', '.join(spent)}; about {left / 60:.0f} min left"


def commit_of(checkout: Path) -> dict[str, str | bool | None]:
    """The commit, and whether the files that are measured differ from it; None where unknown."""
    scripts = [f"benchmarks/{name}.py" for name in SCRIPTS]
    git = ["git", "-C", str(checkout)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return {"commit": None, "dirty": None}
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", "paged_kv", *scripts], capture_output=True, text=True
    )
    return {"commit": head.stdout.strip(), "dirty": bool(changed.stdout)}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
    }


def command_of(options: argparse.Namespace) -> str:
    """The command, without the paths of this machine."""
    words = ["python benchmarks/against.py CHECKOUT --rounds", str(options.rounds)]
    words += ["--pages-only"] if options.pages_only else []
    words += [] if options.only == list(PARTS) else ["--only", *options.only]
    return " ".join(words)


def result(
    rows: list[Row], options: argparse.Namespace, about: dict[str, Any], stopped: str | None
) -> dict[str, Any]:
    """Everything, ready for JSON."""
    return {
        "schema": 1,
        **about,
        "command": command_of(options),
        "rounds": options.rounds,
        "stopped": stopped,
        "limit": LIMIT,
        "confidence": CONFIDENCE,
        "rows": [asdict(line) for line in rows],
    }


def write(
    found: Measured, options: argparse.Namespace, about: dict[str, Any], stopped: str | None
) -> None:
    """Write the JSON, where one is wanted."""
    if options.json:
        told = result(rows_of(found), options, about, stopped)
        options.json.write_text(json.dumps(told, indent=1) + "\n")


def parsed() -> argparse.Namespace:
    """The options, checked."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("other", type=Path, help="the checkout to compare with: the old side")
    parser.add_argument("--rounds", type=int, default=15)
    some = f"some of: {', '.join(PARTS)}"
    pages = "time the presets with pages alone, without the command"
    several: dict[str, Any] = {"nargs": "+", "choices": PARTS, "default": PARTS}
    parser.add_argument("--only", **several, metavar="PART", help=some)
    parser.add_argument("--pages-only", action="store_true", help=pages)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    options.only = [part for part in PARTS if part in options.only]
    options.other = options.other.resolve()
    if options.rounds < 1:
        parser.error("there must be at least one round")
    if not (options.other / "paged_kv" / "__init__.py").exists():
        parser.error(f"{options.other} is no checkout of the project")
    return options


def compare(options: argparse.Namespace) -> int:
    """Measure, print, and write the JSON, which is also brought up to date after every round."""
    old = Checkout("old", options.other)
    new = Checkout("new", HERE.parent.parent)
    commits = {side.name: commit_of(side.path) for side in (old, new)}
    about = {"machine": machine(), "commits": commits}
    found: Measured = {}
    stopped = None
    status = 0
    try:
        for line in measure(old, new, options, found):
            print(line, file=sys.stderr, flush=True)
            write(found, options, about, "still running")
    except KeyboardInterrupt:
        stopped = "by hand"
    except RunFailed as error:
        print(f"against: {error}", file=sys.stderr)
        stopped = str(error).partition(":")[0]
        status = 1
    write(found, options, about, stopped)
    print(table(rows_of(found)))
    if stopped:
        print(f"against: stopped early: {stopped}", file=sys.stderr)
    return status


def main() -> None:
    """Compare, or be one of the processes that are compared."""
    if sys.argv[1:2] == [INSIDE]:
        inside(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        sys.exit(compare(parsed()))


if __name__ == "__main__":
    main()

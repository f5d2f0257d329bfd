"""What `make mutants` found, as one file: how many mutants each module has, how many a test fails
for, and which are left, each with the reason.

    python benchmarks/mutants.py --json benchmarks/results/mutants.json --write

Reasons are written by hand, in `benchmarks/mutants_reasons.json`, and belong to a change of a line
of a function; the numbers of mutmut differ from version to version. A mutant that is left without
a reason, or that was not tried, makes the command fail, and so does a reason for nothing. Several
folders are as many runs over one source: whatever was killed in one of them is killed. Modules
that were not tried at all keep what the file says of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

REASONS = Path(__file__).parent / "mutants_reasons.json"
PAGE = Path(__file__).parents[1] / "docs" / "safety.md"
START = "<!-- results: mutants -->\n"
END = "<!-- end of results -->"
KILLED = ("killed", "timeout", "segfault")
UNTRIED = "not checked"


class Mutant(NamedTuple):
    """What is changed: a line of a function."""

    module: str
    function: str
    line: str
    becomes: str


def statuses(listing: str) -> dict[str, str]:
    """The mutants that `mutmut results --all true` lists, and how each ended."""
    pairs = (line.strip().rpartition(": ") for line in listing.splitlines() if "__mutmut_" in line)
    return {name: status for name, _, status in pairs}


def merged(runs: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """How each mutant ended in the best of several runs."""
    found: dict[str, str] = {}
    for run in runs:
        for name, status in run.items():
            found[name] = min(status, found.get(name, UNTRIED), key=rank)
    return found


def rank(status: str) -> int:
    """The best is the lowest; whatever has another name was left."""
    return 0 if status in KILLED else 1 + (status == UNTRIED)


def place(name: str) -> tuple[str, str]:
    """The module and the function of a mutant, as a reader knows them.

    >>> place("paged_kv.pages.tree.xǁTreeǁend__mutmut_10")
    ('pages.tree', 'Tree.end')
    >>> place("paged_kv.entries.x_look_up__mutmut_3")
    ('entries', 'look_up')
    """
    module, _, mangled = name.removeprefix("paged_kv.").rpartition(".")
    mangled = re.sub(r"__mutmut_\d+$", "", mangled)
    return module, mangled.removeprefix("x_").removeprefix("xǁ").replace("ǁ", ".")


def described(name: str, diff: str) -> Mutant:
    """What `mutmut show` says of a mutant."""
    lines = [line for line in diff.splitlines() if not line.startswith(("---", "+++"))]
    before = " ".join(line[1:].strip() for line in lines if line.startswith("-"))
    after = " ".join(line[1:].strip() for line in lines if line.startswith("+"))
    return Mutant(*place(name), before, after)


def report(
    found: Mapping[str, str],
    show: Callable[[str], str],
    reasons: Mapping[Mutant, str],
    before: Mapping[str, Any],
) -> dict[str, Any]:
    """All that is kept. A module of which nothing was tried stays as it was `before`."""
    modules = dict(before.get("modules", {}))
    left = list(before.get("left", []))
    for module in sorted({place(name)[0] for name in found}):
        ended = {name: status for name, status in found.items() if place(name)[0] == module}
        if set(ended.values()) == {UNTRIED}:
            continue
        names = [name for name, status in ended.items() if status not in (*KILLED, UNTRIED)]
        untried = sum(status == UNTRIED for status in ended.values())
        modules[module] = {
            "mutants": len(ended),
            "killed": len(ended) - len(names) - untried,
            "left": len(names),
            "not_tried": untried,
        }
        left = [row for row in left if row["module"] != module]
        for name in names:
            mutant = described(name, show(name))
            left.append({**mutant._asdict(), "because": reasons.get(mutant, "")})
    return {
        "command": "make mutants",
        "mutmut": version_of("mutmut"),
        "python": platform.python_version(),
        "modules": modules,
        "left": sorted(left, key=lambda row: row["module"]),
    }


def faults(result: Mapping[str, Any], reasons: Mapping[Mutant, str]) -> list[str]:
    """What must not be: a mutant without a reason, one that was not tried, a reason for nothing."""
    rows = {Mutant(*[row[field] for field in Mutant._fields]): row for row in result["left"]}
    found = [f"no reason: {mutant}" for mutant, row in rows.items() if not row["because"]]
    for module, numbers in result["modules"].items():
        if numbers["not_tried"]:
            found.append(f"{numbers['not_tried']} of {module} were not tried")
    idle = [mutant for mutant in reasons if mutant.module in result["modules"]]
    return found + [f"a reason for nothing: {mutant}" for mutant in idle if mutant not in rows]


def table(result: Mapping[str, Any]) -> str:
    """The numbers, in Markdown."""
    lines = ["| module | mutants | killed | left |", "|---|---|---|---|"]
    rows = result["modules"]
    for module in sorted(rows):
        lines.append(row(f"`{module.replace('.', '/')}.py`", rows[module]))
    every = {key: sum(each[key] for each in rows.values()) for key in ("mutants", "killed", "left")}
    return "\n".join([*lines, row("all", every)]) + "\n"


def row(title: str, numbers: Mapping[str, int]) -> str:
    """A row of the table."""
    share = 100 * numbers["killed"] / numbers["mutants"]
    return f"| {title} | {numbers['mutants']} | {share:.1f} % | {numbers['left']} |"


def put_into(text: str, shown: str) -> str:
    """A page with another table between its marks."""
    head, _, rest = text.partition(START)
    _, _, tail = rest.partition(END)
    return head + START + shown + END + tail


def read_reasons(path: Path) -> dict[Mutant, str]:
    """The reasons that were written by hand."""
    return {
        Mutant(*[entry[field] for field in Mutant._fields]): entry["because"]
        for entry in json.loads(path.read_text())
    }


def version_of(package: str) -> str:
    """Of a package that is installed, or an empty text."""
    try:
        return version(package)
    except ModuleNotFoundError:
        return ""


def mutmut(folder: Path, *arguments: str) -> str:
    """What mutmut says in a folder where it ran."""
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, default=[Path()], help="where mutmut ran")
    parser.add_argument("--json", type=Path, required=True, help="where the figures are and go")
    parser.add_argument("--reasons", type=Path, default=REASONS)
    parser.add_argument("--write", action="store_true", help="put the table into docs/safety.md")
    options = parser.parse_args()
    runs = [statuses(mutmut(folder, "results", "--all", "true")) for folder in options.folders]
    reasons = read_reasons(options.reasons)
    before = json.loads(options.json.read_text()) if options.json.exists() else {}
    last = options.folders[-1]
    result = report(merged(runs), lambda name: mutmut(last, "show", name), reasons, before)
    options.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    if options.write:
        PAGE.write_text(put_into(PAGE.read_text(), table(result)))
    print(table(result))
    found = faults(result, reasons)
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

"""Print the tables of what `paged-kv profile` measured, from its JSON, or put them into the pages
that show them.

paged-kv profile --preset all --json benchmarks/results/profile.json
python benchmarks/results_table.py --write
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from paged_kv.tools.profile.words import options_of

HERE = Path(__file__).parent
README = Path("README.md")
DETAILS = Path("docs", "benchmarks_lightzero.md")
START = "<!-- results:"
END = "<!-- end of results -->"


class Measure(NamedTuple):
    """A row of a table: its title, the key of both caches, the unit, and the key of the ratio
    (none: no ratio is given).
    """

    title: str
    key: str
    unit: str
    ratio: str = ""


MEASURES = (
    Measure("KV bytes held, peak", "kv_bytes_peak", "bytes", "kv_bytes_peak"),
    Measure("working buffers, peak", "working_bytes_peak", "bytes"),
    Measure("kernels per simulation", "tensor_kernels_per_simulation", "number", "tensor_kernels"),
    Measure("device-to-host copies per simulation", "host_copies_per_simulation", "number"),
    Measure("cache time per simulation", "cache_us_per_simulation", "us", "cache_time"),
    Measure("whole search per simulation", "search_us_per_simulation", "us", "search_time"),
)
RATIOS = ("kv_bytes_peak", "kv_bytes_over_unique", "tensor_kernels", "cache_time", "search_time")


def shown(value: float | None, unit: str) -> str:
    """A number as a reader wants it."""
    if value is None:
        return "-"
    if unit == "bytes":
        for name, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
            if value >= size:
                return f"{value / size:.1f} {name}"
        return f"{value:.0f} B"
    return f"{value:,.0f} us" if unit == "us" else f"{value:.3g}"


def times(value: float | None) -> str:
    """A ratio, or a dash where it was not measured."""
    return "-" if value is None else f"{value:.3g}x"


def section(result: dict[str, Any]) -> list[str]:
    """The table of one preset: its measures as rows, the two caches as columns."""
    work = result["workload"]
    caches = result["caches"]
    ratios = result["ratios"]
    client = " ".join(str(work[key]) for key in ("client", "client_version") if work.get(key))
    lines = [
        f"**{work['preset']}** ({client}): {work['layers']} layers, context "
        f"{work['context_length']}, "
        f"{work['envs']} environments, {work['simulations']} simulations, {work['roots']} roots",
        "",
        "| | own cache | paged | own / paged |",
        "|---|---:|---:|---:|",
    ]
    for measure in MEASURES:
        own = shown(caches["dense"].get(measure.key), measure.unit)
        paged = shown(caches["paged"].get(measure.key), measure.unit)
        ratio = times(ratios.get(measure.ratio)) if measure.ratio else ""
        lines.append(f"| {measure.title} | {own} | {paged} | {ratio} |")
    return [*lines, "", *notes(result), ""]


def notes(result: dict[str, Any]) -> list[str]:
    """What belongs under a table: bytes against what is really needed, and whether the two runs
    agree.
    """
    paged = result["caches"]["paged"]
    fidelity = result["fidelity"]
    equal = fidelity["actions_equal"]
    compared = fidelity["actions_compared"]
    return [
        f"Bytes held / unique tokens: {times(result['ratios']['kv_bytes_over_unique'])}; "
        f"sharing {times(paged.get('sharing_ratio_peak'))}; actions equal {equal} of {compared}; "
        f"visit counts {'equal' if fidelity['visit_counts_equal'] else 'differ'}; values within "
        f"{fidelity['max_abs_value_difference']:.2g}{attached_with([result])}."
    ]


def summary(results: list[dict[str, Any]]) -> list[str]:
    """One row a preset: the ratios alone."""
    lines = [
        "| preset | KV bytes held | paged bytes / unique tokens | kernels | cache time | whole "
        "search |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        cells = [times(result["ratios"].get(key)) for key in RATIOS]
        lines.append(f"| {result['workload']['preset']} | {' | '.join(cells)} |")
    return [*lines, ""]


def attached_with(results: list[dict[str, Any]]) -> str:
    """Under which options of `attach` the caches were compared, where all results say the same."""
    found = {options_of(result["workload"]) for result in results}
    (first, *others) = found
    return f" with `{first}`" if first and not others else ""


def masked(results: list[dict[str, Any]]) -> str:
    """What the default of `padding` does, where it was not measured."""
    if any(result["workload"].get("padding") != "attended" for result in results):
        return ""
    return (
        " So both see the zeros in front of shorter windows; with `masked`, the default of "
        "`attach`, pages do not, and rows that have such zeros get other numbers."
    )


def agreement(results: list[dict[str, Any]]) -> str:
    """Whether both caches led to the same decisions, over all presets."""
    found = [result["fidelity"] for result in results]
    equal = sum(each["actions_equal"] for each in found)
    compared = sum(each["actions_compared"] for each in found)
    same = all(each["visit_counts_equal"] for each in found)
    visits = "all visit counts were equal" if same else "visit counts differed"
    return (
        f"Both sides took the same action in {equal:,} of {compared:,} cases, and {visits}"
        f"{attached_with(results)}.{masked(results)}"
    )


def machine(result: dict[str, Any]) -> str:
    """The machine and the threads, in one line."""
    facts = ", ".join(
        f"{key} {value}" for key, value in result["machine"].items() if value is not None
    )
    return f"Measured on: {facts}; {result['workload']['threads']} thread(s)."


def ratios(results: list[dict[str, Any]]) -> str:
    """The ratios of all presets as markdown: for the README."""
    lines = [
        "LightZero's own cache / pages; in the second column, pages / the tokens that are "
        "needed, each once:",
        "",
        *summary(results),
        agreement(results),
        "",
        machine(results[0]),
    ]
    return "\n".join(lines)


def details(results: list[dict[str, Any]]) -> str:
    """Ratios and the table of each preset as markdown."""
    lines = [ratios(results), ""]
    for result in results:
        lines += section(result)
    return "\n".join(lines).strip()


def between_marks(page: Path, text: str) -> str:
    """A page with this text between its two marks."""
    before, _, rest = page.read_text().partition(START)
    mark, _, rest = rest.partition("-->\n")
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{page}: found no lines '{START} ... -->' and '{END}'")
    return f"{before}{START}{mark}-->\n{text}\n{END}{after}"


def write(root: Path, results: list[dict[str, Any]]) -> None:
    """Put the tables into the pages below a folder: into all of them, or where one has no marks
    into none.
    """
    pages = {root / README: ratios(results), root / DETAILS: details(results)}
    written = {page: between_marks(page, text) for page, text in pages.items()}
    for page, text in written.items():
        page.write_text(text)


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("json", nargs="?", type=Path, default=HERE / "results" / "profile.json")
    parser.add_argument(
        "--write",
        action="store_true",
        help=f"put ratios into {README}, and all of it into {DETAILS}",
    )
    parser.add_argument(
        "--root", type=Path, default=HERE.parent, help="the folder of both (default: this checkout)"
    )
    options = parser.parse_args()
    loaded = json.loads(options.json.read_text())
    results = loaded if isinstance(loaded, list) else [loaded]
    if options.write:
        write(options.root, results)
    else:
        print(details(results))


if __name__ == "__main__":
    main()

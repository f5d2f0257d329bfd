"""Plots of the peers, from the JSON of run.py: times, scaling and bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .table import micros

OURS = "#c0392b"
OTHERS = "#7f8c8d"
COLOURS = ("#c0392b", "#2c3e50", "#16a085", "#8e44ad", "#d68910", "#2471a3", "#7f8c8d", "#6e2c00")


def draw(results: dict[str, Any], folder: Path) -> Iterator[Path]:
    """Write every plot; matplotlib is loaded here, so that the rest runs without it."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in (("times", times), ("scaling", scaling), ("bytes", kv_bytes)):
        figure = make(results)
        figure.text(0.01, 0.005, caption(results), fontsize=6.5, color="#555")
        path = folder / f"peers_{name}.png"
        figure.savefig(path, dpi=130)
        yield path


def caption(results: dict[str, Any]) -> str:
    """Hardware, versions and command."""
    machine = results["machine"]
    found = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return (
        f"{machine['processor']}, {machine['threads']} thread, python {machine['python']}, "
        f"{found}\n"
        f"{results['command']}"
    )


def bars(axes: Any, title: str, values: dict[str, tuple[float, float, float]]) -> None:
    """Medians as bars on a logarithmic axis, with the quartiles."""
    names = list(values)[::-1]
    middles = [values[name][0] for name in names]
    spans = [
        [abs(values[name][0] - values[name][quartile]) for name in names] for quartile in (1, 2)
    ]
    colours = [OURS if name == "paged_kv" else OTHERS for name in names]
    axes.barh(
        names, middles, xerr=spans, color=colours, ecolor="#333", error_kw={"elinewidth": 0.8}
    )
    axes.set_xscale("log")
    axes.set_xlim(min(middles) / 2, max(value[2] for value in values.values()) * 5)
    for place, middle in enumerate(middles):
        end = max(middle, values[names[place]][2])
        axes.annotate(
            micros(middle),
            (end, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_title(title, fontsize=10, loc="left")
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def figure_of(rows: int, columns: int, height: float) -> tuple[Any, Any]:
    """A figure with room for the caption."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        rows, columns, figsize=(6.2 * columns, height * rows + 0.4), squeeze=False
    )
    figure.subplots_adjust(
        left=0.17 if columns > 1 else 0.12, right=0.97, top=0.92, bottom=0.1, wspace=0.5, hspace=0.3
    )
    return figure, axes


def times(results: dict[str, Any]) -> Any:
    """Fork + append, and fork + write + gather, a row of panels a workload."""
    figure, axes = figure_of(len(results["workloads"]), 2, 3.2)
    for row, (name, work) in zip(axes, results["workloads"].items()):
        for panel, part, verb, title in (
            (row[0], "tables", "fork", "fork + append of 8"),
            (row[1], "contents", "step", "fork + write + gather of 8"),
        ):
            values = {
                peer: tuple(entry["us"][verb][key] for key in ("median", "q1", "q3"))
                for peer, entry in work[part].items()
                if verb in entry["us"]
            }
            bars(panel, f"{name}: {title}, us", values)
    return figure


def scaling(results: dict[str, Any]) -> Any:
    """Fork + append beside live sequences."""
    figure, axes = figure_of(1, 2, 4.2)
    figure.subplots_adjust(left=0.06, wspace=0.12, bottom=0.22, right=0.98)
    middles = [
        entry[count][parents]["median"]
        for entry in results["scaling"].values()
        for count in entry
        for parents in ("near", "any")
    ]
    for panel, parents, title in (
        (axes[0][0], "near", "parents among the 400 newest"),
        (axes[0][1], "any", "parents among all"),
    ):
        for colour, (name, entry) in zip(COLOURS, results["scaling"].items()):
            counts = sorted(map(int, entry))
            line = [entry[str(count)][parents]["median"] for count in counts]
            panel.plot(
                counts,
                line,
                marker="o",
                markersize=4,
                color=colour,
                label=name,
                linewidth=2.2 if name == "paged_kv" else 1.2,
            )
        panel.set_xscale("log")
        panel.set_ylim(0, max(middles) * 1.1)
        panel.set_title(f"fork + append of 8, {title}", fontsize=10, loc="left")
        panel.set_xlabel("live sequences", fontsize=9)
        panel.set_ylabel("microseconds", fontsize=9)
        panel.grid(alpha=0.3)
    figure.legend(
        *axes[0][0].get_legend_handles_labels(),
        ncol=6,
        fontsize=8,
        loc="lower center",
        bbox_to_anchor=(0.5, 0.055),
        frameon=False,
    )
    return figure


def kv_bytes(results: dict[str, Any]) -> Any:
    """Bytes held over bytes of unique tokens."""
    figure, axes = figure_of(1, len(results["workloads"]), 3.2)
    figure.subplots_adjust(bottom=0.18, left=0.17)
    for panel, (name, work) in zip(axes[0], results["workloads"].items()):
        values = {peer: entry["kv_bytes_over_unique"] for peer, entry in work["contents"].items()}
        names = list(values)[::-1]
        panel.barh(
            names,
            [values[peer] for peer in names],
            color=[OURS if peer == "paged_kv" else OTHERS for peer in names],
        )
        for place, peer in enumerate(names):
            panel.annotate(
                f"{values[peer]:.2f}",
                (values[peer], place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        panel.axvline(1, color="#333", linewidth=0.8, linestyle=":")
        panel.set_xlim(0, max(values.values()) * 1.15)
        panel.set_title(f"{name}: KV bytes held / unique tokens, peak", fontsize=10, loc="left")
        panel.tick_params(labelsize=8)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    return figure

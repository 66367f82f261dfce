"""Pictures of measurements, each drawn from the content of one results file."""

from pathlib import Path
from typing import Any

import numpy as np

GRAY, BLUE = "#777777", "#1f77b4"
LOOKS = {"non-private": (GRAY, "s", -1), "dpengine": (BLUE, "o", 1)}
"""Colour and marker, and to which side points are moved so that both can be seen."""


def growth(content: dict[str, Any], path: Path) -> None:
    """Time of a step over five quantities, and two processes beside one.

    Times are ratios to the non-private step at the smallest value: medians, their quartiles and the
    least-squares line.
    """
    from matplotlib.figure import Figure

    results = content["results"]
    figure = Figure(figsize=(10, 5.8), layout="constrained")
    panels = figure.subplots(2, 3).flat
    for axes, entry in zip(panels, results["growth"], strict=False):
        _curve(axes, entry)
    _processes(figure.axes[-1], results["processes"])
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    for axes in figure.axes[::3]:
        axes.set_ylabel("step time, over that of non-private\nat the smallest value")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _curve(axes, entry: dict[str, Any]) -> None:
    values = np.array(entry["values"])
    apart = 0.008 * values[-1]
    for impl, curves in entry["steps"].items():
        color, marker, side = LOOKS[impl]
        time, line = curves["time"]["ratios"], curves["time"]["line"]
        axes.plot(values, line["slope"] * values + line["intercept"], "--", color=color, lw=1)
        axes.errorbar(
            values + side * apart,
            [ratio["median"] for ratio in time],
            _quartiles(time),
            fmt=marker,
            color=color,
            markersize=5,
            elinewidth=1,
            label=impl,
        )
    misses = {impl: curves["time"]["line"]["misses"] for impl, curves in entry["steps"].items()}
    axes.set_title("line misses {dpengine:.0%} (non-private {non-private:.0%})".format(**misses))
    axes.title.set_size(9)
    axes.set(xlabel=entry["axis"], xticks=values)
    axes.set_xlim(0, 1.06 * values[-1])
    axes.set_ylim(bottom=0)


def _processes(axes, entries: list[dict[str, Any]]) -> None:
    gains = [entry["throughput_over_one_process"] for entry in entries]
    places = np.arange(len(entries))
    medians = [gain["median"] for gain in gains]
    axes.axhline(1, color=GRAY, lw=1, linestyle="--")
    axes.errorbar(places, medians, _quartiles(gains), fmt="o", color=BLUE, elinewidth=1)
    axes.set_xticks(places, [str(entry["records"]) for entry in entries])
    axes.set(xlabel="records per batch N", ylabel="records/s, 2 processes over 1")
    axes.set_xlim(-0.5, len(entries) - 0.5)
    axes.set_ylim(0, max(1.2, 1.1 * max(gain["quartile_3"] for gain in gains)))
    threads = entries[0]["threads"]
    title = "dpengine, threads: 1 x {1 process} and 2 x {each of 2}".format(**threads)
    axes.set_title(title, fontsize=9)


def _quartiles(ratios: list[dict[str, float]]) -> list[list[float]]:
    """Distances from the median, below and above."""
    return [
        [ratio["median"] - ratio["quartile_1"] for ratio in ratios],
        [ratio["quartile_3"] - ratio["median"] for ratio in ratios],
    ]

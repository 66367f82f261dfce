"""Pictures of measurements, each drawn from the content of one results file."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from dpengine.run.digests import sha256

GRAY, BLUE = "#777777", "#1f77b4"
LOOKS = {"non-private": (GRAY, "s", -1), "dpengine": (BLUE, "o", 1)}
"""Colour and marker, and to which side points are moved so that both can be seen."""

PHASES = {
    "forward": "#b0c4de",
    "backward": "#6a8fb5",
    "clip": "#d1495b",
    "noise": "#edae49",
    "optimizer": "#66a182",
}


def made_from(content: dict[str, Any]) -> str:
    """SHA-256 of what a picture is drawn from; the picture keeps it as its `Description`."""
    return sha256(json.dumps(content, sort_keys=True).encode())


def _save(figure, path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Description": made_from(content)})


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
    _save(figure, path, content)


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


def steps(content: dict[str, Any], path: Path) -> None:
    """Each peer's step in units of the non-private step, divided as its phases are.

    The length of a bar is the ratio of whole steps that the tables have; phases were timed on their
    own, a step in pieces, and tell how it is divided.
    """
    from matplotlib.figure import Figure

    entries = content["results"]["phases"]
    wholes = {entry["case"]: entry["over_non_private"] for entry in content["results"]["step"]}
    scales = np.array([_scale(entry, wholes[entry["case"]]) for entry in entries])
    figure = Figure(figsize=(8, 0.45 * len(entries) + 1.2), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(entries))
    left = np.zeros(len(entries))
    for phase, color in PHASES.items():
        parts = [_phase(entry["over_non_private_step"], phase) for entry in entries]
        lengths = scales * [0.0 if part is None else part["median"] for part in parts]
        axes.barh(places, lengths, left=left, color=color, label=phase, height=0.7)
        left += lengths
    axes.axvline(1, color=GRAY, lw=1, linestyle="--")
    axes.set_yticks(places, [entry["peer"] for entry in entries])
    axes.invert_yaxis()
    axes.set_xlabel("time of a step, over that of the non-private step")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(PHASES), frameon=False)
    _save(figure, path, content)


def _scale(entry: dict[str, Any], wholes: dict[str, Any]) -> float:
    """By what the phases of a peer are multiplied, so that they add up to its whole step."""
    phases = [_phase(entry["over_non_private_step"], phase) for phase in PHASES]
    return wholes[entry["peer"]]["median"] / sum(phase["median"] for phase in phases if phase)


def _phase(parts: dict[str, Any], phase: str) -> dict[str, float] | None:
    """What is compiled or recorded runs forward and backward pass as one, drawn as `backward`."""
    together = parts.get("forward and backward") if phase == "backward" else None
    return together or parts.get(phase)


def quality(contents: dict[str, dict[str, Any]], path: Path) -> None:
    """Accuracy of classifiers trained on synthetic images, against epsilon; each run is a point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(contents), 3.6), layout="constrained")
    panels = figure.subplots(1, len(contents), squeeze=False)[0]
    for axes, (name, content) in zip(panels, contents.items(), strict=True):
        _accuracies(axes, content)
        axes.set_title(name, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy on real images, percent")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    _save(figure, path, contents)


def _accuracies(axes, content: dict[str, Any]) -> None:
    epsilons = sorted({run["epsilon"] for run in content["runs"]}, key=float)
    for classifier, color, marker in (("svc", BLUE, "o"), ("cnn", "tab:orange", "s")):
        points = [
            (epsilons.index(run["epsilon"]), 100 * run[classifier]) for run in content["runs"]
        ]
        axes.plot(*zip(*points, strict=True), marker, color=color, alpha=0.6, markersize=5)
        means = [np.mean([y for x, y in points if x == place]) for place in range(len(epsilons))]
        title = classifier.upper()
        axes.plot(means, color=color, lw=1, label=f"{title}, trained on synthetic images")
        for where, line in (("base", ":"), ("real", "--")):
            found = content[where] if where == "base" else [content[where]]
            height = 100 * np.mean([entry[classifier] for entry in found])
            label = {"base": "the base model's images", "real": "real images"}[where]
            axes.axhline(height, color=color, lw=1, linestyle=line, label=f"{title}, {label}")
    axes.set_xticks(range(len(epsilons)), ["∞" if e == "inf" else f"{e:g}" for e in epsilons])
    axes.set(xlabel="ε", ylim=(None, 101))
    axes.grid(axis="y", alpha=0.3)

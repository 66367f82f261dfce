"""Tables of quality: what synthetic images are good for, against epsilon."""

from collections.abc import Iterable, Mapping
from statistics import mean
from typing import Any

from .tables import Content, markdown

PUBLISHED = {
    "DP-LoRA": (82.2, 97.1),
    "DP-LDM": (44.2, 95.5),
    "DPDM": (89.2, 97.7),
    "PrivImage": (94.0, 97.8),
    "DP-FETA": (95.6, 98.1),
}
"""Accuracy in percent on MNIST at epsilon 1 and 10: DPImageBench (arXiv 2503.14681, README, section
7). Mean of a ResNet, a WRN and a ResNeXt trained on 60,000 synthetic images of 28 x 28 pixels."""


def quality(contents: Mapping[str, Content]) -> str:
    """Accuracy and distance against epsilon; the columns of each data set in ``contents``."""
    header, names = [""], list(contents)
    for name in names:
        header += [f"{name}: SVC", "CNN", "Fréchet"]
    rows = [
        [title, *(cell for name in names for cell in _quality_cells(contents[name], key))]
        for title, key in _quality_rows(contents)
    ]
    return markdown(header, rows)


def _quality_rows(contents: Mapping[str, Content]) -> list[tuple[str, Any]]:
    runs = [(_epsilon(epsilon), epsilon) for epsilon in _epsilons(contents.values())]
    return [("base model", "base"), *runs, ("real images", "real")]


def _epsilons(contents: Iterable[Content]) -> list[float | str]:
    """In order; `inf` is a string, as JSON has no such number."""
    return sorted({run["epsilon"] for content in contents for run in content["runs"]}, key=float)


def _epsilon(epsilon: float | str) -> str:
    return "no noise (ε = ∞)" if epsilon == "inf" else f"ε = {epsilon:g}"


def _quality_cells(content: Content, key: Any) -> list[str]:
    of_key = [run for run in content["runs"] if run["epsilon"] == key]
    entries = {"base": content["base"], "real": [content["real"]]}.get(key, of_key)
    if not entries:
        return ["", "", ""]
    accuracies = [_percent([entry[name] for entry in entries]) for name in ("svc", "cnn")]
    return [*accuracies, _spread([entry["frechet_glyphs"] for entry in entries])]


def _percent(shares: list[float]) -> str:
    """Mean in percent, and in brackets half of the distance between the best and the worst."""
    return _spread([100 * share for share in shares], 1)


def _spread(values: list[float], digits: int = 2) -> str:
    half = (max(values) - min(values)) / 2
    return f"{mean(values):.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def quality_about(name: str, content: Content) -> str:
    """What was run, and where."""
    settings, runs = content["settings"], content["runs"]
    counts = {sum(r["epsilon"] == e for r in runs) for e in _epsilons([content])}
    how_many = f"{max(counts)} run{'s' * (max(counts) > 1)}"
    at_each = how_many if len(counts) == 1 else f"{min(counts)} to {how_many}"
    return (
        f"- {name}: {content['num_train']:,} private images, {content['num_test']:,} held out; "
        f"{settings['output']['num_synthetic']:,} synthetic images a run, δ = "
        f"{settings['privacy']['delta']:g}, {at_each} at each ε ({content['date']}, "
        f"{content['device'].replace('-', ' ')}). Distances of {content['num_compared']:,} images; "
        "that of real images is the held-out ones'."
    )


def published(mnist: Content) -> str:
    """What others published for MNIST, beside our runs."""
    ours = [
        [f"dpengine, 14 x 14 px, {name.upper()}", _of(mnist, 1.0, name), _of(mnist, 10.0, name)]
        for name in ("svc", "cnn")
    ]
    theirs = ([name, *(f"{value:.1f}" for value in both)] for name, both in PUBLISHED.items())
    return markdown(["accuracy in percent", "ε = 1", "ε = 10"], [*ours, *theirs])


def _of(content: Content, epsilon: float, classifier: str) -> str:
    found = [run[classifier] for run in content["runs"] if run["epsilon"] == epsilon]
    return _percent(found) if found else "not run"

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


EPSILONS = (1.0, 10.0)
"""Of ``PUBLISHED``."""
AIMS = ("DP-LoRA", "DP-FETA")


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
    real = [("as many real images", "real_as_many"), ("all real images", "real")]
    return [("base model", "base"), *runs, *real]


def _epsilons(contents: Iterable[Content]) -> list[float | str]:
    """In order; `inf` is a string, as JSON has no such number."""
    return sorted({run["epsilon"] for content in contents for run in content["runs"]}, key=float)


def _epsilon(epsilon: float | str) -> str:
    return "no noise (ε = ∞)" if epsilon == "inf" else f"ε = {epsilon:g}"


def _quality_cells(content: Content, key: Any) -> list[str]:
    of_key = [run for run in content["runs"] if run["epsilon"] == key]
    real = {key: [content[key]] for key in ("real_as_many", "real")}
    entries = ({"base": content["base"]} | real).get(key, of_key)
    if not entries:
        return ["", "", ""]
    accuracies = [_percent([entry[name] for entry in entries]) for name in ("svc", "cnn")]
    distances = [entry["frechet_glyphs"] for entry in entries if "frechet_glyphs" in entry]
    return [*accuracies, _spread(distances) if distances else ""]


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
    size = content["image_size"]
    return (
        f"- {name}: {size} x {size} pixels, for training and testing; {content['num_train']:,} "
        f"private images, {content['num_test']:,} held out; "
        f"{settings['output']['num_synthetic']:,} synthetic images a run, δ = "
        f"{settings['privacy']['delta']:g}, {at_each} at each ε ({content['date']}, "
        f"{content['device'].replace('-', ' ')}). Distances of {content['num_compared']:,} images; "
        "that of real images is the held-out ones'."
    )


def published(mnist: Content) -> str:
    """What others published for MNIST, beside our runs; and whether the aim was reached."""
    size = mnist["image_size"]
    ours = [
        [
            f"dpengine, {size} x {size} px, {name.upper()}",
            *(_of(mnist, epsilon, name) for epsilon in EPSILONS),
        ]
        for name in ("svc", "cnn")
    ]
    theirs = ([name, *(f"{value:.1f}" for value in both)] for name, both in PUBLISHED.items())
    table = markdown(["accuracy in percent", "ε = 1", "ε = 10"], [*ours, *theirs])
    return f"{table}\n\n{aims(mnist)}"


def aims(mnist: Content) -> str:
    """Whether the better of both classifiers is above the rows that it was meant to be above."""
    told = []
    for place, epsilon in enumerate(EPSILONS):
        runs = [run for run in mnist["runs"] if run["epsilon"] == epsilon]
        if not runs:
            continue
        best = max(100 * mean(run[name] for run in runs) for name in ("svc", "cnn"))
        for name in AIMS:
            other = PUBLISHED[name][place]
            verb = "above" if best > other else "not above"
            told.append(f"{best:.1f} is {verb} the {other:.1f} of {name} at ε = {epsilon:g}")
    aim = f"The aim was to be above {' and '.join(AIMS)}, by the better classifier"
    return f"{aim}: {'; '.join(told)}."


def _of(content: Content, epsilon: float, classifier: str) -> str:
    found = [run[classifier] for run in content["runs"] if run["epsilon"] == epsilon]
    return _percent(found) if found else "not run"

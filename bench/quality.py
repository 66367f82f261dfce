"""What privacy costs: accuracy on real digits against epsilon, from real runs.

python -m bench.quality            # 3 runs at each of epsilon 1, 3, 8 and infinity; then the table
python -m bench.quality --table    # the table alone, from results/quality.json into README.md

Each run is `python -m dpengine.finetune --epsilon E --seed S`, everything else at its default. The
number is the accuracy, on the 360 held-out real digits, of an SVC trained on the run's synthetic
images alone; beside it stands the same for the base model with the run's seed.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

import numpy as np

from dpengine import data, evaluate
from dpengine.settings import DIGITS, Settings

RESULTS = Path(__file__).parent / "results" / "quality.json"
README = Path(__file__).parent.parent / "README.md"
FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "samples.png"
BEGIN, END = "<!-- quality: begin -->", "<!-- quality: end -->"

EPSILONS = ("1", "3", "8", "inf")
SEEDS = (0, 1, 2)
FIGURE_RUN = ("8", 0)
"""The run whose picture README shows."""


def measure(epsilon: str, seed: int, output: Path) -> dict:
    """One whole run, its accuracy and its time in minutes."""
    command = [sys.executable, "-m", "dpengine.finetune"]
    options = ["--epsilon", epsilon, "--seed", str(seed), "--output", str(output)]
    start = time.monotonic()
    subprocess.run(command + options, check=True)
    minutes = (time.monotonic() - start) / 60
    with np.load(output / "synthetic.npz") as synthetic:
        accuracy = evaluate.synthetic_accuracy(synthetic["images"], synthetic["labels"])
    report = json.loads((output / "privacy_report.json").read_text())
    return {
        "epsilon": epsilon,
        "seed": seed,
        "accuracy": accuracy,
        "certified_epsilon": report["epsilon"]["upper"],
        "noise_multiplier": report["noise_multiplier"],
        "minutes": round(minutes, 2),
    }


def real_accuracy() -> float:
    """The same classifier trained on the 1,437 real training digits: the ceiling."""
    train = data.load(DIGITS, [str(digit) for digit in range(10)], 1, 8)
    images = ((train.images[:, 0] + 1) * 127.5).round().numpy().astype(np.uint8)
    return evaluate.synthetic_accuracy(images, train.labels.numpy())


def run() -> None:
    """Measure everything and write the results."""
    settings = Settings()
    drawn = settings.output.num_synthetic, settings.output.sampler_steps
    results = {
        "settings": settings.to_dict(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "real_data_accuracy": real_accuracy(),
        "base": [evaluate.base_accuracy("default", *drawn, seed) for seed in SEEDS],
        "runs": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            for epsilon in EPSILONS:
                output = Path(folder) / f"epsilon-{epsilon}-seed-{seed}"
                results["runs"].append(measure(epsilon, seed, output))
                RESULTS.parent.mkdir(exist_ok=True)
                RESULTS.write_text(json.dumps(results, indent=2) + "\n")
                if (epsilon, seed) == FIGURE_RUN:
                    FIGURE.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(output / "samples.png", FIGURE)


def table(results: dict) -> str:
    """README's table of accuracy against epsilon."""
    base = mean(results["base"])
    lines = [
        "| | accuracy on real digits | runs | above the base model |",
        "|---|---|---|---|",
        f"| base model, public glyphs only | {base:.3f} | {_list(results['base'])} | |",
    ]
    for epsilon in EPSILONS:
        runs = [run["accuracy"] for run in results["runs"] if run["epsilon"] == epsilon]
        name = "no privacy (ε = ∞)" if epsilon == "inf" else f"ε = {epsilon}"
        gain = 100 * (mean(runs) - base)
        lines.append(f"| {name} | {mean(runs):.3f} | {_list(runs)} | {gain:+.1f} points |")
    lines.append(f"| real training digits | {results['real_data_accuracy']:.3f} | | |")
    return "\n".join(lines)


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def write_table() -> None:
    """Put the table between its marks in README.md."""
    text = README.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    content = table(json.loads(RESULTS.read_text()))
    README.write_text(f"{before}{BEGIN}\n{content}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", action="store_true", help="only rewrite README's table")
    if not parser.parse_args().table:
        run()
    write_table()

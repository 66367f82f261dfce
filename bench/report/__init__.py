"""README's numbers, docs/benchmarks.md and the plots, from the files in results/ alone.

python -m bench.report

Of each suite the newest file counts, a GPU's before a CPU's.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from .. import results
from ..results import FOLDER, ROOT
from . import cost_tables, figures, quality_tables, step_tables
from .tables import Content

README = ROOT / "README.md"
PAGE = ROOT / "docs" / "benchmarks.md"
FIGURES = ROOT / "docs" / "figures"

SUITES = ("steps", "kernels", "product", "growth", "accounting", "noise", "threads")
TASKS = ("digits", "mnist")


def newest(folder: Path = FOLDER) -> dict[str, Content]:
    """The newest results of each suite, from a GPU where there are such."""
    found = {}
    for suite in (*SUITES, *(f"quality-{task}" for task in TASKS)):
        of_devices = results.newest(suite, folder).values()
        if of_devices:
            found[suite] = max(
                of_devices, key=lambda content: (_is_of_a_gpu(content), content["date"])
            )
    return found


def _is_of_a_gpu(content: Content) -> bool:
    return not content["device"].startswith("cpu")


def blocks(found: Mapping[str, Content]) -> dict[str, str]:
    """What stands between the marks of each name, in README.md and docs/benchmarks.md."""
    made = {"devices": devices(found), "durations": durations(found)}
    makers: dict[str, tuple[str, Callable[[Content], str]]] = {
        "steps": ("steps", step_tables.peers),
        "cases": ("steps", step_tables.cases),
        "phases": ("steps", step_tables.phases),
        "memory": ("steps", step_tables.memory),
        "draws": ("steps", step_tables.draws),
        "draws-privacy": ("steps", step_tables.draws_privacy),
        "not-timed": ("steps", step_tables.not_timed),
        "growth": ("growth", step_tables.growth),
        "processes": ("growth", step_tables.processes),
        "product": ("product", step_tables.product),
        "product-quality": ("product", step_tables.product_quality),
        "kernels": ("kernels", cost_tables.kernels),
        "accounting": ("accounting", cost_tables.accounting),
        "noise": ("noise", cost_tables.noise),
        "threads": ("threads", cost_tables.threads),
        "published": ("quality-mnist", quality_tables.published),
    }
    for name, (suite, make) in makers.items():
        if suite in found:
            made[name] = f"{make(found[suite])}\n\n{provenance(found[suite])}"
    if quality := of_quality(found):
        made["quality"] = quality_tables.quality(quality)
        made["quality-about"] = "\n".join(
            quality_tables.quality_about(*item) for item in quality.items()
        )
    if "steps" in found:
        made["speed"] = step_tables.sentence(found["steps"])
    return made


def of_quality(found: Mapping[str, Content]) -> dict[str, Content]:
    """The results of `bench.quality`, by data set."""
    return {task: found[f"quality-{task}"] for task in TASKS if f"quality-{task}" in found}


def devices(found: Mapping[str, Content]) -> str:
    """What was measured on, and whether a GPU is among it."""
    names = sorted({content["device"].replace("-", " ") for content in found.values()})
    none = "" if any(map(_is_of_a_gpu, found.values())) else " No GPU was measured yet."
    return f"Measured on: {', '.join(names)}.{none}"


def durations(found: Mapping[str, Content]) -> str:
    """How long the suites took, so that a reader knows what a run will take."""
    seconds = {suite: found[suite]["seconds"] for suite in SUITES if suite in found}
    each = ", ".join(f"{suite} {taken / 60:.1f}" for suite, taken in seconds.items())
    full = [suite for suite in seconds if found[suite].get("full")]
    note = f" With `--full`: {', '.join(full)}." if full else ""
    total = sum(seconds.values()) / 60
    return f"The suites took {total:.1f} minutes of that machine: {each}.{note}"


def provenance(content: Content) -> str:
    """One line: where, when and from what code the numbers come."""
    full = ", `--full`" if content.get("full") else ""
    commit = content["commit"].removesuffix("-dirty")
    changed = " with changes" if content["commit"] != commit else ""
    return (
        f"<sub>{content['device'].replace('-', ' ')}, {content['threads']} threads, torch "
        f"{content['versions']['torch']}, {content['date']}{full}, {commit[:9]}{changed}</sub>"
    )


def filled(text: str, made: Mapping[str, str]) -> str:
    """``text`` with what stands between the marks replaced. A mark without results is an error."""
    parts = text.split("<!-- begin ")
    done = [parts[0]]
    for part in parts[1:]:
        name, rest = part.split(" -->", 1)
        end = f"<!-- end {name} -->"
        if end not in rest:
            raise ValueError(f"the mark '<!-- begin {name} -->' must have its {end}")
        if name not in made:
            raise ValueError(f"no file in {FOLDER} holds what {name!r} is made of; run its suite")
        done.append(f"<!-- begin {name} -->\n{made[name]}\n{end}{rest.split(end, 1)[1]}")
    return "".join(done)


def main() -> None:
    found = newest()
    made = blocks(found)
    for file in (README, PAGE):
        file.write_text(filled(file.read_text(encoding="utf-8"), made), encoding="utf-8")
    if "growth" in found:
        figures.growth(found["growth"], FIGURES / "growth.png")
    if "steps" in found:
        figures.steps(found["steps"], FIGURES / "steps.png")
    if quality := of_quality(found):
        figures.quality(quality, FIGURES / "quality.png")

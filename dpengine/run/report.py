"""What a run claims: the privacy report, the model card and the closing lines."""

import json
import math
from importlib.metadata import version
from pathlib import Path

from .. import accounting
from ..accounting import REFERENCES
from ..errors import printable
from ..mechanism.plan import PrivacyPlan
from ..settings import Settings

_PACKAGES = ("dpengine", "torch", "diffusers", "peft", "numpy", "scipy", "prv-accountant")

_NEIGHBOURS = {
    "add-remove": (
        "one {unit} is added to the data or removed from it. The public size that the sampling "
        "rate and the divisor come from was given by the user and need not be the true one"
    ),
    "zero-out": (
        "one {unit} is replaced by one that contributes nothing. The number of {unit}s is public"
    ),
    "replace-one": (
        "one {unit} is replaced by any other. The number of {unit}s stays the same and is not "
        "protected"
    ),
}

_UNITS = {
    "record": (
        "one record, a single image with its label. A person with several images is protected for "
        "each image on its own, not for all together"
    ),
    "unit": (
        "one unit, all images that the data's `unit_ids` give to one person, together. To each "
        "step it takes part in it brings {rows_per_unit} of them, however many it has"
    ),
}

_CLIPPING = {
    "flat": "is clipped to L2 norm C = {bound}",
    "per-layer": "is clipped layer by layer, the squared bounds adding up to C², C = {bound}",
    "automatic": "is divided by its L2 norm and a constant and multiplied by C = {bound}",
    "adaptive": (
        "is clipped to an L2 norm C that starts at {bound} and follows noised counts of the "
        "gradients within it; sum and count together cost what the noise multiplier says"
    ),
}


def privacy_report(
    plan: PrivacyPlan, inert_tensors: list[str], together: dict | None = None
) -> dict:
    """The claim as JSON types. It covers all planned steps, however many were applied.

    ``inert_tensors`` were not trained, because no gradient reaches them. ``together`` is what this
    run and others on the same data cost, as ``together.cost_beside`` has it; None without others.

    `epsilon` holds certified bounds at the total `delta`; the claim is its `upper`. Without noise
    they are the string `inf` and `private` is false.
    """
    bounds = accounting.plan_epsilon(plan)
    private = plan.noise_multiplier > 0
    tail = 0.0
    if private:
        tail = accounting.noise_tail_delta(
            plan.sampling_rate,
            plan.noise_multiplier,
            plan.num_steps,
            plan.noised_values,
            plan.adjacency,
        )
    return {
        "private": private,
        "epsilon": {
            name: value if math.isfinite(value) else "inf"
            for name, value in zip(("lower", "estimate", "upper"), bounds, strict=False)
        },
        **plan.to_dict(),
        "expected_batch_size": plan.expected_batch_size,
        "noise_tail_delta": tail,
        "inert_tensors": inert_tensors,
        "mechanism": "Poisson-subsampled Gaussian",
        "accountant": bounds.accountant,
        "together": together,
        "versions": {name: version(name) for name in _PACKAGES},
    }


def to_json(report: dict) -> str:
    """The report as the text of `privacy_report.json`."""
    return json.dumps(report, indent=2, allow_nan=False) + "\n"


def plan_lines(plan: PrivacyPlan, folder: Path, inert_tensors: list[str]) -> str:
    """What a run is about to do, in public numbers."""
    noise = f"noise multiplier {plan.noise_multiplier:.4g}" if plan.noise_multiplier else "no noise"
    lines = (
        f"{folder}: {plan.num_steps} steps at sampling rate {plan.sampling_rate:.4g}, {noise}, "
        f"clip {plan.max_grad_norm:g},\n{plan.draws_per_record} draws per record, "
        f"{plan.trainable_parameters:,} trainable parameters, adjacency {plan.adjacency}"
    )
    if inert_tensors:
        lines += f"\n{len(inert_tensors)} LoRA tensors are not trained: no gradient reaches them"
    return lines


def facts(report: dict) -> list[str]:
    """What any wording of the statement says of this report, letter by letter."""
    if not report["private"]:
        return ["not private"]
    return [
        f"ε = {_round_up(report['epsilon']['upper'])}",
        f"δ = {report['delta']!r}",
        f"q = {report['sampling_rate']:.6g}",
        f"σ = {report['noise_multiplier']:.6g}",
        f"{report['num_steps']} steps",
        f"{report['max_grad_norm']:.6g}",
        f"{report['trainable_parameters']:,}",
        report["adjacency"],
        report["accountant"],
    ]


def claims(report: dict) -> set[str]:
    """Each number that a card of this report may call ε."""
    together = report.get("together") or {}
    found = [*report["epsilon"].values(), together.get("epsilon")]
    numbers = [float(epsilon) for epsilon in found if isinstance(epsilon, float)]
    return {_round_up(epsilon) for epsilon in numbers} | {f"{epsilon:.4f}" for epsilon in numbers}


def statement(report: dict) -> str:
    """The claim in sentences that a reviewer can check against the report."""
    if not report["private"]:
        return (
            "**This adapter is not private.** It was trained without noise (`--epsilon inf`): "
            "nothing protects the training images. Do not publish it as private."
        )
    epsilon, unit = report["epsilon"], report["unit"]
    of_each = f" of each of {report['rows_per_unit']} images" if report["rows_per_unit"] > 1 else ""
    clipped = _CLIPPING[report["clipping"]].format(bound=f"{report['max_grad_norm']:.6g}")
    return (
        "The adapter is (ε, δ)-differentially private with "
        f"**ε = {_round_up(epsilon['upper'])}** and **δ = {report['delta']!r}**.\n\n"
        f"- **Unit**: {_UNITS[unit].format_map(report)}.\n"
        f"- **Adjacency**: {report['adjacency']}: "
        f"{_NEIGHBOURS[report['adjacency']].format(unit=unit)}.\n"
        f"- **Mechanism**: {report['num_steps']} steps of the Gaussian mechanism on a Poisson "
        f"sample. In each step every {unit} takes part with probability "
        f"q = {report['sampling_rate']:.6g}. Its gradient, averaged over "
        f"{report['draws_per_record']} noise and timestep draws{of_each}, {clipped}; "
        f"Gaussian noise of standard deviation σ·C with "
        f"σ = {report['noise_multiplier']:.6g} is added to the sum of "
        f"{report['trainable_parameters']:,} coordinates, once.\n"
        f"- **Accounting**: `{report['accountant']}`, {REFERENCES[report['accountant']]}, "
        f"certifies {_bounds(report)} at δ less the cut tail of the noise, "
        f"{report['noise_tail_delta']:.2g}.\n"
        "- **Covered**: the adapter's weights and whatever is made from them, images included.\n"
        "- **Not covered**: the base model and the data it saw; prompts and the names of classes, "
        "which are public; choices made by looking at the "
        "private images before the run; other runs on the same images, whose ε add to this one's."
        f"{_others(report.get('together'))}"
    )


def _others(together: dict | None) -> str:
    """A line on the runs beside this one that used the same data."""
    if together is None:
        return ""
    names = ", ".join(f"`{printable(name)}`" for name in together["other_runs"])
    if together["epsilon"] is None:
        cost = "no ε can be told for all of them together"
    elif together["epsilon"] == "inf":
        cost = "all together are not private, as one was trained without noise"
    else:
        cost = (
            f"all together cost ε = {_round_up(together['epsilon'])} at δ = {together['delta']!r} "
            f"({together['adjacency']}), which is what holds where all are released"
        )
    return f"\n- **Other runs on the same images**: with {names}, {cost}."


def _bounds(report: dict) -> str:
    upper = f"ε ≤ {_round_up(report['epsilon']['upper'])}"
    # The others bound ε from above only.
    two_sided = report["accountant"] in ("analytic", "prv")
    return f"{report['epsilon']['lower']:.4f} ≤ {upper}" if two_sided else upper


def _round_up(epsilon: float) -> str:
    return f"{math.ceil(epsilon * 1e4) / 1e4:.4f}"


def model_card(settings: Settings, report: dict) -> str:
    """The Hugging Face model card of a run."""
    base = settings.model.base
    if Path(base).is_absolute():
        base = f"PATH_TO/{Path(base).name}"
    tags = ["lora", "diffusers"] + ["differential-privacy"] * report["private"]
    header = ["---", "library_name: diffusers", "tags:", *(f"- {tag}" for tag in tags)]
    return "\n".join(header) + (
        f"""
---

# LoRA adapter fine-tuned by dpengine

Base model: `{base}`. Rank {settings.model.rank}, alpha {settings.model.alpha:g}, on \
{", ".join(f"`{name}`" for name in settings.model.target_modules or ())}.

![Samples: the base model above, the adapter below](samples.png)

## Privacy

{statement(report)}

All numbers are in `privacy_report.json`, with the LoRA tensors that no gradient reaches and that \
were not trained; `ledger.jsonl` lists every step that was charged.

## Use

```python
{_usage(base, settings.data.prompt)}
```

`synthetic.npz` holds images and labels drawn from these weights.
"""
    )


def _usage(base: str, prompt: str | None) -> str:
    """How the adapter is used: in diffusers where the base follows prompts, else through us."""
    if prompt is None:
        return (
            "from dpengine import load_base\n"
            "from dpengine.models.adapter import load_lora\n\n"
            f'pipeline = load_base("{base}")\n'
            'load_lora(pipeline, "path/to/this/folder")\n'
            "images = pipeline([0, 1, 2])  # one label each, where the base has classes"
        )
    return (
        "from diffusers import DiffusionPipeline\n\n"
        f'pipeline = DiffusionPipeline.from_pretrained("{base}")\n'
        "# For PixArt, which has no loader of its own: dpengine.models.adapter.load_lora.\n"
        'pipeline.load_lora_weights("path/to/this/folder")\n'
        f"image = pipeline({json.dumps(prompt, ensure_ascii=False)}).images[0]"
    )


def summary(report: dict, folder: Path) -> str:
    """The closing lines of a run."""
    if report["private"]:
        claim = (
            f"epsilon = {_round_up(report['epsilon']['upper'])} at delta = {report['delta']!r} "
            f"({report['adjacency']}, one {report['unit']}, accountant {report['accountant']})"
        )
    else:
        claim = "not private: trained without noise"
    return f"{claim}\n{folder}: adapter, samples.png, synthetic.npz, privacy_report.json, README.md"

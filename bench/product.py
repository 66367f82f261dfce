"""The whole job, by one command of ours and by a script of Opacus, PEFT and diffusers.

Both start a process, calibrate the noise, train, save the adapter and draw synthetic images.

Ours alone finds the tensors that no gradient reaches, and leaves them as they are; checks the
per-record gradients of every other tensor against backward passes of single records; draws noise,
coins and timesteps from a cryptographic generator, a record's timesteps one from each of K strata;
writes a ledger line and a checkpoint for each step, both synced to disk; and draws 400 images more
for a picture, writes a report and a model card, and seals them by digests.

The script alone trains all tensors, those that no gradient reaches by noise; collates a batch image
by image, as `DataLoader` does; and has noise from `torch.randn`, which no key protects.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn

from dpengine.data import records as data
from dpengine.evaluation.scores import synthetic_accuracy
from dpengine.mechanism.sampling import cut
from dpengine.settings import DIGITS, PerformanceSettings, PrivacySettings, Settings
from dpengine.training.job import prepare
from dpengine.training.planning import make_plan
from dpengine.training.state import make_trainer

from . import opacus_finetune, process
from .results import ROOT
from .training import exact_float32

OURS = "dpengine"
SCRIPT = ("-m", "bench.opacus_finetune", "--draws")
COMMANDS = {
    OURS: ("-m", "dpengine.finetune"),
    "opacus average": (*SCRIPT, "average"),
    "opacus rows": (*SCRIPT, "rows"),
}


@dataclass(frozen=True)
class Job:
    """What both are told; the rest is the same by default."""

    num_steps: int
    num_synthetic: int = 2000
    epsilon: float = 8.0
    seed: int = 0

    def options(self, output: Path) -> list[str]:
        """The command line that gives the job to either."""
        given = {
            "--num-steps": self.num_steps,
            "--num-synthetic": self.num_synthetic,
            "--epsilon": self.epsilon,
            "--seed": self.seed,
            "--output": output,
        }
        return [str(part) for pair in given.items() for part in pair]


@dataclass(frozen=True)
class Outcome:
    """What a whole process took, claims and is good for; accuracy in [0, 1], of the last 360."""

    seconds: float
    peak_bytes: int
    accuracy: float
    epsilon: float
    noise_multiplier: float


def run(side: str, job: Job) -> Outcome:
    """The whole process in a new folder, with nothing kept from another run."""
    with TemporaryDirectory() as folder:
        output, cache = Path(folder, "output"), Path(folder, "cache")
        command = [sys.executable, *COMMANDS[side], *job.options(output)]
        # Ours would find the calibration of an earlier run there.
        # The font list of matplotlib, which ours alone draws with, is no part of the job.
        kept = {"XDG_CACHE_HOME": str(cache), "MPLCONFIGDIR": matplotlib.get_cachedir()}
        finished = process.run(command, ROOT, kept)
        with np.load(output / "synthetic.npz") as synthetic:
            accuracy = synthetic_accuracy(synthetic["images"], synthetic["labels"])
        return Outcome(finished.seconds, finished.peak_bytes, accuracy, *claim(side, output))


def claim(side: str, output: Path) -> tuple[float, float]:
    """The epsilon that a finished run claims, an upper bound, and its noise multiplier."""
    if side == OURS:
        report = json.loads((output / "privacy_report.json").read_text())
        return report["epsilon"]["upper"], report["noise_multiplier"]
    claimed = json.loads((output / "claim.json").read_text())
    return claimed["epsilon"], claimed["noise_multiplier"]


def per_step(few: list[float], many: list[float], n_few: int, n_many: int) -> list[float]:
    """Seconds of one step from whole runs of ``n_few`` and ``n_many`` steps, round by round."""
    return [(b - a) / (n_many - n_few) for a, b in zip(few, many, strict=True)]


def besides_steps(few: list[float], many: list[float], n_few: int, n_many: int) -> list[float]:
    """Seconds that a run takes for all that is no step, round by round."""
    steps = per_step(few, many, n_few, n_many)
    return [whole - n_few * step for whole, step in zip(few, steps, strict=True)]


@dataclass(frozen=True)
class Batch:
    """A logical batch without secrets: the first digits, K draws of each, in physical batches.

    rows: images [N·K, 1, 8, 8], labels and timesteps [N·K], diffusion noise as images.
    """

    rows: tuple[Tensor, ...]
    n_records: int
    n_physical: int

    @property
    def physical(self) -> list[tuple[Tensor, ...]]:
        """The rows of each physical batch, all of one size."""
        return list(zip(*(tensor.chunk(self.n_physical) for tensor in self.rows), strict=True))

    def to(self, dtype: torch.dtype) -> "Batch":
        """The same with floating-point rows in ``dtype``."""
        rows = tuple(t.to(dtype) if t.is_floating_point() else t for t in self.rows)
        return Batch(rows, self.n_records, self.n_physical)


_ROWS = ("latents", "labels", "times", "diffusion_noise")


def fixed_batch(n_records: int, n_physical: int) -> Batch:
    """Timesteps and diffusion noise from a seed; ``n_physical`` divides ``n_records``."""
    generator = torch.Generator().manual_seed(0)
    digits = data.load(DIGITS, [str(digit) for digit in range(10)], 1, 8)
    draws = opacus_finetune.DRAWS
    images = digits.images[:n_records].repeat_interleave(draws, 0)
    labels = digits.labels[:n_records].repeat_interleave(draws)
    timesteps = torch.randint(1000, labels.shape, generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    return Batch((images, labels, timesteps, noise), n_records, n_physical)


def our_sum(batch: Batch, bound: float) -> dict[str, Tensor]:
    """The sum of the batch clipped to ``bound`` by the engine, without noise; of each tensor that
    is trained."""
    settings = Settings(
        privacy=PrivacySettings(epsilon=math.inf, max_grad_norm=bound),
        performance=PerformanceSettings(physical_batch_size=batch.n_records // batch.n_physical),
    )
    job = prepare(settings)
    unet = job.objective.denoiser
    _fill_lora_b(unet)
    plan = make_plan(settings.privacy, job)
    optimizer = make_trainer(settings, plan, job.capture.parameters).optimizer
    indices = np.arange(batch.n_records)[:, None]
    for piece, rows in zip(cut(indices, job.physical_batch_size), batch.physical, strict=True):
        job.capture.announcements.announce(piece.notice)
        job.backward(dict(zip(_ROWS, rows, strict=True)))
        optimizer.step()
    return _sum_of(unet, plan.expected_batch_size)


def their_sum(
    batch: Batch, draws: str, dtype: torch.dtype, bound: float = opacus_finetune.MAX_GRAD_NORM
) -> tuple[dict[str, Tensor], Tensor]:
    """The same by the script, computed in ``dtype``, and the norms that it clipped.

    The norms are of records, or of rows where it clips those.  [N] or [N·K]
    """
    base = opacus_finetune.load_base(seed=0)
    _fill_lora_b(base.unet)
    base.unet.to(dtype)
    base.classes.to(dtype)
    digits = opacus_finetune.private_digits()
    model, optimizer, _ = opacus_finetune.make_private(base.unet, digits, 0.0, draws, bound)
    norms = []
    for number, rows in enumerate(batch.to(dtype).physical, start=1):
        optimizer.signal_skip_step(number < batch.n_physical)
        opacus_finetune.clip_and_step(model, optimizer, base, draws, *rows)
        norms.append(_norms([param.grad_sample for param in optimizer.params]).cpu())
        if number < batch.n_physical:
            optimizer.zero_grad()
    return _sum_of(base.unet, optimizer.expected_batch_size), torch.cat(norms)


@dataclass(frozen=True)
class Agreement:
    """How far the two clipped sums of one batch are apart, over the length of theirs.

    tolerance: twice what float32 does to the script's own sum, and what Opacus' 1e-6 does, by
    which it divides a record's C by its norm + 1e-6.
    """

    distance: float
    tolerance: float


def agreement(
    batch: Batch, ours: Callable[[Batch, float], dict[str, Tensor]] = our_sum
) -> Agreement:
    """Compare the sums of the records' clipped mean gradients; in float64 the script is exact.

    C is the median of the records' norms, so that half of them show the scale of their gradients.
    """
    _, norms = their_sum(batch, "average", torch.float64)
    bound = float(norms.quantile(0.5))
    with exact_float32():
        exact, _ = their_sum(batch, "average", torch.float64, bound)
        theirs, _ = their_sum(batch, "average", torch.float32, bound)
        own = ours(batch, bound)
    # A clipped record has C·norm / (norm + 1e-6) of length for C, another one its own.
    shortened = float((1e-6 * bound / norms.clamp(min=bound)).sum()) / _length(exact)
    return Agreement(_distance(own, theirs), 2 * _distance(theirs, exact) + shortened)


def signal_of_rows(batch: Batch) -> float:
    """Length of the update where rows are clipped over that where records are, without noise.

    The noise of both has one length, so this is also the ratio of signal to noise.
    """
    average, _ = their_sum(batch, "average", torch.float32)
    rows, _ = their_sum(batch, "rows", torch.float32)
    return _length(rows) / opacus_finetune.DRAWS / _length(average)


def _fill_lora_b(unet: nn.Module) -> None:
    """Let lora_a have a gradient, which it has not where lora_b is zero."""
    generator = torch.Generator().manual_seed(1)
    for name, param in unet.named_parameters():
        if "lora_B" in name:
            param.data.copy_(0.1 * torch.randn(param.shape, generator=generator))


def _sum_of(unet: nn.Module, divisor: float) -> dict[str, Tensor]:
    """The sums that gradients were divided from, in float64, of the tensors that have some."""
    named = unet.named_parameters()
    return {n: divisor * p.grad.double().cpu() for n, p in named if p.grad is not None}


def _norms(grads: list[Tensor]) -> Tensor:
    return torch.cat([grad.flatten(1) for grad in grads], 1).norm(dim=1)


def _length(total: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in total.values()))


def _distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Of two sums, over the length of the other; a tensor that one lacks is zero there."""
    nothing = torch.zeros(())
    gaps = {n: one.get(n, nothing) - other.get(n, nothing) for n in one.keys() | other.keys()}
    return _length(gaps) / _length(other)

"""What is observed: releases of the engine, and which canaries were in each."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..errors import PrivacyError
from ..mechanism.plan import PrivacyPlan
from ..mechanism.sampling import PoissonSampler
from ..mechanism.secure_random import SecureRandom
from .canaries import Engine

_MAX_CHECKED = 2**22
"""Values of a multi-step audit's releases that are kept to look at their noise."""

_UNITS = 2**20
"""Units of which coins are tossed at a time."""


@dataclass(frozen=True)
class Releases:
    """Noisy sums of canaries, in units of C.

    values: float64 [releases, D]. entered: bool [releases, D], which canaries each sum holds.
    """

    values: Tensor = field(repr=False)
    entered: Tensor = field(repr=False)

    @property
    def residuals(self) -> Tensor:
        """What is left of each sum without its canaries: noise.  float64 [releases, D]"""
        return self.values - self.entered.double()


@dataclass(frozen=True)
class Scores:
    """Of each canary of each multi-step run, how likely it is in, and whether it was.

    scores: float64 [runs, D], log-likelihood ratios. is_in: bool [runs, D], in the data set.
    entries: how many times a canary entered a batch; chances: how many times it could have.
    """

    scores: np.ndarray = field(repr=False)
    is_in: np.ndarray = field(repr=False)
    entries: int
    chances: int


def one_step(plan: PrivacyPlan, n_runs: int, device: str) -> Releases:
    """``n_runs`` runs of a plan of one step at rate 1; a fair secret coin for each canary.

    With and without a canary are neighbours under add-remove. The step takes all that is in the
    data, so the mechanism is the Gaussian one on all records; the coin is the attacker's
    uncertainty and no part of it. The canaries are orthogonal and the noise independent, so each
    coordinate is an observation on its own: N(b, σ²) with b = 1 if the canary is in.
    """
    random = SecureRandom()
    kept: list[tuple[Tensor, Tensor]] = []
    for _ in range(n_runs):
        kept += _steps(plan, random.bernoulli(0.5, plan.trainable_parameters), device)
    return _stack(kept)


def many_steps(plan: PrivacyPlan, n_runs: int, device: str) -> tuple[Scores, Releases]:
    """``n_runs`` runs of the plan's Poisson steps; a fair secret coin puts a canary in the data.

    Score of a canary: ``Σ_t log(1 - q + q exp((2 x_t - 1) / (2 σ²)))`` over its coordinate x_t of
    each release, the log-likelihood ratio of both worlds. The releases are those of the first
    steps, for checks of their noise.
    """
    random = SecureRandom()
    scores, is_in = [], []
    kept: list[tuple[Tensor, Tensor]] = []
    entries = chances = 0
    for _ in range(n_runs):
        members = random.bernoulli(0.5, plan.trainable_parameters)
        total = torch.zeros(plan.trainable_parameters, dtype=torch.float64)
        for value, entered in _steps(plan, members, device):
            total += _log_likelihood_ratio(value, plan)
            entries, chances = entries + int(entered.sum()), chances + int(members.sum())
            if len(kept) * len(value) < _MAX_CHECKED:
                kept.append((value, entered))
        scores.append(total.numpy())
        is_in.append(members)
    return Scores(np.stack(scores), np.stack(is_in), entries, chances), _stack(kept)


def toss(plan: PrivacyPlan, n_coins: int) -> tuple[int, int]:
    """How many coins of the plan's sampler took their unit, and how many were tossed.

    ``n_coins`` at least, in whole logical batches; nothing is trained.
    """
    num_steps = -(-n_coins // _UNITS)
    sampler = PoissonSampler(
        _UNITS,
        plan,
        num_steps=num_steps,
        physical_batch_size=_UNITS,
        reserve=lambda: None,
        announce=lambda notice: None,
        pad=False,
    )
    return sum(len(batch.indices) for batch in sampler), num_steps * _UNITS


def _stack(releases: list[tuple[Tensor, Tensor]]) -> Releases:
    values, entered = zip(*releases, strict=True)
    return Releases(torch.stack(values), torch.stack(entered))


def _steps(plan: PrivacyPlan, members: np.ndarray, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Each release of a fresh engine, and which canaries its logical batch held.  [D], bool [D]

    members: bool [D], which canaries the data holds; one at least, of 64 coins or more.
    """
    engine, data = Engine.of(plan, device), np.flatnonzero(members)
    sampler = PoissonSampler(
        len(data),
        plan,
        num_steps=plan.num_steps,
        # Below the expected size: most logical batches take several passes, and some padding.
        physical_batch_size=int(0.6 * plan.expected_batch_size) + 1,
        reserve=lambda: None,  # nobody's data: there is no budget to charge
        announce=engine.capture.announcements.announce,
    )
    entered = torch.zeros(len(members), dtype=torch.bool)
    for batch in sampler:
        chosen = data[batch.indices[:, 0]]
        engine.step(chosen, batch.n_slots)
        entered[torch.from_numpy(chosen)] = True
        if batch.is_last:
            yield _finite(engine.released()), entered
            entered = torch.zeros_like(entered)


def _log_likelihood_ratio(values: Tensor, plan: PrivacyPlan) -> Tensor:
    q = plan.sampling_rate
    absent = torch.tensor(math.log1p(-q) if q < 1 else -math.inf, dtype=torch.float64)
    present = math.log(q) + (2 * values - 1) / (2 * plan.noise_multiplier**2)
    return torch.logaddexp(absent, present)


def _finite(values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise PrivacyError("the engine released a value that is not finite; its noise is broken")
    return values.cpu()

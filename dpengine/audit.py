"""What an attacker gets out of the engine, beside what the engine claims.

python -m dpengine.audit

It brings records of its own, canaries, and takes neither data nor a run's folder: an audit needs to
know which records were in, and to see many releases, and on a private run both would be leaks.
Nothing here says anything of a run's data; what it says is of the code that ran on this machine.
"""

if __name__ == "__main__":  # before torch is loaded
    from .threads import sleep_soon

    sleep_soon()


import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

from . import accounting, auditing, cli, durable
from .auditing import Check, Releases, Scores
from .errors import not_negative, positive, positive_int
from .plan import PrivacyPlan
from .progress import phase
from .settings import UserPath

FALSE_ALARM = 1e-4
"""Chance that any of the checks of the noise fails in a right engine, all of them together."""

_LONG_RUN = 64, 0.02
"""Canaries of the long run, and their sampling rate: few records, so that a step takes little."""

_PACKAGES = ("dpengine", "torch", "numpy", "scipy", "prv-accountant")


@dataclass(frozen=True)
class AuditSettings:
    """Attack the engine with canaries of its own. For no private run: it takes no data and no run.

    Prints lower bounds on epsilon beside the claims, and p-values of the noise. Exit status 1 where
    a bound is above its claim or a check fails, else 0. A right engine ends in 1 about 3 times in
    1000 with the default confidence; a second audit tells.
    """

    noise_multiplier: float = 1.0
    """Noise standard deviation over the clip bound; every other number is the audit's own."""
    delta: float = 1e-5
    """Delta of all claims and bounds."""
    confidence: float = 0.95
    """Confidence of each lower bound."""
    runs: int = 1024
    """One-step runs, each by a fresh engine."""
    canaries: int = 1024
    """Canaries of a one-step run, and coordinates; runs times canaries are observed."""
    multi_step_runs: int = 32
    """Runs of many steps with Poisson sampling; 0 leaves them out, 256 bring a million canaries."""
    multi_step_canaries: int = 4096
    """Canaries of such a run, and coordinates."""
    sampling_rate: float = 0.1
    """Probability with which a canary in the data enters each of the many steps."""
    num_steps: int = 100
    """Steps of a run of many."""
    long_run_steps: int = 5000
    """Steps of one run of few canaries, beyond what a counter might hold; 0 leaves it out."""
    coins: int = 100_000_000
    """Coins of the sampler that are counted beside the runs of many steps; 0 counts none."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the engine runs: cpu, or cuda for the Triton kernels."""
    output: UserPath | None = None
    """New file to write the results to, as JSON."""

    def check(self) -> None:
        """Raise ValueError for a number outside its range, or a device or folder that is not."""
        positive(noise_multiplier=self.noise_multiplier)
        if not 0.5 <= self.confidence < 1:
            raise ValueError(f"confidence must be at least 0.5 and below 1, got {self.confidence}")
        positive_int(runs=self.runs, num_steps=self.num_steps)
        not_negative(multi_step_runs=self.multi_step_runs, coins=self.coins)
        not_negative(long_run_steps=self.long_run_steps)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device must be cpu where torch finds no GPU, got 'cuda'")
        if self.output is not None:
            durable.check_new_file("output", self.output)


@dataclass(frozen=True)
class Bound:
    """A lower bound beside the claimed upper bound. None as claim: an indication, not a bound."""

    name: str
    lower: float
    claimed: float | None

    @property
    def is_leak(self) -> bool:
        """Whether the claim is refuted."""
        return self.claimed is not None and not self.lower <= self.claimed


@dataclass(frozen=True)
class Part:
    """What one attack found."""

    title: str
    bounds: list[Bound]
    checks: list[Check]
    noise_multiplier: tuple[float, float, float]
    """Estimate, and the ends of its interval."""


def attacks(settings: AuditSettings) -> list[Callable[[], Part]]:
    """The attacks, yet to be called; errors in the settings are raised here, before any work."""
    settings.check()
    plan = _plan(settings, settings.canaries, sampling_rate=1.0, num_steps=1)
    found = [partial(_one_step, settings, plan, accounting.plan_epsilon(plan).upper)]
    if settings.multi_step_runs > 0:
        plan = _plan(
            settings, settings.multi_step_canaries, settings.sampling_rate, settings.num_steps
        )
        claimed = accounting.plan_epsilon(plan).upper
        runs, coins = settings.multi_step_runs, settings.coins
        found.append(partial(_many_steps, settings, plan, claimed, runs, coins))
    if settings.long_run_steps > 0:
        plan = _plan(settings, *_LONG_RUN, settings.long_run_steps)
        found.append(
            partial(_many_steps, settings, plan, accounting.plan_epsilon(plan).upper, 1, 0)
        )
    return found


def _one_step(settings: AuditSettings, plan: PrivacyPlan, claimed: float) -> Part:
    """The Gaussian mechanism, its threshold fixed in advance half way, at C/2."""
    releases = auditing.one_step(plan, settings.runs, settings.device)
    scores, is_in = releases.values.numpy().ravel(), releases.entered.numpy().ravel()
    rates = auditing.bound_error_rates(scores, is_in, 0.5, settings.confidence)
    mu = auditing.mu_lower_bound(rates)
    bounds = [
        Bound("mu", mu, 1 / plan.noise_multiplier),
        Bound("epsilon, Gaussian", auditing.gdp_epsilon(mu, plan.delta), claimed),
        Bound("epsilon, any mechanism", auditing.epsilon_lower_bound(rates, plan.delta), claimed),
    ]
    title = f"one step on all records, {scores.size:,} canaries"
    return _part(title, bounds, releases, settings)


def _many_steps(
    settings: AuditSettings, plan: PrivacyPlan, claimed: float, n_runs: int, n_coins: int
) -> Part:
    """Poisson steps; thresholds chosen on one half of the canaries, for the other half."""
    scores, releases = auditing.many_steps(plan, n_runs, settings.device)
    bounds = _bounds(scores, plan, claimed, settings.confidence)
    title = (
        f"{plan.num_steps} Poisson steps at sampling rate {plan.sampling_rate:g}, "
        f"{scores.is_in.size:,} canaries"
    )
    rates = [auditing.check_rate(scores.entries, scores.chances, plan.sampling_rate)]
    if n_coins > 0:
        alone = auditing.check_rate(*auditing.toss(plan, n_coins), plan.sampling_rate)
        rates.append(alone._replace(name="sampling rate, the sampler alone"))
    return _part(title, bounds, releases, settings, rates)


def _bounds(scores: Scores, plan: PrivacyPlan, claimed: float, confidence: float) -> list[Bound]:
    halves = [
        (scores.scores[:, half].ravel(), scores.is_in[:, half].ravel())
        for half in (slice(0, None, 2), slice(1, None, 2))
    ]
    (chosen_on, bounded_on), alone = halves, {"confidence": confidence}
    threshold = auditing.threshold_for_epsilon(*chosen_on, delta=plan.delta, **alone)
    rates = auditing.bound_error_rates(*bounded_on, threshold, confidence)
    any_mechanism = auditing.epsilon_lower_bound(rates, plan.delta)
    threshold = auditing.threshold_for_inversion(*chosen_on, **alone)
    rates = auditing.bound_error_rates(*bounded_on, threshold, confidence)
    as_gaussian = auditing.gdp_epsilon(auditing.mu_lower_bound(rates), plan.delta)
    inverted = auditing.subsampled_epsilon_lower_bound(
        rates,
        threshold,
        sampling_rate=plan.sampling_rate,
        num_steps=plan.num_steps,
        delta=plan.delta,
        claimed_noise_multiplier=plan.noise_multiplier,
    )
    return [
        Bound("epsilon, Poisson sampling", inverted, claimed),
        Bound("epsilon, any mechanism", any_mechanism, claimed),
        Bound("epsilon, as if Gaussian", as_gaussian, None),
    ]


def _plan(
    settings: AuditSettings, canaries: int, sampling_rate: float, num_steps: int
) -> PrivacyPlan:
    """The plan that the engine runs: its claim is what a training run of it would claim."""
    auditing.check_number_of_canaries(canaries)
    return PrivacyPlan(
        sampling_rate=sampling_rate,
        noise_multiplier=settings.noise_multiplier,
        num_steps=num_steps,
        max_grad_norm=auditing.MAX_GRAD_NORM,
        delta=settings.delta,
        public_dataset_size=canaries // 2,
        adjacency="add-remove",
        draws_per_record=1,
        trainable_parameters=canaries,
    )


def _part(
    title: str,
    bounds: list[Bound],
    releases: Releases,
    settings: AuditSettings,
    more: list[Check] | None = None,
) -> Part:
    sigma = settings.noise_multiplier
    checks = auditing.check_releases(releases, sigma) + (more or [])
    interval = auditing.noise_interval(releases.residuals, settings.confidence)
    return Part(title, bounds, checks, interval)


def _alarm_level(parts: list[Part]) -> float:
    return FALSE_ALARM / sum(len(part.checks) for part in parts)


def findings(parts: list[Part]) -> list[str]:
    """What is wrong, one sentence for each; none in a right engine."""
    level = _alarm_level(parts)
    found = []
    for part in parts:
        found += [
            f"{part.title}: {bound.name} is at least {bound.lower:.4f}, above the claimed "
            f"{bound.claimed:.4f}"
            for bound in part.bounds
            if bound.is_leak
        ]
        found += [
            f"{part.title}: {check.name} is not as claimed, p = {check.p_value:.2g}"
            for check in part.checks
            if not check.p_value >= level
        ]
    return found


def _line(name: str, seen: str, claimed: str) -> str:
    return f"{name:<58}{seen:>18}{claimed:>14}"


def _table(parts: list[Part], settings: AuditSettings) -> str:
    level = f"{_alarm_level(parts):.1g}"
    lines = [f"Audit of the engine on {settings.device} with canaries, delta {settings.delta:g}"]
    for part in parts:
        lines += ["", _line(part.title, f"{100 * settings.confidence:g} % sure", "claimed")]
        for bound in part.bounds:
            claim = "no bound" if bound.claimed is None else f"<= {bound.claimed:.4f}"
            lines.append(_line(f"  {bound.name}", f">= {bound.lower:.4f}", claim))
        estimate, low, high = part.noise_multiplier
        name, seen = f"  noise multiplier {estimate:.4f}", f"{low:.4f} to {high:.4f}"
        lines.append(_line(name, seen, f"{settings.noise_multiplier:.4f}"))
        lines.append(_line("  checks of what is released", "p", "fails below"))
        lines += [_line(f"    {name}", f"{p:.2g}", level) for name, p in part.checks]
    return "\n".join(lines)


def _write(file: Path, settings: AuditSettings, parts: list[Part], seconds: float) -> None:
    result = {
        "settings": asdict(settings),
        "parts": [
            asdict(part) | {"checks": {check.name: check.p_value for check in part.checks}}
            for part in parts
        ],
        "false_alarm": FALSE_ALARM,
        "findings": findings(parts),
        "seconds": round(seconds, 1),
        "versions": {name: version(name) for name in _PACKAGES},
    }
    with file.open("x", encoding="utf-8") as opened:
        opened.write(json.dumps(result, indent=2, allow_nan=False) + "\n")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Thousands of small steps: threads wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def audit(settings: AuditSettings) -> int:
    """Run the command; 1 where the engine does not keep what it claims."""
    start, parts = time.monotonic(), []
    with _one_thread():
        asked = attacks(settings)
        for number, attack in enumerate(asked, start=1):
            phase(f"Attack {number} of {len(asked)}")
            parts.append(attack())
    seconds = time.monotonic() - start
    print(_table(parts, settings))
    found = findings(parts)
    print(f"\n{seconds:.0f} s. " + ("No leak found." if not found else "The engine is broken:"))
    for finding in found:
        print(f"  {finding}")
    if settings.output is not None:
        _write(Path(settings.output), settings, parts, seconds)
    return int(bool(found))


def main(args: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run("python -m dpengine.audit", AuditSettings, audit, args)


if __name__ == "__main__":
    raise SystemExit(main())

"""What is charged, what comes back, and the error of a number that cannot be certified."""

import math
from typing import Literal, NamedTuple

from ..errors import positive, positive_int, probability

AccountantName = Literal["analytic", "pld", "prv", "dp-accounting", "rdp", "exact"]

REFERENCES = {
    "analytic": "closed form of the Gaussian mechanism, subsampled for one step (arXiv 1805.06530)",
    "pld": "privacy loss distributions, rounded up and tilted (arXiv 2207.04380)",
    "prv": "composition of privacy random variables (prv-accountant; arXiv 2106.02848)",
    "dp-accounting": "privacy loss distributions, rounded up (dp-accounting; arXiv 2207.04380)",
    "rdp": "Rényi divergences of the subsampled Gaussian (arXiv 1908.10530)",
    "exact": "no accountant: no step was charged, or one without noise",
}
"""What each accountant is, and where it is described."""


class AccountingError(ValueError):
    """The accountant cannot certify a number for this setting."""


class Charge(NamedTuple):
    """``num_steps`` Gaussian mechanisms with Poisson subsampling; a rate of 1 is none.

    noised_values: how many values each of them noises, for the tail of the generator.
    """

    sampling_rate: float
    noise_multiplier: float
    num_steps: int
    noised_values: int


class Epsilon(NamedTuple):
    """Certified bounds of ε around an estimate, and who gave them. The claim is always ``upper``.

    accountant: `analytic` and `prv` certify both sides; `pld`, `dp-accounting` and `rdp` bound ε
    from above only, so that ``lower`` is 0 and the estimate is the bound; `exact` where nothing or
    everything is spent.
    """

    lower: float
    estimate: float
    upper: float
    accountant: AccountantName


class Part(NamedTuple):
    """All charges of one rate and noise; those with rate 1 are a single Gaussian."""

    sampling_rate: float
    noise_multiplier: float
    num_steps: int


def parts(charges: list[Charge]) -> list[Part]:
    """``charges`` by rate and noise. Raises ValueError for a value out of range.

    Gaussian mechanisms on all records are one with 1/σ² = Σ 1/σ_t², exactly: their privacy losses
    are normal with variance equal to twice their mean, and add up.
    """
    steps: dict[tuple[float, float], int] = {}
    full = 0.0
    for charge in charges:
        probability(sampling_rate=charge.sampling_rate)
        positive(noise_multiplier=charge.noise_multiplier)
        positive_int(num_steps=charge.num_steps)
        if charge.sampling_rate == 1:
            full += charge.num_steps / charge.noise_multiplier**2
        else:
            key = charge.sampling_rate, charge.noise_multiplier
            steps[key] = steps.get(key, 0) + charge.num_steps
    found = [Part(*key, n) for key, n in steps.items()]
    return [*found, Part(1.0, 1 / math.sqrt(full), 1)] if full > 0 else found


def uncertified(q: float, sigma: float, num_steps: int, delta: float) -> AccountingError:
    """The refusal of a setting."""
    return AccountingError(
        f"epsilon cannot be certified for sampling rate {q:.6g}, noise multiplier {sigma:.6g}, "
        f"{num_steps} steps and delta {delta:.3g}; choose an epsilon nearer to 1, a lower "
        "sampling rate, fewer steps, or a larger delta"
    )

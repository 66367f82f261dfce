"""What charges cost together, by the first accountant that has an answer.

Neighbours, and why noise of standard deviation σ C covers them. A step's sum is of Poisson-sampled
contributions, each of norm at most C, and divided by the constant σ C:

- **Add-remove** and **zero-out**: with probability q the record is sampled and moves the sum by at
  most 1/σ, else by 0. The pair ``(1 - q) N(0, 1) + q N(1/σ, 1)`` and ``N(0, 1)`` dominates (Zhu,
  Dong, Wang, arXiv 2106.08567), in both directions.
- **Replace-one**: the record and what replaces it are given the same coin. With probability q the
  sum holds u in the one case and v in the other, both of norm at most 1/σ, and they may be 2/σ
  apart: doubling C in the accountant of add-remove would not describe this, for the sum without
  either is likely too. The dominating pair is ``(1 - q) N(0, 1) + q N(±1/σ, 1)``. Proof: let S be a
  set of outputs and s its probability under N(0, I). By Neyman and Pearson S has at most
  ``Φ(Φ⁻¹(s) + 1/σ)`` under N(u, I) and at least ``Φ(Φ⁻¹(s) - 1/σ)`` under N(v, I). So for every ε
  ``P(S) - e^ε Q(S) <= (1 - q)(1 - e^ε) s + q (Φ(Φ⁻¹(s) + 1/σ) - e^ε Φ(Φ⁻¹(s) - 1/σ))``, with
  equality for half-lines and u = -v = 1/σ in one dimension. The coins and records of the others
  shift both cases alike. At q = 1 it is one Gaussian with shift 2/σ.

Both hold for adaptive clipping as they stand: sum and count, each over its own noise, are one query
whose contribution of a record has norm at most 1/σ (``adaptive.Adaptive``), and u and v above are
two such contributions. Dominating pairs compose over steps that are chosen by what earlier ones
gave out (Zhu, Dong, Wang, theorem 10).
"""

import math

from ..errors import positive
from ..mechanism.plan import Adjacency, PrivacyPlan
from . import analytic, pld, prv, rdp
from .charges import AccountantName, AccountingError, Charge, Epsilon, Part, parts, uncertified
from .tail import noise_tail_delta

EPS_ERROR = 0.0008
"""Half the width, relative above ε = 1, of the interval that is certified around an estimate."""

_LEAST_NOISE = 1e-3
"""Less noise costs an ε near 500,000, and its moments overflow."""

_MAX_BY_PRV = 100.0
"""RDP bound above which PRV is not asked: at ε near 760 it was seen 1e-3 of it below PLD."""

_INSTALL = "install it by pip install dp-accounting"


def compute_epsilon(
    sampling_rate: float,
    noise_multiplier: float,
    num_steps: int,
    delta: float,
    adjacency: Adjacency = "add-remove",
    *,
    eps_error: float = EPS_ERROR,
) -> Epsilon:
    """ε of ``num_steps`` Poisson-subsampled Gaussian mechanisms at ``delta``.

    The tail that the sampler of the noise cuts is not in ``delta``: subtract ``noise_tail_delta``
    first.

    Raises AccountingError where no accountant can certify a number, and for `replace-one` without
    the library dp-accounting.
    """
    charge = Charge(sampling_rate, noise_multiplier, num_steps, noised_values=1)
    return composed([charge], delta, adjacency, eps_error)


def spent(
    sampling_rate: float,
    noise_multiplier: float,
    num_steps: int,
    delta: float,
    trainable_parameters: int,
    adjacency: Adjacency = "add-remove",
    *,
    eps_error: float = EPS_ERROR,
) -> Epsilon:
    """ε at the total ``delta``, the cut tail of the noise charged first. 0 steps spend nothing."""
    charge = Charge(sampling_rate, noise_multiplier, num_steps, trainable_parameters)
    return spent_together([charge], delta, adjacency, eps_error=eps_error)


def spent_together(
    charges: list[Charge],
    delta: float,
    adjacency: Adjacency = "add-remove",
    *,
    eps_error: float = EPS_ERROR,
) -> Epsilon:
    """ε of ``charges`` on one data set at the total ``delta``, the tails of their noise included.

    The mechanisms may be interleaved, and their queries chosen by what earlier ones gave out; their
    rates, noise and number must not be.
    """
    charges = [charge for charge in charges if charge.num_steps > 0]
    return _of_all_or_nothing(charges) or composed(
        charges, _without_tails(charges, delta, adjacency), adjacency, eps_error
    )


def second_opinion(
    charges: list[Charge],
    delta: float,
    adjacency: Adjacency = "add-remove",
    *,
    first: AccountantName = "prv",
) -> Epsilon:
    """The same by an accountant other than ``first``: PRV, PLD if installed, or else RDP.

    Of `replace-one` only PLD knows, so there the opinion is by the accountant of the claim itself.
    Raises AccountingError as ``spent_together`` does.
    """
    charges = [charge for charge in charges if charge.num_steps > 0]
    trivial = _of_all_or_nothing(charges)
    if trivial:
        return trivial
    delta = _without_tails(charges, delta, adjacency)
    if adjacency == "replace-one":
        return _replaced(_certifiable(charges, delta), delta)
    found = _certifiable(charges, delta)
    bound, answer = rdp.upper(found, delta), None
    if first != "prv" and bound <= _MAX_BY_PRV:
        answer = _plausible(prv.bounds(found, delta, EPS_ERROR, coarser=True), bound)
    if answer is None and first != "pld":
        answer = _by_pld(found, delta, bound)
    return _least(answer, bound, found, delta)


def plan_epsilon(
    plan: PrivacyPlan, num_steps: int | None = None, *, eps_error: float = EPS_ERROR
) -> Epsilon:
    """ε of ``num_steps`` steps of ``plan``, all of them by default, at the plan's δ."""
    return spent(
        plan.sampling_rate,
        plan.noise_multiplier,
        plan.num_steps if num_steps is None else num_steps,
        plan.delta,
        plan.noised_values,
        plan.adjacency,
        eps_error=eps_error,
    )


def composed(
    charges: list[Charge], delta: float, adjacency: Adjacency, eps_error: float
) -> Epsilon:
    """ε of all of ``charges`` together; their tails are not in ``delta``.

    The closed form where there is one; else PRV where its grid for ``eps_error`` is small; else
    PLD; else PRV with the error that a grid of bearable size has; else RDP. An answer above the RDP
    bound gives way to that bound, and one wholly above it is wrong, and not used.
    """
    positive(delta=delta)
    closed = analytic.bounds(parts(charges), delta, replace_one=adjacency == "replace-one")
    if closed is not None:
        return closed
    found = _certifiable(charges, delta)
    if adjacency == "replace-one":
        return _replaced(found, delta)
    bound = rdp.upper(found, delta)
    answer = _by_prv(found, delta, eps_error, bound) if bound <= _MAX_BY_PRV else None
    answer = answer or _by_pld(found, delta, bound)
    if answer is None and bound <= _MAX_BY_PRV:
        answer = _plausible(prv.bounds(found, delta, eps_error, coarser=True), bound)
    return _least(answer, bound, found, delta)


def _certifiable(charges: list[Charge], delta: float) -> list[Part]:
    found = parts(charges)
    least = min(found, key=lambda part: part.noise_multiplier)
    if least.noise_multiplier < _LEAST_NOISE:
        raise uncertified(*least, delta)
    return found


def _of_all_or_nothing(charges: list[Charge]) -> Epsilon | None:
    if not charges:
        return Epsilon(0.0, 0.0, 0.0, "exact")
    if any(charge.noise_multiplier == 0 for charge in charges):
        return Epsilon(math.inf, math.inf, math.inf, "exact")
    return None


def _without_tails(charges: list[Charge], delta: float, adjacency: Adjacency) -> float:
    tail = sum(noise_tail_delta(*charge, adjacency) for charge in charges)
    if tail > delta / 1000:
        least = min(charge.noise_multiplier for charge in charges)
        raise AccountingError(
            f"the tail of the noise generator adds {tail:.2g} to delta, more than delta/1000 = "
            f"{delta / 1000:.2g}, at noise multiplier {least:.4g}; lower epsilon or the "
            "number of steps, or raise delta"
        )
    return delta - tail


def _by_prv(found: list[Part], delta: float, eps_error: float, bound: float) -> Epsilon | None:
    # The error is relative above 1. RDP is seldom twice too high; where it is, ask once more.
    wanted = eps_error * max(1.0, bound / 2)
    answer = _plausible(prv.bounds(found, delta, wanted), bound)
    if answer is not None and wanted > eps_error * max(1.0, answer.estimate):
        wanted = eps_error * max(1.0, answer.estimate)
        answer = _plausible(prv.bounds(found, delta, wanted), bound)
    return answer


def _plausible(answer: Epsilon | None, bound: float) -> Epsilon | None:
    return None if answer is None or answer.lower > bound else answer


def _by_pld(found: list[Part], delta: float, bound: float) -> Epsilon | None:
    upper = pld.upper(found, delta, bound) if pld.is_installed() else None
    return None if upper is None else Epsilon(0.0, upper, upper, "pld")


def _least(answer: Epsilon | None, bound: float, found: list[Part], delta: float) -> Epsilon:
    if answer is not None and answer.upper <= bound:
        return answer
    if math.isinf(bound):
        raise uncertified(*found[0], delta)
    return Epsilon(0.0, bound, bound, "rdp")


def _replaced(found: list[Part], delta: float) -> Epsilon:
    if not pld.is_installed():
        raise AccountingError(
            "epsilon under replace-one adjacency needs the library dp-accounting; "
            f"{_INSTALL}, or choose add-remove or zero-out"
        )
    # The RDP bound of twice the sensitivity chooses the grid and claims nothing.
    doubled = [part._replace(noise_multiplier=part.noise_multiplier / 2) for part in found]
    upper = pld.upper(found, delta, rdp.upper(doubled, delta), replace_one=True)
    if upper is None:
        raise uncertified(*found[0], delta)
    return Epsilon(0.0, upper, upper, "pld")

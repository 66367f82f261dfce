"""What charges cost together: in closed form, by PLD, by PRV, or by RDP, the first that answers.

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
from ..plan import Adjacency, PrivacyPlan
from . import analytic, library, pld, prv, rdp
from .charges import AccountantName, AccountingError, Charge, Epsilon, Part, parts, uncertified
from .tail import noise_tail_delta

EPS_ERROR = 0.0008
"""How much of ε the answer of PLD may be too high, and half the width of PRV's above ε = 1."""

_MAX_BY_PRV = 100.0
"""RDP bound above which PRV is not asked: at ε near 760 it was seen 1e-3 of it below PLD."""


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

    Raises AccountingError where no accountant can certify a number.
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
    return _of_all_or_nothing(charges, delta) or composed(
        charges, _without_tails(charges, delta, adjacency), adjacency, eps_error
    )


def second_opinion(
    charges: list[Charge],
    delta: float,
    adjacency: Adjacency = "add-remove",
    *,
    first: AccountantName = "pld",
) -> Epsilon:
    """The same by an accountant other than ``first``: PLD, or else PRV, dp-accounting or RDP.

    Of `replace-one` only PLD and dp-accounting know. Raises AccountingError as ``spent_together``
    does.
    """
    charges = [charge for charge in charges if charge.num_steps > 0]
    trivial = _of_all_or_nothing(charges, delta)
    if trivial:
        return trivial
    delta = _without_tails(charges, delta, adjacency)
    found, replace_one = parts(charges), adjacency == "replace-one"
    answer = _by_pld(found, delta, replace_one) if first != "pld" else None
    if answer is not None:
        return answer
    if first == "pld" and not replace_one:
        answer = _by_prv(found, delta)
    if answer is None and first != "dp-accounting":
        answer = _by_library(found, delta, replace_one)
    return answer or _by_rdp(found, delta, replace_one)


def lower_epsilon(
    sampling_rate: float, noise_multiplier: float, num_steps: int, delta: float
) -> float:
    """A certified lower bound of what ``compute_epsilon`` bounds from above; 0 if none is found."""
    found = parts([Charge(sampling_rate, noise_multiplier, num_steps, noised_values=1)])
    answer = analytic.bounds(found, delta) or _by_prv(found, delta)
    return 0.0 if answer is None else answer.lower


def plan_epsilon(
    plan: PrivacyPlan, num_steps: int | None = None, *, eps_error: float = EPS_ERROR
) -> Epsilon:
    """ε of ``num_steps`` steps of ``plan``, all of them by default, at the plan's δ.

    Raises AccountingError, as well, where the cut tail of all the plan's noise is above a
    thousandth of δ: what is planned has noise enough, while ``spent`` prices whatever has run.
    """
    charge = Charge(plan.sampling_rate, plan.noise_multiplier, plan.num_steps, plan.noised_values)
    if plan.noise_multiplier > 0:
        _refuse_tail(_tail([charge], plan.adjacency), plan.delta, [charge], share=1e-3)
    charge = charge._replace(num_steps=plan.num_steps if num_steps is None else num_steps)
    return spent_together([charge], plan.delta, plan.adjacency, eps_error=eps_error)


def composed(
    charges: list[Charge], delta: float, adjacency: Adjacency, eps_error: float
) -> Epsilon:
    """ε of all of ``charges`` together; their tails are not in ``delta``.

    The closed form where there is one, else PLD; PRV and then RDP where that has no answer.
    ``eps_error`` is how much of ε an answer of PLD may be too high.
    """
    positive(delta=delta)
    found, replace_one = parts(charges), adjacency == "replace-one"
    answer = analytic.bounds(found, delta, replace_one=replace_one)
    answer = answer or _by_pld(found, delta, replace_one, eps_error)
    if answer is None and not replace_one:
        answer = _by_prv(found, delta, eps_error)
    return answer or _by_rdp(found, delta, replace_one)


def _of_all_or_nothing(charges: list[Charge], delta: float) -> Epsilon | None:
    if not charges:
        return Epsilon(0.0, 0.0, 0.0, "exact")
    if any(charge.noise_multiplier == 0 for charge in charges):
        return Epsilon(math.inf, math.inf, math.inf, "exact")
    positive(delta=delta)
    return analytic.never_sampled(charges, delta)


def _without_tails(charges: list[Charge], delta: float, adjacency: Adjacency) -> float:
    tail = _tail(charges, adjacency)
    _refuse_tail(tail, delta, charges, share=1.0)
    return delta - tail


def _tail(charges: list[Charge], adjacency: Adjacency) -> float:
    return sum(noise_tail_delta(*charge, adjacency) for charge in charges)


def _refuse_tail(tail: float, delta: float, charges: list[Charge], share: float) -> None:
    if tail < delta * share:
        return
    least = min(charge.noise_multiplier for charge in charges)
    part = "delta" if share == 1 else f"delta/{1 / share:.0f}"
    raise AccountingError(
        f"the tail of the noise generator adds {tail:.2g} to delta, not less than {part} = "
        f"{delta * share:.2g}, at noise multiplier {least:.4g}; raise the noise multiplier or "
        "delta, or choose fewer steps"
    )


def _by_pld(
    found: list[Part], delta: float, replace_one: bool, eps_error: float = EPS_ERROR
) -> Epsilon | None:
    upper = pld.upper(found, delta, replace_one=replace_one, tolerance=eps_error)
    return None if upper is None else Epsilon(0.0, upper, upper, "pld")


def _by_prv(found: list[Part], delta: float, eps_error: float = EPS_ERROR) -> Epsilon | None:
    """With the error that a grid of bearable size has, relative above ε = 1.

    An answer wholly above RDP's bound is wrong, and not used.
    """
    bound = rdp.upper(found, delta)
    if bound > _MAX_BY_PRV:
        return None
    answer = prv.bounds(found, delta, eps_error * max(1.0, bound / 2), coarser=True)
    return None if answer is None or answer.lower > bound or answer.upper > bound else answer


def _by_library(found: list[Part], delta: float, replace_one: bool) -> Epsilon | None:
    # Of twice the sensitivity for replace-one: RDP's bound chooses the grid and claims nothing.
    sides = [p._replace(noise_multiplier=p.noise_multiplier / (1 + replace_one)) for p in found]
    upper = library.upper(found, delta, rdp.upper(sides, delta), replace_one=replace_one)
    return None if upper is None else Epsilon(0.0, upper, upper, "dp-accounting")


def _by_rdp(found: list[Part], delta: float, replace_one: bool) -> Epsilon:
    bound = math.inf if replace_one else rdp.upper(found, delta)
    if math.isinf(bound):
        raise uncertified(*found[0], delta)
    return Epsilon(0.0, bound, bound, "rdp")

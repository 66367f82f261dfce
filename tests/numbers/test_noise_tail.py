"""The mass of the normal law that the generator cannot reach is reported, and is small."""

import math

import pytest
from scipy.integrate import quad
from scipy.stats import norm

from dpengine.accounting import AccountingError, Epsilon, composition
from dpengine.mechanism.plan import PrivacyPlan
from dpengine.mechanism.secure_random import MAX_GAUSSIAN
from dpengine.run import report


def plan(noise_multiplier: float, **changes) -> PrivacyPlan:
    fields = {
        "sampling_rate": 1.0,
        "noise_multiplier": noise_multiplier,
        "num_steps": 4,
        "max_grad_norm": 0.1,
        "delta": 1e-5,
        "public_dataset_size": 2000,
        "adjacency": "zero-out",
        "draws_per_record": 1,
        "trainable_parameters": 2,
    }
    return PrivacyPlan(**(fields | changes))


def beyond(shift: float) -> float:
    """P(|(x, y) + (shift, 0)| > R) for standard normals x and y, by quadrature over x."""
    reach = MAX_GAUSSIAN

    def outside(x: float) -> float:
        return norm.pdf(x - shift) * 2 * norm.sf(math.sqrt(reach**2 - x**2))

    within, _ = quad(outside, -reach, reach, epsabs=0, epsrel=1e-10, limit=500)
    return within + norm.sf(reach - shift) + norm.cdf(-reach - shift)


@pytest.mark.parametrize("sigma", [0.35, 0.5, 1.0, 3.0], ids="sigma={}".format)
def test_the_reported_tail_covers_what_a_pair_of_normals_loses(sigma):
    tail = report.privacy_report(plan(sigma, delta=1e-4), [])["noise_tail_delta"]
    lost = 4 * beyond(1 / sigma)
    assert lost * (1 - 1e-6) <= tail <= 2 * lost


@pytest.mark.parametrize("sigma", [0.2, 0.25, 0.3, 0.5, 1.0, 5.0])
@pytest.mark.parametrize("parameters", [1, 10**3, 10**8], ids="P={}".format)
@pytest.mark.parametrize("delta", [1e-12, 1e-8, 1e-5])
def test_a_report_has_a_tail_of_at_most_a_thousandth_of_delta_or_is_refused(
    delta, parameters, sigma, monkeypatch
):
    # What the composition costs is no matter here.
    bounds = Epsilon(1.0, 1.1, 1.2, "prv")
    monkeypatch.setattr(composition, "composed", lambda *_: bounds)
    try:
        claimed = plan(sigma, delta=delta, trainable_parameters=parameters)
        content = report.privacy_report(claimed, [])
    except AccountingError as error:
        assert "tail" in str(error)
        assert sigma < 0.5 or delta < 1e-10  # and not where there is room for it
    else:
        assert 0 < content["noise_tail_delta"] <= delta / 1000

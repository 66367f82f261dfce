"""Accountants of subsampled Gaussian mechanisms, each as the bound of ε that it claims.

Each is asked as its documentation has it, and answers for add-remove adjacency:

    dpengine              ``compute_epsilon``, closed forms and then the next three in turn
    dpengine PLD          its own
    dpengine PRV          what it asks of prv-accountant's method, its error as its grid allows
    dpengine RDP          its own
    prv-accountant        its README's error of 0.1 in ε, and δ/1000; the upper of three numbers
    prv-accountant, fine  with dpengine's error: 0.0008, times RDP's bound where that is above 1
    Opacus PRV, RDP       ``get_epsilon``: of PRV the upper number too, at its default error of 0.01
    dp-accounting PLD     at its default grid of 1e-4
    dp-accounting RDP     at its default orders

Two errors of prv-accountant, as the coarser one is fast and loose, and the finer one the reverse.
"""

import math
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryDirectory
from unittest.mock import patch

import dp_accounting
import numpy as np
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from opacus import accountants as opacus
from opacus.accountants.utils import get_noise_multiplier
from prv_accountant import PoissonSubsampledGaussianMechanism, PRVAccountant

from dpengine.accounting import (
    EPS_ERROR,
    Epsilon,
    calibrate_noise_multiplier,
    compute_epsilon,
    pld,
    prv,
    rdp,
)
from dpengine.accounting.charges import Part

from .bracket import Setting

OURS, OUR_PRV, OUR_PLD, OUR_RDP = "dpengine", "dpengine PRV", "dpengine PLD", "dpengine RDP"
MICROSOFT, MICROSOFT_FINE = "prv-accountant", "prv-accountant, fine"
OPACUS_PRV, OPACUS_RDP = "Opacus PRV", "Opacus RDP"
GOOGLE_PLD, GOOGLE_RDP = "dp-accounting PLD", "dp-accounting RDP"
OPACUS = "Opacus"

TRAINABLE_PARAMETERS = 100_000
"""Whose noise has a tail that dpengine charges to δ in a calibration, and Opacus does not."""


class Refusal(Exception):
    """An accountant has no answer, and why."""


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """TimeoutError after ``seconds``, between two calls of a library in C; warnings are muted."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(call: Callable[[], float], seconds: float) -> float:
    """What ``call`` gives. Raises Refusal with the reason where it is not a number, or in time."""
    try:
        with limit(seconds):
            found = float(call())
    except Exception as error:
        reason = str(error).partition("\n")[0]
        kind = type(error).__name__
        raise Refusal(f"{kind}: {reason}" if reason else kind) from error
    if not math.isfinite(found):
        raise Refusal("no answer" if math.isnan(found) else "its answer is infinite")
    return found


def ours(setting: Setting) -> Epsilon:
    """What a user of dpengine gets, and who answered."""
    s = setting
    return compute_epsilon(s.sampling_rate, s.noise_multiplier, s.num_steps, s.delta)


def _our_prv(setting: Setting) -> float:
    found = prv.bounds(_parts(setting), setting.delta, EPS_ERROR, coarser=True)
    return math.nan if found is None else found.upper


def _our_pld(setting: Setting) -> float:
    found = pld.upper(_parts(setting), setting.delta)
    return math.nan if found is None else found


def _our_rdp(setting: Setting) -> float:
    return rdp.upper(_parts(setting), setting.delta)


def _parts(setting: Setting) -> list[Part]:
    return [Part(setting.sampling_rate, setting.noise_multiplier, setting.num_steps)]


def _microsoft(setting: Setting, eps_error: float = 0.1) -> float:
    sigma, q, num_steps = setting.noise_multiplier, setting.sampling_rate, setting.num_steps
    step = PoissonSubsampledGaussianMechanism(noise_multiplier=sigma, sampling_probability=q)
    accountant = PRVAccountant(step, eps_error, setting.delta / 1000, num_steps)
    _, _, upper = accountant.compute_epsilon(setting.delta, num_steps)
    return upper


def _microsoft_fine(setting: Setting) -> float:
    return _microsoft(setting, EPS_ERROR * max(1.0, _our_rdp(setting)))


def _opacus(make: Callable[[], opacus.IAccountant], setting: Setting) -> float:
    accountant = make()
    # What its own calibration does in place of num_steps calls of `step`.
    accountant.history = [(setting.noise_multiplier, setting.sampling_rate, setting.num_steps)]
    return accountant.get_epsilon(setting.delta)


def _google(make: Callable[[], dp_accounting.PrivacyAccountant], setting: Setting) -> float:
    gaussian = dp_accounting.GaussianDpEvent(setting.noise_multiplier)
    step = dp_accounting.PoissonSampledDpEvent(setting.sampling_rate, gaussian)
    return make().compose(step, setting.num_steps).get_epsilon(setting.delta)


ACCOUNTANTS: dict[str, Callable[[Setting], float]] = {
    OURS: lambda setting: ours(setting).upper,
    OUR_PRV: _our_prv,
    OUR_PLD: _our_pld,
    OUR_RDP: _our_rdp,
    MICROSOFT: _microsoft,
    MICROSOFT_FINE: _microsoft_fine,
    OPACUS_PRV: partial(_opacus, opacus.PRVAccountant),
    OPACUS_RDP: partial(_opacus, opacus.RDPAccountant),
    GOOGLE_PLD: partial(_google, PLDAccountant),
    GOOGLE_RDP: partial(_google, RdpAccountant),
}
"""The upper bound of ε that each claims; NaN or infinite where it has none."""

SLOWEST = (OUR_PRV, MICROSOFT_FINE)
"""Left out where time is short: where dpengine answers by PRV it takes as long."""


@dataclass(frozen=True)
class Target:
    """An ε at ``delta``, for which a calibration finds σ."""

    epsilon: float
    sampling_rate: float
    num_steps: int
    delta: float

    def __str__(self) -> str:
        rate, steps = f"q = {self.sampling_rate:.3g}", f"T = {self.num_steps:,}"
        return f"ε = {self.epsilon:g}, {rate}, {steps}, δ = {self.delta:g}"


def _our_noise(target: Target) -> float:
    # Its cache on disk is an empty folder, so that it searches.
    with TemporaryDirectory() as empty, patch.dict("os.environ", XDG_CACHE_HOME=empty):
        return calibrate_noise_multiplier(
            target.epsilon,
            target.delta,
            target.sampling_rate,
            target.num_steps,
            TRAINABLE_PARAMETERS,
        )


def _opacus_noise(target: Target) -> float:
    return get_noise_multiplier(
        target_epsilon=target.epsilon,
        target_delta=target.delta,
        sample_rate=target.sampling_rate,
        steps=target.num_steps,
        accountant="prv",
    )


CALIBRATIONS = {OURS: _our_noise, OPACUS: _opacus_noise}
"""The σ that each finds for a target, Opacus by its PRV accountant with tolerances of 0.01."""

"""Accounting: what a plan costs, and how much noise a budget needs.

Closed forms come first, then privacy loss distributions (PLD); PRV, dp-accounting and RDP are
second opinions. Whichever answers names itself in ``Epsilon.accountant``; only its upper bound is
ever compared with a budget.
"""

from .calibration import calibrate_noise_multiplier
from .charges import REFERENCES, AccountantName, AccountingError, Charge, Epsilon
from .composition import (
    EPS_ERROR,
    compute_epsilon,
    lower_epsilon,
    plan_epsilon,
    second_opinion,
    spent,
    spent_together,
)
from .tail import noise_tail_delta

__all__ = [
    "EPS_ERROR",
    "REFERENCES",
    "AccountantName",
    "AccountingError",
    "Charge",
    "Epsilon",
    "calibrate_noise_multiplier",
    "compute_epsilon",
    "lower_epsilon",
    "noise_tail_delta",
    "plan_epsilon",
    "second_opinion",
    "spent",
    "spent_together",
]

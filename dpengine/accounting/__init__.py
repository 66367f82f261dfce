"""Accounting: what a plan costs, and how much noise a budget needs.

Three accountants compose the steps: PRV and PLD numerically, RDP by formula. Whichever answers
names itself in ``Epsilon.accountant``; only its upper bound is ever compared with a budget.
"""

from .calibration import calibrate_noise_multiplier
from .charges import REFERENCES, AccountantName, AccountingError, Charge, Epsilon
from .composition import (
    EPS_ERROR,
    compute_epsilon,
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
    "noise_tail_delta",
    "plan_epsilon",
    "second_opinion",
    "spent",
    "spent_together",
]

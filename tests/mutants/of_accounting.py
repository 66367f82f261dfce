"""Planted bugs of what steps are said to cost."""

from tests.mutants.mutant import Mutant

MUTANTS = (
    Mutant(
        "one-direction",
        "ε is that of adding a record, where removing one tells more",
        "dpengine/accounting/pld.py",
        '("replace",) if replace_one else ("remove", "add"):\n            bound',
        '("replace",) if replace_one else ("add",):\n            bound',
        "tests/accounting/test_pld.py::"
        "test_the_bound_is_within_a_thousandth_of_the_truth_and_not_below_it",
    ),
    Mutant(
        "steps-before-the-last",
        "one step of those that are composed is not counted",
        "dpengine/accounting/pld.py",
        "transform * _power(fft.rfft(wrapped), item.times)",
        "transform * _power(fft.rfft(wrapped), max(1, item.times - 1))",
        "tests/accounting/test_pld.py::"
        "test_the_bound_is_within_a_thousandth_of_the_truth_and_not_below_it",
    ),
    Mutant(
        "replaced-record-as-removed",
        "replacing a record by any other costs what removing it does",
        "dpengine/accounting/analytic.py",
        'for way in (("replace",) if replace_one else ("remove", "add"))',
        'for way in ("remove", "add")',
        "tests/accounting/test_analytic.py::test_replaced_records_are_twice_as_far_apart",
    ),
    Mutant(
        "never-sampled-in-a-step",
        "ε is 0 where a record is missed by a step, not by all of them",
        "dpengine/accounting/analytic.py",
        "    if sum(charge.num_steps * Fraction(charge.sampling_rate) for",
        "    if sum(Fraction(charge.sampling_rate) for",
        "tests/accounting/test_analytic.py::"
        "test_where_delta_covers_all_that_can_be_told_epsilon_is_zero",
    ),
    Mutant(
        "cached-noise-believed",
        "noise from the cache, which anybody may have written, is not certified again",
        "dpengine/accounting/calibration.py",
        "    if sigma is not None and _spends(_excess(sigma, *setting, target=target_epsilon)):\n",
        "    if sigma is not None:\n",
        "tests/accounting/test_calibration.py::test_a_poisoned_cache_cannot_weaken_the_noise",
    ),
    Mutant(
        "unconfirmed-claim-verified",
        "a claim that no accountant confirms is verified",
        "dpengine/verify.py",
        "    if not _is_below(claimed.upper, bound.upper):\n",
        "    if not _is_below(claimed.upper, bound.upper) or bound.accountant not in _TIGHT:\n",
        "tests/test_verify.py::test_a_claim_below_the_only_bound_there_is_is_not_verified",
    ),
)

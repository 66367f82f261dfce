"""What several runs on the same data cost together."""

import math
from pathlib import Path

from .. import accounting
from ..accounting import Charge, Epsilon
from ..errors import PrivacyError, printable
from ..mechanism.plan import Adjacency, PrivacyPlan, adjacency_of_all
from . import folder as run_folder
from . import ledger
from .folder import RunFolder


def cost_of_runs(folders: list[Path]) -> str:
    """What each run in ``folders`` claims at its own δ, and all of them together at the sum.

    A folder that is named twice, by whatever path, counts once.
    """
    lines, plans = [], []
    for folder in {folder.resolve(): folder for folder in folders}.values():
        plan, reserved = _read_run(RunFolder(folder))
        plans.append(plan)
        bounds = accounting.spent_together([_charge(plan)], plan.delta, plan.adjacency)
        lines.append(
            f"{printable(str(folder))}: {_claim(bounds)} at delta = {plan.delta!r} "
            f"({plan.adjacency}, one {plan.unit}) for {plan.num_steps:,} planned steps, "
            f"{reserved:,} of them charged"
        )
    bounds, delta, adjacency = _together(plans)
    lines.append(f"together: {_claim(bounds)} at delta = {delta!r} ({adjacency})")
    return "\n".join(lines)


def cost_beside(folder: RunFolder) -> dict | None:
    """What the run in ``folder`` and those beside it on the same data cost together, for a report.

    None where there is no other. `epsilon` is None where the runs have no claim in common, or one
    of them cannot be read. Names of folders and public plans are all that is told.
    """
    found = run_folder.of_same_data(folder)
    if len(found) < 2:
        return None
    names = [path.name for path in found if path != folder.path.absolute()]
    cost = {"other_runs": names, "epsilon": None, "delta": None, "adjacency": None}
    try:
        plans = [_read_run(RunFolder(path))[0] for path in found]
        bounds, delta, adjacency = _together(plans)
    except (ValueError, PrivacyError):
        return cost
    epsilon = bounds.upper if math.isfinite(bounds.upper) else "inf"
    return cost | {"epsilon": epsilon, "delta": delta, "adjacency": adjacency}


def _together(plans: list[PrivacyPlan]) -> tuple[Epsilon, float, Adjacency]:
    """ε of all ``plans``, the δ that it holds at, and what they protect together."""
    if len({plan.unit for plan in plans}) > 1:
        raise ValueError(
            "runs that protect records and runs that protect units have no claim in common; give "
            "those of one kind"
        )
    adjacency = adjacency_of_all(plan.adjacency for plan in plans)
    delta = math.fsum(plan.delta for plan in plans)
    if delta >= 1:
        raise ValueError(
            f"the deltas of the runs add up to {delta:g}, at which nothing can be claimed of all "
            "together; give fewer runs"
        )
    return accounting.spent_together(list(map(_charge, plans)), delta, adjacency), delta, adjacency


def _charge(plan: PrivacyPlan) -> Charge:
    # All planned steps: where to stop may have been chosen by what came out.
    return Charge(plan.sampling_rate, plan.noise_multiplier, plan.num_steps, plan.noised_values)


def _read_run(folder: RunFolder) -> tuple[PrivacyPlan, int]:
    if not folder.ledger.exists():
        raise ValueError(f"{str(folder.path)!r} is not the folder of a run: it has no ledger")
    record = ledger.read(folder.ledger)
    return record.plan, record.reserved


def _claim(bounds: Epsilon) -> str:
    if math.isinf(bounds.upper):
        return "not private, trained without noise"
    return f"epsilon = {up(bounds.upper)} by {bounds.accountant}"


def up(epsilon: float) -> str:
    """``epsilon`` as text, rounded up."""
    return f"{math.ceil(epsilon * 1e4) / 1e4:.4f}"

"""Check a finished run: its digests, its ledger, and its epsilon by a second accountant.

python -m dpengine.verify RUN

The ledger is a chain of digests that holds the plan, every step that was charged, and the digest of
each released file. An edit of any of these that the others do not match is found. Checkpoints are
no part of the release, and files that are not the run's are not looked at. Whoever writes
the whole folder anew can make another that is consistent; against that, keep the last digest of
the ledger, which is printed, or a signature of the report, somewhere else.
"""

if __name__ == "__main__":  # before torch is loaded
    from .threads import sleep_soon

    sleep_soon()


import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from . import accounting, cli
from .accounting import AccountingError, Charge, Epsilon
from .errors import PrivacyError
from .run import digests, durable, ledger, report
from .run.folder import RunFolder
from .run.ledger import LedgerRecord
from .settings import UserPath

_AGREEMENT = 1e-3
"""How far a second bound may lie above the claim, as a share of it: a small claim is no laxer."""

_TIGHT = ("analytic", "pld", "exact")
"""Accountants whose bounds are within that of ε itself; above the claim they contradict it."""

_OF_THE_MACHINE = ("versions", "inert_tensors", "epsilon", "accountant", "together")
"""Fields of the report that the ledger's plan does not fix; the seal has their digest."""


@dataclass(frozen=True)
class VerifySettings:
    """Check a finished run against its ledger, and its epsilon by a second accountant."""

    run: Annotated[tyro.conf.Positional[UserPath], tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""


def verify(settings: VerifySettings) -> int:
    """Run the command: print what was checked and what is wrong. Returns 1 if anything is."""
    folder = RunFolder(Path(settings.run))
    if not folder.ledger.exists():
        raise ValueError(f"{settings.run!r} is not the folder of a run: it has no ledger")
    record = ledger.read(folder.ledger)
    print(
        f"ledger: {record.reserved} of {record.plan.num_steps} steps charged, chain unbroken, last "
        f"digest {record.head}"
    )
    if record.seal is None:
        raise PrivacyError(
            f"run {settings.run!r} is not released, so there is no claim to check; finish it by "
            f"python -m dpengine.finetune --resume {settings.run}"
        )
    problems = [*_changed_files(folder, record), *_report_problems(folder, record)]
    for problem in problems:
        print(f"WRONG: {problem}")
    if not problems:
        print(f"{len(record.seal)} released files are those that the run ended with")
        print("verified")
    return int(bool(problems))


def _changed_files(folder: RunFolder, record: LedgerRecord) -> list[str]:
    """Every sealed file that is missing or differs, and the settings the run began with."""
    released = (folder.adapter, folder.synthetic, folder.samples, folder.card, folder.report)
    expected = {file.name for file in (*released, folder.config)}
    problems = [f"the seal has no digest of {name}" for name in expected - record.seal.keys()]
    problems += [
        f"the seal names {name!r}, no file of a run" for name in record.seal if name not in expected
    ]
    if record.is_torn:
        problems.append("the ledger goes on after its seal")
    for name, digest in sorted((n, d) for n, d in record.seal.items() if n in expected):
        file = folder.path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif digests.sha256(durable.read(file)) != digest:
            problems.append(f"{name} is not the file that the run released")
    if record.seal.get(folder.config.name) != record.config_digest:
        problems.append("config.json at the end of the run is not the one that it began with")
    return problems


def _report_problems(folder: RunFolder, record: LedgerRecord) -> list[str]:
    """Where the report differs from the ledger's plan, or its epsilon from a second opinion."""
    try:
        found: dict[str, Any] = json.loads(durable.read(folder.report))
        claimed = Epsilon(**found["epsilon"], accountant=found["accountant"])
        claimed = claimed._replace(upper=float(claimed.upper))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return [f"{folder.report.name} cannot be read"]
    try:
        expected = report.privacy_report(record.plan, found.get("inert_tensors", []))
    except AccountingError as error:
        return [f"epsilon is not verified: no accountant can confirm it: {error}"]
    fields = (found.keys() | expected.keys()) - set(_OF_THE_MACHINE)
    problems = [
        f"the report's {name} is {found.get(name)!r}, and {expected.get(name)!r} by the ledger"
        for name in sorted(fields)
        if json.dumps(found.get(name)) != json.dumps(expected.get(name))
    ]
    return problems + _card_problems(folder, found) + _epsilon_problems(record, claimed)


def _card_problems(folder: RunFolder, found: dict[str, Any]) -> list[str]:
    """Where the card states other numbers than the report; its wording may be of any version."""
    try:
        card = durable.read(folder.card).decode()
        missing = [fact for fact in report.facts(found) if fact not in card]
        others = set(re.findall(r"ε [=≤] (\d[\d.]*\d)", card)) - report.claims(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [f"{folder.card.name} cannot be read"]
    name = folder.card.name
    problems = [f"{name} does not say {fact!r}, as the report does" for fact in missing]
    return problems + [f"{name} says ε = {other}, and the report not" for other in sorted(others)]


def _epsilon_problems(record: LedgerRecord, claimed: Epsilon) -> list[str]:
    """Why ε is not what is claimed, or why nothing confirms it.

    Two bounds are computed from the ledger's plan whatever the report says: by an accountant other
    than the one it names, and by the one that answers first. ε is at least their lower sides, and
    it is confirmed where the claim is not below one of their upper sides.
    """
    plan = record.plan
    charge = Charge(plan.sampling_rate, plan.noise_multiplier, plan.num_steps, plan.noised_values)
    try:
        second = accounting.second_opinion(
            [charge], plan.delta, plan.adjacency, first=claimed.accountant
        )
        again = accounting.plan_epsilon(plan)
    except AccountingError as error:
        return [f"epsilon is not verified: no second accountant can: {error}"]
    print(
        f"epsilon: {claimed.upper:.4f} claimed by {claimed.accountant}, at most {second.upper:.4f} "
        f"by {second.accountant}, at delta = {plan.delta!r} ({plan.adjacency}, one {plan.unit})"
    )
    least = max(second.lower, again.lower)
    if _is_below(claimed.upper, least):
        return [f"epsilon is claimed to be {claimed.upper:.6g}, and is at least {least:.6g}"]
    bound = min(second, again, key=lambda found: found.upper)
    if not _is_below(claimed.upper, bound.upper):
        return []
    if bound.accountant in _TIGHT:
        return [f"epsilon is claimed to be {claimed.upper:.6g}, and is {bound.upper:.6g}"]
    return [
        f"epsilon is not verified: {claimed.upper:.6g} is claimed by {claimed.accountant}, and the "
        f"least bound that can be computed here is {bound.upper:.6g}, by {bound.accountant}"
    ]


def _is_below(claimed: float, bound: float) -> bool:
    return not (claimed >= bound or math.isclose(claimed, bound, rel_tol=_AGREEMENT))


def main(args: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run("python -m dpengine.verify", VerifySettings, verify, args)


if __name__ == "__main__":
    raise SystemExit(main())

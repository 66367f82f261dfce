"""Check a finished run: its digests, its ledger, and its epsilon by a second accountant.

python -m dpengine.verify RUN

The ledger is a chain of digests that holds the plan, every step that was charged, and the digest of
each released file. An edit of any of these that the others do not match is found. Whoever writes
the whole folder anew can make another that is consistent; against that, keep the last digest of
the ledger, which is printed, or a signature of the report, somewhere else.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from . import accounting, cli, digests, durable, ledger, report
from .accounting import AccountingError, Charge
from .errors import PrivacyError
from .ledger import LedgerRecord
from .run_folder import RunFolder

_AGREEMENT = 1e-3
"""How far a second bound may lie above the claim, relative or absolute."""

_OF_THE_MACHINE = ("versions", "inert_tensors", "epsilon", "accountant")
"""Fields of the report that the ledger's plan does not fix; the seal has their digest."""


@dataclass(frozen=True)
class VerifySettings:
    """Check a finished run against its ledger, and its epsilon by a second accountant."""

    run: tyro.conf.Positional[str]
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
    problems = []
    for name, digest in sorted(record.seal.items()):
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
        upper = float(found["epsilon"]["upper"])
    except (OSError, ValueError, KeyError, TypeError):
        return [f"{folder.report.name} cannot be read"]
    expected = report.privacy_report(record.plan, found.get("inert_tensors", []))
    fields = (found.keys() | expected.keys()) - set(_OF_THE_MACHINE)
    problems = [
        f"the report's {name} is {found.get(name)!r}, and {expected.get(name)!r} by the ledger"
        for name in sorted(fields)
        if found.get(name) != expected.get(name)
    ]
    return problems + _epsilon_problems(record, upper)


def _epsilon_problems(record: LedgerRecord, claimed: float) -> list[str]:
    plan = record.plan
    charge = Charge(plan.sampling_rate, plan.noise_multiplier, plan.num_steps, plan.noised_values)
    try:
        second = accounting.second_opinion([charge], plan.delta, plan.adjacency)
    except AccountingError as error:
        return [f"no second accountant can confirm epsilon: {error}"]
    print(
        f"epsilon: {claimed:.4f} claimed, at most {second.upper:.4f} by {second.accountant}, at "
        f"delta = {plan.delta!r} ({plan.adjacency}, one {plan.unit})"
    )
    # RDP lies above the truth and contradicts nothing: then the first accountant is asked again.
    least = second.upper if second.accountant != "rdp" else accounting.plan_epsilon(plan).upper
    if claimed < least and not math.isclose(claimed, least, rel_tol=_AGREEMENT, abs_tol=_AGREEMENT):
        return [f"epsilon is claimed to be {claimed:.4f}, and is {least:.4f} by the ledger"]
    return []


def main(args: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run("python -m dpengine.verify", VerifySettings, verify, args)


if __name__ == "__main__":
    raise SystemExit(main())

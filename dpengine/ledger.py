"""The ledger: what has been spent, on disk before it is spent.

`ledger.jsonl` holds the plan in its first line and then one line for each step, written and synced
before the step's batch or noise is drawn. After a crash at any point the ledger holds every step
whose noise was drawn, and perhaps one that was not; that one stays charged.
"""

import json
import os
from pathlib import Path

from .errors import PrivacyError
from .plan import PrivacyPlan


class Ledger:
    """An append-only file of reserved steps. Make one with ``create`` or ``open``."""

    def __init__(self, path: Path, plan: PrivacyPlan, reserved: int) -> None:
        self.path = path
        self.plan = plan
        self.reserved = reserved
        """Steps charged so far, by all attempts together."""

    @classmethod
    def create(cls, path: Path, plan: PrivacyPlan) -> "Ledger":
        """Start a ledger for ``plan``. Raises FileExistsError where there is one already."""
        with path.open("x", encoding="utf-8") as file:
            _write_line(file, {"plan": plan.to_dict()})
        _sync_folder(path.parent)
        return cls(path, plan, reserved=0)

    @classmethod
    def open(cls, path: Path) -> "Ledger":
        """Read a ledger back. Raises PrivacyError where it is damaged or not consecutive.

        A last line without its newline was never synced, so its step was never drawn: it is cut.
        """
        content = path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        try:
            header, *lines = [json.loads(line) for line in complete.splitlines()]
            plan = PrivacyPlan(**header["plan"])
            steps = [line["step"] for line in lines]
        except (ValueError, KeyError, TypeError) as error:
            raise PrivacyError(f"ledger {path} is damaged; what was spent is unknown") from error
        if steps != list(range(1, len(steps) + 1)):
            raise PrivacyError(f"ledger {path} is damaged: its steps are not consecutive")
        if len(complete) < len(content):
            os.truncate(path, len(complete))
        return cls(path, plan, reserved=len(steps))

    @property
    def remaining(self) -> int:
        """Steps of the plan that no attempt has reserved."""
        return self.plan.num_steps - self.reserved

    def reserve(self) -> None:
        """Charge one step, on disk when this returns. Raises PrivacyError beyond the plan."""
        if self.remaining < 1:
            raise PrivacyError(
                f"all {self.plan.num_steps} planned steps are spent; another step would exceed "
                "the budget"
            )
        line = {
            "step": self.reserved + 1,
            "sampling_rate": self.plan.sampling_rate,
            "noise_multiplier": self.plan.noise_multiplier,
            "max_grad_norm": self.plan.max_grad_norm,
        }
        with self.path.open("a", encoding="utf-8") as file:
            _write_line(file, line)
        self.reserved += 1


def _write_line(file, content: dict) -> None:
    file.write(json.dumps(content) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

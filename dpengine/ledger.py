"""The ledger: what has been spent, on disk before it is spent.

`ledger.jsonl` holds the plan in its first line and then one line for each step, written and synced
before the step's batch or noise is drawn. After a crash at any point the ledger holds every step
whose noise was drawn, and perhaps one that was not; that one stays charged. The file is locked
while a process works with it, so that two of them cannot spend one budget twice.
"""

import fcntl
import json
import os
import weakref
from pathlib import Path

from .errors import PrivacyError
from .plan import PrivacyPlan


class Ledger:
    """An append-only file of reserved steps, locked while this object lives.

    Make one with ``create`` or ``open``. ``reserved`` counts the steps charged so far, by all
    attempts together; ``config_digest`` names the settings that the run was started with.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self.close = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise PrivacyError(f"ledger {path} is in use by another process; wait for it") from None
        self.plan, self.config_digest, self.reserved = self._read()

    @classmethod
    def create(cls, path: Path, plan: PrivacyPlan, config_digest: str = "") -> "Ledger":
        """Start a ledger for ``plan``. Raises FileExistsError where there is one already."""
        header = {"plan": plan.to_dict(), "config_sha256": config_digest}
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        _write_line(descriptor, header)
        sync_folder(path.parent)
        return cls(path, descriptor)

    @classmethod
    def open(cls, path: Path) -> "Ledger":
        """Read a ledger back.

        Raises PrivacyError where it is damaged, not consecutive, or in use by another process. A
        last line without its newline was never synced, so its step was never drawn: it is cut.
        """
        return cls(path, os.open(path, os.O_RDWR | os.O_APPEND))

    def _read(self) -> tuple[PrivacyPlan, str, int]:
        content = self.path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        try:
            header, *lines = [json.loads(line) for line in complete.splitlines()]
            plan = PrivacyPlan(**header["plan"])
            steps = [line["step"] for line in lines]
            config_digest = header["config_sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise PrivacyError(
                f"ledger {self.path} is damaged; what was spent is unknown"
            ) from error
        if steps != list(range(1, len(steps) + 1)):
            raise PrivacyError(f"ledger {self.path} is damaged: its steps are not consecutive")
        if len(complete) < len(content):
            os.truncate(self._descriptor, len(complete))
        return plan, config_digest, len(steps)

    @property
    def remaining(self) -> int:
        """Steps of the plan that no attempt has reserved."""
        return self.plan.num_steps - self.reserved

    def reserve(self, max_grad_norm: float | None = None) -> None:
        """Charge one step, on disk when this returns. Raises PrivacyError beyond the plan.

        ``max_grad_norm``: the bound of this step where it is not the plan's, a public number.
        """
        if self.remaining < 1:
            raise PrivacyError(
                f"all {self.plan.num_steps} planned steps are spent; another step would exceed "
                "the budget"
            )
        line = {
            "step": self.reserved + 1,
            "sampling_rate": self.plan.sampling_rate,
            "noise_multiplier": self.plan.noise_multiplier,
            "max_grad_norm": max_grad_norm or self.plan.max_grad_norm,
        }
        _write_line(self._descriptor, line)
        self.reserved += 1


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_line(descriptor: int, content: dict) -> None:
    line = (json.dumps(content) + "\n").encode()
    written = os.write(descriptor, line)
    if written != len(line):
        raise OSError(f"only {written} of {len(line)} bytes of a ledger line could be written")
    os.fsync(descriptor)

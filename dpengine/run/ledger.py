"""The ledger: what has been spent, on disk before it is spent.

`ledger.jsonl` holds the plan in its first line, then a line for each block of steps, written and
synced before the first batch or noise of the block is drawn, and at last the digests of the
released files. Each line holds its own SHA-256 and that of the line before. After a crash at any
point the ledger holds every step whose noise was drawn, and perhaps some of one block that were
not; those stay charged. The file is locked while a process works with it, so that two of them
cannot spend one budget twice.
"""

import os
import weakref
from dataclasses import dataclass
from pathlib import Path

from ..errors import PrivacyError, positive, positive_int
from ..mechanism.plan import PrivacyPlan
from . import digests, durable

_BLOCKS = 1000


@dataclass(frozen=True)
class Reservation:
    """A line of the ledger: ``num_steps`` steps from number ``step`` on, and their mechanism.

    attempt: a public random name of the process's turn, so that no two pasts have one digest.
    """

    step: int
    num_steps: int
    sampling_rate: float
    noise_multiplier: float
    max_grad_norm: float
    attempt: str


@dataclass(frozen=True)
class LedgerRecord:
    """What a ledger says. heads: digest of each line by the number of steps charged up to it.

    config_digest: SHA-256 of `config.json`; head: digest of the last line; seal: SHA-256 of each
    released file by its name, None where nothing was released. is_torn: whether an unfinished line
    follows.
    """

    plan: PrivacyPlan
    config_digest: str
    reservations: tuple[Reservation, ...]
    heads: dict[int, str]
    head: str
    seal: dict[str, str] | None
    is_torn: bool

    @property
    def reserved(self) -> int:
        """Steps charged so far, by all attempts together."""
        return sum(line.num_steps for line in self.reservations)


def read(path: Path) -> LedgerRecord:
    """What the ledger at ``path`` says, without locking or changing it.

    A last line that is not whole is passed over. Raises PrivacyError where it is damaged.
    """
    return _parse(durable.read(path), path)[0]


def block_size(plan: PrivacyPlan) -> int:
    """Steps that one line charges: 1, or a thousandth of a long run with one bound throughout."""
    if plan.bound_moves or plan.num_steps < _BLOCKS:
        return 1
    return -(-plan.num_steps // _BLOCKS)


class Ledger:
    """An append-only file of reserved steps, locked while this object lives.

    Make one with ``create`` or ``open``. ``reserved`` counts the steps charged so far, by all
    attempts together; ``config_digest`` names the settings that the run was started with; ``head``
    is the digest of the last line.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._process = os.getpid()
        self._attempt = os.urandom(16).hex()
        self.close = weakref.finalize(self, os.close, descriptor)
        try:
            with durable.naming(path):
                durable.lock(descriptor)
        except OSError as error:
            self.close()
            if not isinstance(error, BlockingIOError):
                raise
            raise PrivacyError(f"ledger {path} is in use by another process; wait for it") from None
        size = os.fstat(descriptor).st_size
        content = durable.read_log(descriptor, size)
        record, self._size = _parse(content, path)
        if self._size < size:
            durable.cut(descriptor, self._size)
        elif self._size > size:  # all of the last line but its end
            durable.append(descriptor, b"\n")
        self.plan, self.config_digest = record.plan, record.config_digest
        self.reserved, self.head, self._heads = record.reserved, record.head, dict(record.heads)
        self._is_sealed = record.seal is not None
        self._open_steps = 0
        self._failed = False

    @classmethod
    def create(cls, path: Path, plan: PrivacyPlan, config_digest: str = "") -> "Ledger":
        """Start a ledger for ``plan``. Raises FileExistsError where there is one already."""
        header, _ = digests.encode({"plan": plan.to_dict(), "config_sha256": config_digest})
        return cls(path, durable.create_log(path, header))

    @classmethod
    def open(cls, path: Path) -> "Ledger":
        """Read a ledger back.

        Raises PrivacyError where it is damaged, not consecutive, or in use by another process. A
        last line that is not whole was never synced, so its steps were never drawn: it is cut. One
        that only its newline is missing of may have been, and counts.
        """
        return cls(path, durable.open_log(path))

    @property
    def remaining(self) -> int:
        """Steps that may still be drawn: those no attempt has reserved, and the open block's."""
        return self.plan.num_steps - self.reserved + self._open_steps

    def holds(self, head: str, reserved: int) -> bool:
        """Whether the line up to which ``reserved`` steps are charged has the digest ``head``."""
        return self._heads.get(reserved) == head

    def reserve(self, max_grad_norm: float | None = None) -> None:
        """Grant one step, charged on disk when this returns. Raises PrivacyError beyond the plan.

        ``max_grad_norm``: the bound of this step, a public number; the plan's unless clipping is
        adaptive. Where the step is the first of a block, the whole block is charged: what an
        attempt leaves of it is lost, so that it over-charges by less than ``block_size(plan)``.
        """
        bound = self.plan.max_grad_norm if max_grad_norm is None else max_grad_norm
        positive(max_grad_norm=bound)
        if bound != self.plan.max_grad_norm and not self.plan.bound_moves:
            raise PrivacyError(
                f"max_grad_norm is {bound} and the plan's is {self.plan.max_grad_norm}; only "
                "adaptive clipping moves it"
            )
        self._check_own()
        if self.remaining < 1:
            raise PrivacyError(
                f"all {self.plan.num_steps} planned steps are spent; another step would exceed "
                "the budget"
            )
        if self._is_sealed:
            raise PrivacyError("the run is released; start a new run, whose epsilon adds to its")
        if self._open_steps == 0:
            self._charge(min(block_size(self.plan), self.remaining), bound)
        self._open_steps -= 1

    def seal(self, files: dict[str, str]) -> None:
        """Close the ledger with the SHA-256 of each released file by its name. The last one counts.

        Raises PrivacyError where the ledger cannot be written by this process.
        """
        self._check_own()
        self._append({"seal": files})
        self._is_sealed = True

    def _charge(self, num_steps: int, max_grad_norm: float) -> None:
        self._append(
            {
                "step": self.reserved + 1,
                "num_steps": num_steps,
                "sampling_rate": self.plan.sampling_rate,
                "noise_multiplier": self.plan.noise_multiplier,
                "max_grad_norm": max_grad_norm,
                "attempt": self._attempt,
            }
        )
        self.reserved += num_steps
        self._open_steps = num_steps
        self._heads[self.reserved] = self.head

    def _append(self, content: dict) -> None:
        line, digest = digests.encode({"previous": self.head} | content)
        # Until it is known to be on disk: after an error the file's end is not.
        self._failed = True
        with durable.naming(self.path):
            durable.append(self._descriptor, line)
        self._failed = False
        self._size += len(line)
        self.head = digest

    def _check_own(self) -> None:
        """Raise PrivacyError where this object no longer says what the file at its place does."""
        if os.getpid() != self._process:
            raise PrivacyError("a ledger is its process's own; open it in the one that trains")
        if self._failed:
            raise PrivacyError(
                f"ledger {self.path} could not be written; free the disk and go on by --resume"
            )
        mine = os.fstat(self._descriptor)
        try:
            at_place = os.stat(self.path)
        except OSError:
            at_place = None
        if (
            at_place is None
            or (at_place.st_dev, at_place.st_ino) != (mine.st_dev, mine.st_ino)
            or mine.st_size != self._size
        ):
            raise PrivacyError(f"ledger {self.path} was changed, moved or replaced while in use")


def _parse(content: bytes, path: Path) -> tuple[LedgerRecord, int]:
    """What the whole lines say, and how many bytes they are, with the newline of the last."""
    size = content.rfind(b"\n") + 1
    is_torn = size < len(content)
    if is_torn and _is_whole(content[size:] + b"\n"):
        content, is_torn = content + b"\n", False
        size = len(content)
    lines = content[:size].splitlines(keepends=True)
    try:
        header, head = digests.decode(lines[0])
        plan, config_digest = PrivacyPlan(**header["plan"]), header["config_sha256"]
        reservations, heads, reserved, seal = [], {0: head}, 0, None
        for line in lines[1:]:
            entry, digest = digests.decode(line)
            if entry.pop("previous") != head:
                raise ValueError("its lines do not follow each other")
            head = digest
            if entry.keys() == {"seal"}:
                seal = _checked_seal(entry["seal"])
                continue
            reservation = Reservation(**entry)
            if seal is not None:
                raise ValueError("it goes on after its seal")
            _check(reservation, plan, reserved)
            reservations.append(reservation)
            reserved += reservation.num_steps
            heads[reserved] = head
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise PrivacyError(
            f"ledger {path} is damaged, so what was spent is unknown: restore it from a copy, or "
            "start a new run"
        ) from error
    return LedgerRecord(plan, config_digest, tuple(reservations), heads, head, seal, is_torn), size


def _is_whole(line: bytes) -> bool:
    try:
        digests.decode(line)
    except ValueError:
        return False
    return True


def _checked_seal(seal: object) -> dict[str, str]:
    if not isinstance(seal, dict) or not all(isinstance(value, str) for value in seal.values()):
        raise ValueError("a seal must give a digest for each name")
    return seal


def _check(line: Reservation, plan: PrivacyPlan, reserved: int) -> None:
    """Raise ValueError where a line charges anything but the plan's next steps."""
    positive_int(step=line.step, num_steps=line.num_steps)
    positive(max_grad_norm=line.max_grad_norm)
    if line.step != reserved + 1:
        raise ValueError("its steps are not consecutive")
    if not 1 <= line.num_steps <= min(block_size(plan), plan.num_steps - reserved):
        raise ValueError("a line charges more steps than the plan has")
    same = (line.sampling_rate, line.noise_multiplier) == (
        plan.sampling_rate,
        plan.noise_multiplier,
    )
    if not same or (not plan.bound_moves and line.max_grad_norm != plan.max_grad_norm):
        raise ValueError("a line charges another mechanism than the plan's")

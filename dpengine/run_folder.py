"""The folder of a run: what is in it, and how a new or an unfinished one is opened."""

import dataclasses
import errno
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from . import digests, durable
from .errors import PrivacyError
from .ledger import Ledger
from .plan import PrivacyPlan
from .settings import Settings


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run's files."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "pytorch_lora_weights.safetensors"

    @property
    def report(self) -> Path:
        return self.path / "privacy_report.json"

    @property
    def synthetic(self) -> Path:
        return self.path / "synthetic.npz"

    @property
    def samples(self) -> Path:
        return self.path / "samples.png"

    @property
    def card(self) -> Path:
        return self.path / "README.md"


def choose(settings: Settings) -> RunFolder:
    """The folder a new run will make: ``--output``, or the next free number. Makes nothing yet.

    Raises ValueError where the folder is in use or cannot be made.
    """
    if settings.output.output is None:
        name, number = Path(settings.data.data).stem, 1
        while Path("runs", f"{name}-{number:03d}").exists():
            number += 1
        path = Path("runs", f"{name}-{number:03d}")
        durable.check_writable("output", Path("runs") if Path("runs").exists() else Path())
        return RunFolder(path)
    path = Path(settings.output.output).resolve()
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if not existing.is_dir():
        raise ValueError(f"output {str(path)!r} cannot be made: {str(existing)!r} is a file")
    empty = path.is_dir() and not any(path.iterdir()) and path != Path.cwd()
    if path.exists() and not empty:
        raise _in_use(path)
    durable.check_writable("output", existing)
    return RunFolder(path)


def create(folder: RunFolder, settings: Settings, plan: PrivacyPlan) -> Ledger:
    """Make the folder, whole or not at all: the settings, and a ledger that has spent nothing."""
    durable.make_folder(folder.path.parent)
    draft = RunFolder(durable.make_draft(folder.path))
    try:
        config = (json.dumps(settings.to_dict(), indent=2) + "\n").encode()
        durable.write(draft.config, config)
        ledger = Ledger.create(draft.ledger, plan, digests.sha256(config))
        # Fails where another run has taken the name since it was chosen.
        durable.move_folder(draft.path, folder.path)
    except BaseException as error:
        shutil.rmtree(draft.path, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise _in_use(folder.path) from None
        raise
    ledger.path = folder.ledger
    return ledger


def read_settings(folder: RunFolder) -> Settings:
    """The settings that a run was started with. Raises ValueError where there is no run."""
    try:
        return Settings.from_dict(json.loads(folder.config.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{str(folder.path)!r} is not the folder of a run") from error


def of_same_data(folder: RunFolder) -> list[Path]:
    """The run in ``folder``, and those beside it on the same data, finished or not.

    Data are the same where their paths lead to one place. What another version wrote counts as
    well; copies of the data under another name are not known.
    """
    data = _data(folder)
    beside = sorted(folder.path.absolute().parent.iterdir())
    return [path for path in beside if data is not None and _data(RunFolder(path)) == data]


def _data(folder: RunFolder) -> str | None:
    """Where the data of a run are; None for what is no run."""
    if not folder.ledger.is_file():
        return None
    try:
        data = json.loads(folder.config.read_text(encoding="utf-8"))["data"]["data"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return os.path.realpath(data) if isinstance(data, str) and os.path.isabs(data) else data


def to_resume(asked: Settings) -> Settings | None:
    """What ``asked`` resumes, as settings that its other options may change; None if it does not.

    Raises ValueError where there is no run.
    """
    resume = asked.output.resume
    if resume is None:
        return None
    own = read_settings(RunFolder(Path(resume)))
    return dataclasses.replace(own, output=dataclasses.replace(own.output, resume=resume))


def reopen(folder: RunFolder) -> tuple[Settings, Ledger]:
    """Settings and ledger of an unfinished run.

    Raises ValueError where there is no run, and PrivacyError where its budget is spent, or its
    settings are not those it was started with.
    """
    settings = read_settings(folder)
    if not folder.ledger.exists():
        raise PrivacyError(f"run {str(folder.path)!r} has lost its ledger; start a new run")
    if folder.report.exists():
        raise PrivacyError(
            f"the budget of run {str(folder.path)!r} is already spent: its adapter is released; "
            "start a new run, whose epsilon adds to this one's"
        )
    ledger = Ledger.open(folder.ledger)
    if ledger.config_digest != digests.sha256(durable.read(folder.config)):
        raise PrivacyError(
            f"config.json of run {str(folder.path)!r} was changed since the run began; restore it, "
            "or start a new run"
        )
    return settings, ledger


def _in_use(path: Path) -> ValueError:
    return ValueError(
        f"output {str(path)!r} is in use; name a new folder, or go on with an unfinished run by "
        "--resume"
    )

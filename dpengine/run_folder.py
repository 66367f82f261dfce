"""The folder of a run: what is in it, and how a new or an unfinished one is opened."""

import json
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import write_durably
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

    Raises ValueError where the folder is in use.
    """
    if settings.output.output is None:
        name, number = Path(settings.data.data).stem, 1
        while Path("runs", f"{name}-{number:03d}").exists():
            number += 1
        return RunFolder(Path("runs", f"{name}-{number:03d}"))
    path = Path(settings.output.output)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(
            f"output {str(path)!r} is in use; name a new folder, or go on with an unfinished run "
            "by --resume"
        )
    return RunFolder(path)


def create(folder: RunFolder, settings: Settings, plan: PrivacyPlan) -> Ledger:
    """Make the folder with the run's settings, and the ledger in which nothing is spent yet."""
    folder.path.mkdir(parents=True, exist_ok=True)
    content = json.dumps(settings.to_dict(), indent=2) + "\n"
    write_durably(folder.config, content.encode())
    return Ledger.create(folder.ledger, plan)


def read_settings(folder: RunFolder) -> Settings:
    """The settings that a run was started with. Raises ValueError where there is no run."""
    try:
        return Settings.from_dict(json.loads(folder.config.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(folder.path)!r} is not the folder of a run") from error


def reopen(folder: RunFolder) -> tuple[Settings, Ledger]:
    """Settings and ledger of an unfinished run.

    Raises ValueError where there is no run, and PrivacyError where its budget is spent.
    """
    settings = read_settings(folder)
    if not folder.ledger.exists():
        raise PrivacyError(f"run {str(folder.path)!r} has lost its ledger; start a new run")
    if folder.report.exists():
        raise PrivacyError(
            f"the budget of run {str(folder.path)!r} is already spent: its adapter is released; "
            "start a new run, whose epsilon adds to this one's"
        )
    return settings, Ledger.open(folder.ledger)

"""A short real run in a forked child, and what stands in for `os` in ``dpengine.run.durable``.

Model, records and epsilon are prepared once; a child starts or resumes the run with them, and with
synthetic images that are not drawn. It counts every logical batch in memory that it shares with
the test, just before the coins are tossed.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import stat
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from dpengine import accounting, finetune
from dpengine.errors import PrivacyError
from dpengine.mechanism import sampling
from dpengine.mechanism.secure_random import SecureRandom
from dpengine.run import checkpoint, durable, ledger
from dpengine.run import folder as run_folder
from dpengine.run.folder import RunFolder
from dpengine.settings import (
    DataSettings,
    ModelSettings,
    OutputSettings,
    PerformanceSettings,
    PrivacySettings,
    Settings,
)
from dpengine.training import results
from dpengine.training.job import prepare
from dpengine.training.planning import make_plan

STEPS = 3
KILLED, FAILED, REFUSED = 99, 98, 97
"""Statuses of a child: killed by a stand-in for `os`, ended by OSError, or by PrivacyError."""


class Calls:
    """`os`, of which the call number ``at`` does what ``fail`` says; 0 lets all of them pass."""

    def __init__(self, at: int = 0, fail=None) -> None:
        self.count, self._at, self._fail = 0, at, fail

    def __getattr__(self, name):
        function = getattr(os, name)
        if not callable(function):
            return function

        def call(*args):
            self.count += 1
            if self._at and self.count >= self._at:
                return self._fail(self.count == self._at, function, *args)
            return function(*args)

        return call


def kill(is_first, function, *args):
    """Die behind the call, or with half of a write done."""
    if function is os.write:
        args = args[0], args[1][: len(args[1]) // 2]
    function(*args)
    os._exit(KILLED)


def input_output_error(is_first, function, *args):
    """One call fails, a write when half of it is done."""
    if not is_first:
        return function(*args)
    if function is os.write:
        os.write(args[0], args[1][: len(args[1]) // 2])
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def disk_full(is_first, function, *args):
    """From here on there is room for half of one write and for no new file."""
    if function is os.write and is_first and len(args[1]) > 1:
        return os.write(args[0], args[1][: len(args[1]) // 2])
    if function in (os.write, os.mkdir) or (function is os.open and args[1] & os.O_CREAT):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return function(*args)


class Disk:
    """`os` on a disk that loses what was not synced when the power fails behind call ``at``.

    Contents are durable when their file was synced, names when their folder was. What was not is
    lost, or where ``chance`` is given, each name and the end of each file stays or not by a coin.
    What has survived is put in ``after``. Files are told by their inodes, all of them held open so
    that no number is given twice.
    """

    def __init__(self, root: Path, at: int, after: Path, chance: random.Random | None) -> None:
        self.count, self._at, self._root, self._after, self._chance = 0, at, root, after, chance
        self._held, self._contents, self._names = {}, {}, {}
        for path in [root, *sorted(root.rglob("*"))]:
            self._hold(path)
            self._sync(self._held[path.stat().st_ino])

    def __getattr__(self, name):
        function = getattr(os, name)
        if not callable(function):
            return function

        def call(*args):
            result = function(*args)
            if name in ("open", "mkdir"):
                self._hold(args[0])
            if name == "fsync":
                self._sync(args[0])
            self.count += 1
            if self.count == self._at:
                self._lose_power()
            return result

        return call

    def _hold(self, path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        self._held.setdefault(os.fstat(descriptor).st_ino, descriptor)

    def _sync(self, descriptor: int) -> None:
        inode = os.fstat(descriptor).st_ino
        if self._is_folder(inode):
            self._names[inode] = self._current_names(inode)
        else:
            self._contents[inode] = self._current_content(inode)

    def _is_folder(self, inode: int) -> bool:
        return stat.S_ISDIR(os.fstat(self._held[inode]).st_mode)

    def _current_names(self, inode: int) -> dict[str, int]:
        return {entry.name: entry.inode() for entry in os.scandir(self._held[inode])}

    def _current_content(self, inode: int) -> bytes:
        held = self._held[inode]
        return os.pread(held, os.fstat(held).st_size, 0)

    def _lose_power(self) -> None:
        self._write(self._root.stat().st_ino, self._after)
        os._exit(KILLED)

    def _write(self, inode: int, target: Path) -> None:
        if not self._is_folder(inode):
            target.write_bytes(self._surviving_content(inode))
            return
        target.mkdir()
        names = dict(self._names.get(inode, {}))
        if self._chance is not None:
            current = self._current_names(inode)
            for name in sorted(names.keys() | current.keys()):
                kept = self._chance.choice((names, current)).get(name)
                names = {k: v for k, v in names.items() if k != name}
                names |= {name: kept} if kept is not None else {}
        for name, child in names.items():
            self._write(child, target / name)

    def _surviving_content(self, inode: int) -> bytes:
        durable_content = self._contents.get(inode, b"")
        current = self._current_content(inode)
        if self._chance is None or current == durable_content:
            return durable_content
        if current.startswith(durable_content):
            return current[: self._chance.randint(len(durable_content), len(current))]
        return self._chance.choice((durable_content, current))


class Runs:
    """Runs of one prepared job in forked children, and what must hold of them afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        file = folder / "private.npz"
        images = np.random.default_rng(0).integers(0, 256, (24, 8, 8), np.uint8)
        np.savez(file, images=images, labels=np.arange(24) % 10)
        self._settings = Settings(
            data=DataSettings(str(file)),
            model=ModelSettings(rank=2, target_modules=("to_v",)),
            privacy=PrivacySettings(
                epsilon=float("inf"), sampling_rate=0.5, num_steps=STEPS, draws_per_record=1
            ),
            performance=PerformanceSettings(physical_batch_size=8, device="cpu"),
            output=OutputSettings(num_synthetic=10),
        )
        self._job = prepare(self._settings)
        plan = make_plan(self._settings.privacy, self._job)
        self.plan = dataclasses.replace(plan, noise_multiplier=1.0)
        self._bounds = accounting.plan_epsilon(self.plan)
        self._drawn = np.frombuffer(mmap.mmap(-1, 8), np.int64)
        self._number, self.attempts = 0, 0
        self.fresh()

    def fresh(self, num_steps: int = STEPS) -> None:
        """Turn to a new run of ``num_steps``, in a folder that does not exist yet."""
        shutil.rmtree(self.folder / f"root-{self._number}", ignore_errors=True)
        self._number += 1
        self.root = self.folder / f"root-{self._number}"
        self.root.mkdir()
        self.run = RunFolder(self.root / "runs" / "run")
        self.plan = dataclasses.replace(self.plan, num_steps=num_steps)
        self._drawn[0] = self.attempts = 0

    @property
    def drawn(self) -> int:
        """Logical batches whose coins were tossed, by all attempts."""
        return int(self._drawn[0])

    KILLED, REFUSED = KILLED, REFUSED

    def calls(self, at: int, fail) -> Calls:
        return Calls(at, fail)

    def disk(self, at: int, after: Path, chance: random.Random | None) -> Disk:
        return Disk(self.root, at, after, chance)

    def start(self, system=None) -> int:
        """Begin or resume the run in a child, with ``system`` for `os`. Returns its process id."""
        self.attempts += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
            child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                status = 1
                status = self._child(system)
            os._exit(status)
        return child

    def attempt(self, system=None) -> int:
        """Let a child run to its end; returns its status."""
        return os.waitstatus_to_exitcode(os.waitpid(self.start(system), 0)[1])

    def _child(self, system) -> int:
        signal.alarm(120)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        torch.set_num_threads(1)
        drawn = self._drawn

        class Counted(SecureRandom):
            def bernoulli(self, *args):
                drawn[0] += 1
                return super().bernoulli(*args)

        sampling.SecureRandom = Counted
        finetune.prepare = lambda settings: self._job
        finetune.make_plan = lambda privacy, job: self.plan
        accounting.plan_epsilon = lambda *args, **kwargs: self._bounds
        results.draw_images = lambda pipeline, labels, **_: np.zeros((len(labels), 8, 8), np.uint8)
        results.preview.save_grid = lambda file, *_: durable.write(file, b"a picture")
        if system is not None:
            durable.os = system
        output = dataclasses.replace(self._settings.output, output=str(self.run.path))
        settings = dataclasses.replace(self._settings, output=output)
        if self.run.path.exists():
            resumed = Settings(output=OutputSettings(resume=str(self.run.path)))
            settings = run_folder.to_resume(resumed)
        try:
            return finetune.finetune(settings)
        except OSError:
            return FAILED
        except PrivacyError:
            return REFUSED

    def list_calls(self) -> list[str]:
        """What a run calls from its start to its end; `charge` for a write of a ledger's line."""
        listed = self.folder / "calls"

        class Listing:
            def __getattr__(self, name):
                function = getattr(os, name)
                if not callable(function):
                    return function

                def call(*args):
                    is_charge = name == "write" and b'{"previous"' in bytes(args[1])[:11]
                    is_charge = is_charge and b'"max_grad_norm"' in bytes(args[1])
                    with listed.open("a") as file:
                        file.write("charge\n" if is_charge else f"{name}\n")
                    return function(*args)

                return call

        assert self.attempt(Listing()) == 0
        self.check_finished()
        kept = [file.suffix for file in self.run.checkpoints.iterdir()]
        assert kept == [".safetensors"] * 2
        return listed.read_text().split()

    def check_charged(self) -> int:
        """Whatever was drawn is charged, and the newest generation is whole and not newer.

        Returns the number of steps charged; 0 where there is no run yet.
        """
        if not self.run.path.exists():
            assert self.drawn == 0
            return 0
        record = ledger.read(self.run.ledger)
        size = ledger.block_size(self.plan)
        assert self.drawn <= record.reserved <= self.plan.num_steps
        assert record.reserved <= self.drawn + size * self.attempts
        state = checkpoint.read_latest(self.run.checkpoints)
        if state is not None:
            assert record.heads[state.reserved] == state.ledger_head
            assert state.num_updates <= min(state.reserved, self.drawn)
        return record.reserved

    def finish(self) -> None:
        """Go on from what a fault has left, to the end of the plan."""
        is_released = self.run.report.exists()
        assert self.attempt() == (REFUSED if is_released else 0)
        self.check_finished()

    def check_finished(self) -> None:
        """The plan is spent and not passed, and the seal is that of the files."""
        assert self.check_charged() == self.plan.num_steps
        record = ledger.read(self.run.ledger)
        sealed = {path.name for path in self.run.path.iterdir()} - {"ledger.jsonl", "checkpoints"}
        assert record.seal.keys() == sealed and len(sealed) == 6
        for name, digest in record.seal.items():
            assert hashlib.sha256((self.run.path / name).read_bytes()).hexdigest() == digest
        assert json.loads(self.run.report.read_text())["num_steps"] == self.plan.num_steps


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Runs:
    if torch.cuda.is_available():
        pytest.skip("a child of a fork has no CUDA; run these tests with CUDA_VISIBLE_DEVICES=''")
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def faults() -> dict:
    """What can happen at a call, and the statuses with which a child may end."""
    return {
        "kill": (kill, {KILLED}),
        "input_output_error": (input_output_error, {FAILED}),
        "disk_full": (disk_full, {FAILED, 0}),  # 0: no further file was needed
    }


@pytest.fixture(autouse=True)
def fresh_run(request) -> None:
    if "runs" in request.fixturenames:
        request.getfixturevalue("runs").fresh()

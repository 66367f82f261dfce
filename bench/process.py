"""A command in a process of its own: how long it takes, and how much memory at its peak."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Finished:
    """Wall time and peak resident memory of a process from its start to its end."""

    seconds: float
    peak_bytes: int


def run(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Finished:
    """Run ``command`` in ``folder`` with these variables besides our own.

    Raises RuntimeError with what it wrote where it fails.
    """
    # Linux counts what a process held before it became another program: a child of a process with
    # torch in it would start from that peak. The launcher between is small.
    launcher = [sys.executable, "-I", "-S", str(Path(__file__).resolve()), *command]
    done = subprocess.run(
        launcher, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return Finished(**json.loads(done.stdout))


def _launch(command: list[str]) -> int:
    """Run ``command`` with its output on stderr; print what ``Finished`` holds."""
    begin = time.perf_counter()
    child = os.posix_spawn(
        command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)]
    )
    _, status, usage = os.wait4(child, 0)
    seconds = time.perf_counter() - begin
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    print(json.dumps({"seconds": seconds, "peak_bytes": usage.ru_maxrss * unit}))
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    raise SystemExit(_launch(sys.argv[1:]))

"""How the threads of a training step wait for each other, on a quiet machine and beside other work.

Each way of waiting is a process of its own, as the variables are read when torch is loaded. It
trains the default adapter of the shipped base model on rows of noise, whenever it is asked to.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

from dpengine import Capture, DPOptimizer
from dpengine.models import FAMILIES
from dpengine.models.adapter import add_lora
from dpengine.models.base import load_base
from dpengine.settings import ModelSettings

from .results import ROOT
from .turns import Turns

OURS, BY_ITSELF, ASLEEP, ONE = "dpengine", "as OpenMP does", "asleep at once", "one thread"

WAYS: dict[str, dict[str, str]] = {
    OURS: {},
    BY_ITSELF: {},
    ASLEEP: {"OMP_WAIT_POLICY": "PASSIVE"},
    ONE: {"OMP_NUM_THREADS": "1"},
}
"""The variables of each way; what ours sets is read where torch is loaded after it only."""

_BUSY = "print(flush=True)\nwhile True: pass"
_THREADED = """
import torch
torch.set_num_threads(2)
x = torch.randn(64, 2000)
print(flush=True)
while True: x.sin().add_(x)
"""
LOADS: dict[str, str | None] = {
    "quiet": None,
    "beside a busy loop": _BUSY,
    "beside a job of two threads": _THREADED,
}
"""What else the machine does: nothing, or a program."""

RECORDS, DRAWS = 32, 4
"""Of a physical batch, as by default."""


def train(num_steps: int) -> Iterator[None]:
    """Private steps of the default adapter on noise; ``num_steps`` each time it is asked."""
    unet = load_base("default").unet
    model = ModelSettings()
    targets = FAMILIES["ClassConditionalPipeline"].target_modules
    add_lora(unet, rank=model.rank, alpha=model.alpha, target_modules=targets, seed=0)
    capture = Capture(unet.train(), draws_per_record=DRAWS)
    optimizer = DPOptimizer(
        torch.optim.SGD(capture.parameters, lr=1e-3),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=RECORDS,
    )
    n_rows, config = RECORDS * DRAWS, unet.config
    images = torch.randn(n_rows, config.in_channels, config.sample_size, config.sample_size)
    text = torch.randn(n_rows, 1, config.cross_attention_dim)
    timesteps = torch.randint(1000, (n_rows,))
    while True:
        for _ in range(num_steps):
            unet(images, timesteps, text).sample.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        yield


@contextmanager
def process(arguments: list[str], variables: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A Python process that has written its first line, and is ended with the context."""
    chosen = ("OMP_", "GOMP_", "KMP_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(chosen)}
    command = [sys.executable, *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    child = subprocess.Popen(command, cwd=ROOT, env=kept | variables, text=True, **pipes)
    try:
        _answer(child)
        yield child
    finally:
        child.kill()
        child.communicate()


def measure(load: str, num_steps: int, rounds: int) -> Turns[str]:
    """Every way of waiting, training by turns beside ``load``, ``num_steps`` in each turn."""
    with ExitStack() as running:
        ways = {
            name: running.enter_context(process(_worker(name, num_steps), variables))
            for name, variables in WAYS.items()
        }
        turns = Turns({name: partial(_ask, child) for name, child in ways.items()})
        turns.warm_up()
        if LOADS[load] is not None:
            running.enter_context(process(["-c", LOADS[load]], {}))
        for _ in range(rounds):
            turns.round()
    return turns


def serve(num_steps: int) -> None:
    """Train whenever a line comes, and answer by one."""
    steps = train(num_steps)
    print(flush=True)
    for _ in sys.stdin:
        next(steps)
        print(flush=True)


def _worker(way: str, num_steps: int) -> list[str]:
    before = "" if way == OURS else "import torch; "
    return ["-c", f"{before}from bench.threads import serve; serve({num_steps})"]


def _ask(child: subprocess.Popen[str]) -> None:
    print(file=child.stdin, flush=True)
    _answer(child)


def _answer(child: subprocess.Popen[str]) -> None:
    if not child.stdout.readline():
        raise RuntimeError("a process that is measured ended before it answered")

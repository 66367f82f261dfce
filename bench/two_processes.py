"""A private step by one process, and by two with half of the records and of the threads each.

dpengine refuses several processes (`mechanism/ranks.py`). This shows what its mechanism would
allow: it is put together from the parts below `DPOptimizer`, for measurement, and no user can run
it. The process that holds a record clips it; the float64 sums are added; the first process adds
noise, once, and hands the noisy mean out, so that both make the same update. Each record being in
one process, it moves the whole sum by at most the bound.
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dpengine import Capture, ClippedSum, Flat
from dpengine.mechanism.noise import noisy_mean
from dpengine.mechanism.secure_random import SecureRandom

from .peers import MAX_GRAD_NORM
from .training import Task, Training, adamw, small
from .turns import Turns

ONE, TWO = "1 process", "2 processes"
FAST = 1e4
"""A learning rate at which the rounding of the weights hides nothing of their update."""


def start(
    task: Task,
    make_optimizer: Callable[[list[nn.Parameter]], Optimizer],
    n_records: int,
    *,
    several: bool,
    noise_multiplier: float = 1.0,
    max_grad_norm: float = MAX_GRAD_NORM,
) -> Training:
    """``step(*rows)`` with this process's records of a logical batch of ``n_records``.

    several: whether the others of the group hold the rest of them, and step as well.
    """
    module = task.make_model().train()
    capture = Capture(module)
    params, clipping, random = capture.parameters, Flat(max_grad_norm), SecureRandom()
    optimizer = make_optimizer(params)

    def noised(own: ClippedSum) -> Tensor:
        if several:
            dist.all_reduce(own.values)
        if several and dist.get_rank() > 0:
            mean = torch.empty_like(own.values)
        else:
            mean = noisy_mean(own, noise_multiplier, n_records, random)
        if several:
            dist.broadcast(mean, src=0)
        return mean

    @torch.no_grad()
    def clip_and_update() -> None:
        batch = capture.take()
        # The loss is a mean over the rows, of which there is one for each record.
        clipped = clipping.clip_and_sum(batch.grads.whole, batch.is_record, loss_scale=batch.n_rows)
        mean = noised(ClippedSum(batch.grads.pack(clipped.values), clipped.sensitivity))
        pieces = mean.split([param.numel() for param in params])
        for param, piece in zip(params, pieces, strict=True):
            param.grad = piece.view_as(param).to(param.dtype)
        optimizer.step()

    def step(*rows: Tensor) -> None:
        loss = task.loss(module, *rows)
        loss.backward()
        clip_and_update()
        optimizer.zero_grad()

    return Training(step, params)


def own_rows(task: Task, n_records: int) -> list[Tensor]:
    """This process's half of a batch."""
    half = n_records // 2
    return [rows[dist.get_rank() * half :][:half] for rows in task.inputs(n_records)]


def updates(image: int, n_records: int, max_grad_norm: float) -> list[list[float]]:
    """What a step of two without noise takes from the weights, at learning rate 1, in each.  [P]"""
    return by_two(_update, image, n_records, max_grad_norm)


def seconds(
    image: int, n_records: list[int], rounds: int, threads: int
) -> dict[int, dict[str, list[float]]]:
    """For each size of a batch, of a step by one process and by two, in rounds by turns.

    threads: of the one process; the two have half of them each. A step of two begins when both are
    there and ends when both are done. Measured in the first process.
    """
    return by_two(_seconds, image, n_records, rounds, threads)[0]


def by_two(measure: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``measure(*arguments)`` returns in each of two new processes, which form a group."""
    spawn = get_context("spawn")
    with TemporaryDirectory() as folder, ProcessPoolExecutor(2, mp_context=spawn) as pool:
        meeting = Path(folder) / "meeting"
        running = [pool.submit(_in_group, rank, meeting, measure, arguments) for rank in range(2)]
        return [process.result() for process in running]


def _in_group(
    rank: int, meeting: Path, measure: Callable[..., Any], arguments: tuple[Any, ...]
) -> Any:
    dist.init_process_group(
        "gloo",
        init_method=meeting.as_uri(),
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=2),
    )
    try:
        return measure(*arguments)
    finally:
        dist.destroy_process_group()


def _update(image: int, n_records: int, max_grad_norm: float) -> list[float]:
    task, sgd = small(size=image), partial(torch.optim.SGD, lr=FAST)
    mechanism = {"noise_multiplier": 0.0, "max_grad_norm": max_grad_norm}
    training = start(task, sgd, n_records, several=True, **mechanism)
    before = [param.detach().clone() for param in training.params]
    training.step(*own_rows(task, n_records))
    pairs = zip(before, training.params, strict=True)
    taken = torch.cat([(old.double() - new.detach()).flatten() for old, new in pairs])
    return (taken / FAST).tolist()


def _seconds(
    image: int, n_records: list[int], rounds: int, threads: int
) -> dict[int, dict[str, list[float]]]:
    taken = {}
    for records in n_records:
        turns = Turns(_peers(small(size=image), records, threads))
        turns.warm_up()
        for _ in range(rounds):
            turns.round()
        taken[records] = turns.seconds
    return taken


def _peers(task: Task, n_records: int, threads: int) -> dict[str, Callable[[], None]]:
    """Both have the same turns in both processes; in that of the one, the second has nothing to do
    and waits for the next turn of the two."""
    alone = start(task, adamw, n_records, several=False)
    together = start(task, adamw, n_records, several=True)
    whole, half = task.inputs(n_records), own_rows(task, n_records)

    def one() -> None:
        if dist.get_rank() == 0:
            torch.set_num_threads(threads)
            alone.step(*whole)

    def two() -> None:
        torch.set_num_threads(max(1, threads // 2))
        dist.barrier()
        together.step(*half)
        dist.barrier()

    return {ONE: one, TWO: two}

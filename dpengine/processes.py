"""One process trains: clipping, noise and charging are not defined across several."""

import os

import torch.distributed

_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""How torchrun and the launchers of MPI tell each process how many there are."""


def refuse_several() -> None:
    """Raise ValueError where more than one process trains, or was asked for.

    Known from torch.distributed, and before it is set up from what launchers leave in the
    environment.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        size, told_by = torch.distributed.get_world_size(), "torch.distributed"
    else:
        size, told_by = max((_size(name), name) for name in _SIZES)
    if size > 1:
        raise ValueError(
            f"private training runs in one process, got a world size of {size} ({told_by}); start "
            "it without torchrun or mpirun, or with one process"
        )
    # Without a GPU, accelerate starts one process however many it was asked for, and of these it
    # leaves this trace alone.
    environment = os.environ
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= environment.keys() and (
        "WORLD_SIZE" not in environment
    ):
        raise ValueError(
            "private training runs in one process, and accelerate was asked for several (it sets "
            "MASTER_ADDR); launch with --num_processes 1 --num_machines 1"
        )


def _size(name: str) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else 1

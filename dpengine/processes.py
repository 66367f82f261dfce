"""One process trains: clipping, noise and charging are not defined across several."""

import os

import torch.distributed

_WORLD_SIZES = {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}


def refuse_several() -> None:
    """Raise ValueError where torch.distributed runs more than one process, or was to."""
    # What accelerate's launcher sets for several processes on a CPU, of which it starts one.
    if {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys() and not (
        _WORLD_SIZES & os.environ.keys()
    ):
        raise ValueError(
            "private training runs in one process, and accelerate launch was asked for several; "
            "it started one on this CPU: give it --num_processes 1"
        )
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise ValueError(
            f"private training runs in one process, got a world size of "
            f"{torch.distributed.get_world_size()}; start it without torchrun, or with one process"
        )

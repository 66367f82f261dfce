"""One process trains: clipping, noise and charging are not defined across several."""

import os

import torch.distributed

from ..errors import PrivacyError

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
    # What accelerate's launcher sets for several processes on a CPU, of which it starts one.
    launched = {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys()
    if launched and not os.environ.keys() & set(_SIZES):
        raise ValueError(
            "private training runs in one process, and accelerate launch was asked for several; it "
            "started one on this CPU: give it --num_processes 1"
        )


def refuse_another(process: int) -> None:
    """Raise PrivacyError in another process than ``process``, such as a fork of it.

    What it trains on weights that both share would be in the count of neither.
    """
    if os.getpid() != process:
        raise PrivacyError(
            "what trains privately and counts it is its process's own; make module, optimizer and "
            "PrivacyEngine in the process that trains"
        )


def _size(name: str) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else 1

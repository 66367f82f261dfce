"""One process trains: clipping, noise and charging are not defined across several."""

import torch.distributed


def refuse_several() -> None:
    """Raise ValueError where torch.distributed runs more than one process."""
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise ValueError(
            f"private training runs in one process, got a world size of "
            f"{torch.distributed.get_world_size()}; start it without torchrun, or with one process"
        )

"""Performance settings put to work: device, types, recomputation and the physical batch size.

Nothing here can change epsilon: the mechanism sees per-record gradients and clips what it sees.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..capture import Capture, Loss
from ..mechanism.clipping import Flat
from ..models import Batch, NoisePath, Objective, row_losses
from ..settings import PerformanceSettings, parse_bytes
from . import memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Synthetic = Callable[[int], Batch]
"""The rows of so many synthetic records."""

_FP16_LOSS_SCALE = 2.0**12
"""Public and constant: one that follows overflows would follow private gradients."""


def loss_scale(settings: PerformanceSettings) -> float:
    """What the loss is multiplied by, and its gradients divided by before their norm is taken."""
    return _FP16_LOSS_SCALE if settings.precision == "fp16" else 1.0


def device(settings: PerformanceSettings) -> torch.device:
    """The device to train on. Raises ValueError where it is not there."""
    available = torch.cuda.is_available()
    if settings.device == "cuda" and not available:
        raise ValueError("device must be 'cpu' or 'auto' here, got 'cuda': torch finds no GPU")
    return torch.device("cuda" if available and settings.device != "cpu" else "cpu")


def cast(unet: nn.Module, settings: PerformanceSettings) -> dict[str, Tensor]:
    """Cast what is frozen in ``unet``, and return it as it was, on the CPU."""
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if settings.precision == "fp32":
        return {}
    frozen = {}
    for name, tensor in (*unet.named_parameters(), *unet.named_buffers()):
        if not tensor.requires_grad and tensor.is_floating_point():
            frozen[name] = tensor.detach().cpu().clone()
            tensor.data = tensor.data.to(DTYPES[settings.precision])
    return frozen


def uncast(unet: nn.Module, frozen: dict[str, Tensor]) -> None:
    """Put back what ``cast`` took: images are drawn from the base as it is published."""
    for name, tensor in (*unet.named_parameters(), *unet.named_buffers()):
        if name in frozen:
            tensor.data = frozen[name].to(tensor.device)


def make_loss(
    objective: Objective, path: NoisePath, settings: PerformanceSettings
) -> Callable[[Batch], Tensor]:
    """The mean loss over the rows of a physical batch, in the precision of ``settings``."""
    dtype = DTYPES[settings.precision]
    scale = loss_scale(settings)

    def loss(batch: Batch) -> Tensor:
        half = dtype != torch.float32
        with torch.autocast(batch["latents"].device.type, dtype if half else None, enabled=half):
            losses = row_losses(objective, path, batch)
        return losses.mean() * scale

    return loss


def physical_batch_size(
    capture: Capture,
    loss: Loss,
    synthetic: Synthetic,
    settings: PerformanceSettings,
    at_most: int,
) -> int:
    """Records of a physical batch: as set, or the most that ``max_memory`` has room for.

    ``synthetic(n)`` gives the rows of n synthetic records. The dry runs see them alone.
    """
    if settings.max_memory is None:
        return settings.physical_batch_size

    def run(n_records: int) -> None:
        try:
            loss(synthetic(n_records)).backward()
            batch = capture.take()
            Flat(1.0).clip_and_sum(batch.grads.whole, batch.is_record)
        finally:
            capture.reset()

    found = memory.largest_batch(
        run,
        parse_bytes(settings.max_memory),
        device(settings),
        at_most=at_most,
        resident=[*capture.module.parameters(), *capture.module.buffers()],
    )
    # Between 1 and 8 records, rounding may depend on a record's place.
    return found if found % 8 == 0 else 1

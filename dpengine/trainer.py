"""What changes during training, and its checkpoints."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from . import checkpoint
from .average import WeightAverage
from .checkpoint import Checkpoint
from .errors import PrivacyError
from .ledger import Ledger
from .optimizer import DPOptimizer
from .plan import PrivacyPlan
from .settings import TrainingSettings


@dataclass(frozen=True)
class Trainer:
    """The private optimizer, its learning rate schedule, and the average that is released."""

    params: list[nn.Parameter]
    optimizer: DPOptimizer
    lr_scheduler: LRScheduler
    average: WeightAverage

    def after_step(self) -> None:
        """Move schedule and average on by one step.

        Raises ValueError where the weights, which are released values, are no longer finite.
        """
        if not all(param.isfinite().all() for param in self.params):
            raise ValueError(
                "the weights are no longer finite; start a new run with a smaller learning_rate"
            )
        self.lr_scheduler.step()
        self.average.update()

    def save(self, folder: Path) -> None:
        """Write a checkpoint of the last whole step."""
        weights = {f"weight.{i}": p.detach() for i, p in enumerate(self.params)}
        averages = {f"average.{i}": tensor for i, tensor in enumerate(self.average.tensors)}
        state = Checkpoint(
            num_updates=self.average.num_updates,
            tensors=weights | averages,
            optimizer=self.optimizer.state_dict(),
            lr_scheduler=self.lr_scheduler.state_dict(),
        )
        checkpoint.write(folder, state)

    def restore(self, folder: Path, ledger: Ledger) -> None:
        """Go on from the newest checkpoint, if there is one.

        Raises PrivacyError where it holds more steps than the ledger has charged.
        """
        state = checkpoint.read_latest(folder)
        if state is None:
            if ledger.remaining == 0:
                raise PrivacyError(
                    "all planned steps are spent and no checkpoint of them is left; start a new run"
                )
            return
        if state.num_updates > ledger.reserved:
            raise PrivacyError(
                f"the checkpoint holds {state.num_updates} steps and the ledger only "
                f"{ledger.reserved}: the ledger was rolled back; restore it, or start a new run"
            )
        with torch.no_grad():
            for i, (param, average) in enumerate(
                zip(self.params, self.average.tensors, strict=True)
            ):
                param.copy_(state.tensors[f"weight.{i}"])
                average.copy_(state.tensors[f"average.{i}"])
        self.average.num_updates = state.num_updates
        self.optimizer.load_state_dict(state.optimizer)
        self.lr_scheduler.load_state_dict(state.lr_scheduler)


def make_trainer(
    training: TrainingSettings, plan: PrivacyPlan, params: list[nn.Parameter]
) -> Trainer:
    """The trainer of a new run; its schedule spans the planned steps."""
    if training.optimizer == "adamw":
        learning_rate = training.learning_rate or 0.01
        inner = torch.optim.AdamW(params, lr=learning_rate, weight_decay=training.weight_decay)
    else:
        # The clipped mean has norm at most C: a step size in units of 1/C fits every bound.
        learning_rate = training.learning_rate or 5 / plan.max_grad_norm
        inner = torch.optim.SGD(params, lr=learning_rate, momentum=training.momentum)
    optimizer = DPOptimizer(
        inner,
        noise_multiplier=plan.noise_multiplier,
        max_grad_norm=plan.max_grad_norm,
        expected_batch_size=plan.expected_batch_size,
    )
    lr_scheduler = get_scheduler(
        training.lr_schedule, optimizer, num_warmup_steps=0, num_training_steps=plan.num_steps
    )
    return Trainer(params, optimizer, lr_scheduler, WeightAverage(params, training.ema_decay))

"""What changes during training, and its checkpoints."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..errors import PrivacyError
from ..mechanism.adaptive import Adaptive
from ..mechanism.clipping import Automatic, Flat, PerLayer
from ..mechanism.plan import PrivacyPlan
from ..mechanism.step import Clipping
from ..optim import DPOptimizer
from ..optim.update import AdamWBC, Filter, Identity, Lamb, LaplacianSmoothing, LowPass
from ..optim.update.average import WeightAverage
from ..run import checkpoint
from ..run.checkpoint import Checkpoint
from ..run.ledger import Ledger
from ..settings import PrivacySettings, Settings, TrainingSettings


@dataclass(frozen=True)
class Trainer:
    """The private optimizer, its learning rate schedule, and the average that is released."""

    params: list[nn.Parameter]
    optimizer: DPOptimizer
    lr_scheduler: LRScheduler
    average: WeightAverage

    @property
    def noisy_share(self) -> float | None:
        """Noised share of records within the clip bound; None unless clipping asks for it."""
        return self.optimizer.clipping.noisy_share

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

    def save(self, folder: Path, ledger: Ledger) -> None:
        """Write a checkpoint of the last whole step, which tells where the ledger is."""
        weights = {f"weight.{i}": p.detach() for i, p in enumerate(self.params)}
        averages = {f"average.{i}": tensor for i, tensor in enumerate(self.average.tensors)}
        state = Checkpoint(
            num_updates=self.average.num_updates,
            tensors=weights | averages,
            optimizer=self.optimizer.state_dict(),
            lr_scheduler=self.lr_scheduler.state_dict(),
            filter=self.optimizer.filter.state_dict(),
            max_grad_norm=self.optimizer.max_grad_norm,
            ledger_head=ledger.head,
            reserved=ledger.reserved,
        )
        checkpoint.write(folder, state)

    def restore(self, folder: Path, ledger: Ledger) -> None:
        """Go on from the newest checkpoint, if there is one, in a folder made where there is none.

        Raises PrivacyError where the ledger does not hold the line that it held when the
        checkpoint was written, and ValueError where the checkpoint is of another model.
        """
        checkpoint.make_folder(folder)
        state = checkpoint.read_latest(folder)
        if state is None:
            if ledger.remaining == 0:
                raise PrivacyError(
                    "all planned steps are spent and no checkpoint of them is left; start a new run"
                )
            return
        if state.num_updates > state.reserved or not ledger.holds(
            state.ledger_head, state.reserved
        ):
            raise PrivacyError(
                f"the checkpoint was written with {state.reserved} steps charged, and the ledger "
                f"does not hold the line of that moment (it holds {ledger.reserved} steps): it was "
                "rolled back or is another run's; restore it, or start a new run"
            )
        self._load_weights(state)
        self.average.num_updates = state.num_updates
        self.optimizer.load_state_dict(state.optimizer)
        self.lr_scheduler.load_state_dict(state.lr_scheduler)
        self.optimizer.filter.load_state_dict(state.filter)
        self.optimizer.clipping = replace(
            self.optimizer.clipping, max_grad_norm=state.max_grad_norm
        )
        self.optimizer.discard()  # an empty sum under the bound just restored

    def _load_weights(self, state: Checkpoint) -> None:
        pairs = [(f"weight.{i}", param) for i, param in enumerate(self.params)]
        pairs += [(f"average.{i}", tensor) for i, tensor in enumerate(self.average.tensors)]
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in pairs}
        if shapes != {name: (t.shape, t.dtype) for name, t in state.tensors.items()}:
            raise ValueError(
                "the checkpoint is of another model: names, shapes or dtypes of its tensors "
                "differ; restore the base model, or start a new run"
            )
        with torch.no_grad():
            for name, tensor in pairs:
                tensor.copy_(state.tensors[name])


def make_trainer(
    settings: Settings, plan: PrivacyPlan, params: list[nn.Parameter], loss_scale: float = 1.0
) -> Trainer:
    """The trainer of a new run; its schedule spans the planned steps.

    loss_scale: the public constant that losses are multiplied by before their backward pass.
    """
    training = settings.training
    optimizer = DPOptimizer(
        _inner_optimizer(training, plan, params),
        noise_multiplier=plan.noise_multiplier,
        max_grad_norm=plan.max_grad_norm,
        expected_batch_size=plan.expected_batch_size,
        loss_scale=loss_scale,
        clipping=_clipping(settings.privacy, plan),
        filter=_filter(training),
    )
    lr_scheduler = get_scheduler(
        training.lr_schedule, optimizer, num_warmup_steps=0, num_training_steps=plan.num_steps
    )
    return Trainer(params, optimizer, lr_scheduler, WeightAverage(params, training.ema_decay))


def _inner_optimizer(
    training: TrainingSettings, plan: PrivacyPlan, params: list[nn.Parameter]
) -> Optimizer:
    if training.optimizer == "sgd":
        # The clipped mean has norm at most C: a step size in units of 1/C fits every bound.
        learning_rate = training.learning_rate or 5 / plan.max_grad_norm
        return torch.optim.SGD(params, lr=learning_rate, momentum=training.momentum)
    decayed = {"lr": training.learning_rate or 0.01, "weight_decay": training.weight_decay}
    if training.optimizer == "adamw":
        return torch.optim.AdamW(params, **decayed)
    if training.optimizer == "lamb":
        return Lamb(params, **decayed)
    stddev = plan.noise_multiplier * plan.max_grad_norm / plan.expected_batch_size
    # Where the second moment is no longer told from its noise: after many steps its standard
    # deviation is that of an average over (1 + beta) / (1 - beta) squared normals.
    beta = 0.999
    floor = stddev**2 * (2 * (1 - beta) / (1 + beta)) ** 0.5
    return AdamWBC(
        params, betas=(0.9, beta), noise_variance=stddev**2, floor=floor or 1e-16, **decayed
    )


def _clipping(privacy: PrivacySettings, plan: PrivacyPlan) -> Clipping:
    if plan.clipping == "per-layer":
        return PerLayer(plan.max_grad_norm)
    if plan.clipping == "automatic":
        return Automatic(plan.max_grad_norm, privacy.gamma)
    if plan.clipping == "adaptive":
        return Adaptive(
            plan.max_grad_norm,
            # The paper's choice: little noise beside the count, at little cost to the sum.
            max(plan.expected_batch_size / 20, plan.noise_multiplier),
            privacy.clip_quantile,
            privacy.clip_learning_rate,
        )
    return Flat(plan.max_grad_norm)


def _filter(training: TrainingSettings) -> Filter:
    if training.gradient_filter == "laplacian":
        return LaplacianSmoothing(training.filter_strength)
    if training.gradient_filter == "low-pass":
        return LowPass(training.filter_strength)
    return Identity()

"""What ``make_private`` is told, checked before anything is changed."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from ..errors import positive_int, probability
from ..kernels.ops import Impl
from ..mechanism.clipping import Automatic, PerLayer
from ..mechanism.plan import Adjacency
from ..mechanism.step import Clipping
from ..mechanism.units import number_units
from ..optim import DPOptimizer
from .copies import refuse_copies
from .loader import IndexBatches, Rate, check_derived, public_batch_size, refuse, refuse_left_out

_MODES = ("hooks", "functorch", "ew", "ghost")
_REQUIRED = ("module", "optimizer", "data_loader", "max_grad_norm")
_INSTEAD = {
    "alphas": "leave it out, epsilon is composed numerically (PRV)",
    "epsilon_tolerance": "leave it out, the noise is calibrated to the certified upper bound",
    "target_unclipped_quantile": "give clipping=dpengine.Adaptive(...), its quantile",
    "clipbound_learning_rate": "give clipping=dpengine.Adaptive(...), its learning_rate",
    "max_clipbound": "leave it out, dpengine.Adaptive bounds what a step moves C by, not C",
    "min_clipbound": "leave it out, dpengine.Adaptive bounds what a step moves C by, not C",
    "unclipped_num_std": "give clipping=dpengine.Adaptive(...), its count_noise_stddev",
    "strict": "leave it out, every trainable tensor needs a per-record rule",
    "force_functorch": "leave it out, layers without a rule of their own run through torch.func",
}


@dataclass(frozen=True)
class Arguments:
    """Arguments of ``make_private``; those of Opacus mean what they mean there.

    module: returned as it is; its trainable tensors are captured. optimizer: holds them.
    criterion: returned with `ghost`, unchanged. data_loader: its batch_size is the expected size of
    a batch, in units, and the divisor; its order is used with ``poisson_sampling=False``
    only, at the cost of an unamplified Gaussian for each pass.
    clipping: `flat`, `per_layer`, `automatic`, or a mode of ``dpengine``.
    grad_sample_mode: `hooks`, `functorch` and `ew` are one and the same here. `ghost` keeps factors
    of the gradients in place of a gradient for each record where a linear layer's own weight is
    trained: less memory for large matrices, at twice the work of these.
    wrap_model: False returns the ``Capture``, with its ``cleanup()``, in place of the module.
    draws_per_record: K; the module is called on N·K rows, row ``n * K + k`` being record n's.
    sample_rate: q, public; without it q is batch_size over the true size, which is then public,
    and adjacency is zero-out. adjacency: `replace-one` protects a record that is replaced by any
    other, at a higher epsilon. unit_ids: whose each record is, read by ``number_units``; units are
    then what is sampled and protected, each bringing ``rows_per_unit`` records, ordered like
    further draws.
    impl: as in ``kernels.ops``. static_batch: units in every batch, padded with zero rows.
    loss_scale: the public constant that losses are multiplied by.
    """

    module: nn.Module
    optimizer: Optimizer
    data_loader: DataLoader
    max_grad_norm: float
    criterion: Callable[..., Any] = field(default_factory=nn.CrossEntropyLoss)
    batch_first: Literal[True] = True
    loss_reduction: str = "mean"
    poisson_sampling: bool = True
    clipping: str | Clipping = "flat"
    noise_generator: None = None
    grad_sample_mode: str = "hooks"
    wrap_model: bool = True
    rand_on_empty: Literal[False] = False
    draws_per_record: int = 1
    sample_rate: float | None = None
    adjacency: Adjacency | None = None
    unit_ids: np.ndarray | None = field(default=None, repr=False)
    rows_per_unit: int = 1
    impl: Impl = "auto"
    static_batch: int | None = None
    loss_scale: float = 1.0

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> "Arguments":
        """From keyword arguments. Raises TypeError for unknown ones, naming what to use instead."""
        for name in arguments:
            if name in _INSTEAD:
                raise TypeError(f"make_private does not take {name}: {_INSTEAD[name]}")
            if name not in cls.__dataclass_fields__:
                raise TypeError(
                    f"make_private does not take {name}; it takes "
                    f"{', '.join(cls.__dataclass_fields__)}"
                )
        missing = [name for name in _REQUIRED if name not in arguments]
        if missing:
            raise TypeError(f"make_private needs {', '.join(missing)}")
        if arguments.get("unit_ids") is not None:
            arguments = {**arguments, "unit_ids": number_units(arguments["unit_ids"])}
        return cls(**arguments)

    def __post_init__(self) -> None:
        positive_int(draws_per_record=self.draws_per_record, rows_per_unit=self.rows_per_unit)
        if not isinstance(self.module, nn.Module):
            raise TypeError(f"module must be an nn.Module, got {type(self.module).__name__}")
        if not isinstance(self.data_loader, DataLoader):
            kind = type(self.data_loader).__name__
            raise TypeError(f"data_loader must be torch's DataLoader, got {kind}")
        if self.noise_generator is not None:
            raise ValueError("noise_generator must be None: noise must be secret; leave it out")
        refuse(None, False, self.batch_first, self.rand_on_empty)
        if self.grad_sample_mode not in _MODES:
            raise ValueError(
                f"grad_sample_mode must be one of {_MODES}, got {self.grad_sample_mode!r}; "
                "leave it out, or give 'ghost' for less memory where large matrices are trained"
            )
        if isinstance(self.module, nn.parallel.DistributedDataParallel):
            raise ValueError("module must not be wrapped for several processes: give its .module")
        if type(self.module).forward is nn.Module.forward:
            raise TypeError(
                f"module must be called as a whole, which a {type(self.module).__name__} cannot "
                "be: make one of several modules with dpengine.Together, and call that"
            )
        _check_bound(self.max_grad_norm)
        if isinstance(self.data_loader.dataset, IterableDataset):
            raise TypeError(
                "data_loader must be over a dataset with numbered records, so that each can be "
                "sampled on its own; load the IterableDataset into memory or on disk"
            )
        samples_by_itself = getattr(self.data_loader.batch_sampler, "rate", None) is not None
        if samples_by_itself and self.sample_rate is not None:
            raise ValueError(
                "sample_rate must be left out with a DPDataLoader, which has one; give an ordinary "
                "DataLoader, whose batch_size is the divisor"
            )
        if self.poisson_sampling:
            refuse_left_out(self.data_loader)
        if self.static_batch is not None:
            positive_int(static_batch=self.static_batch)
        if self.sample_rate is not None:
            probability(sample_rate=self.sample_rate)
        if self.unit_ids is not None and np.shape(self.unit_ids) != (
            len(self.data_loader.dataset),
        ):
            raise ValueError(
                "unit_ids must be one-dimensional, with one id for each record of the data"
            )
        refuse_copies(self.data_loader.dataset, self.unit_ids)
        of_loader = getattr(self.data_loader.batch_sampler, "unit_ids", None)
        if of_loader is not None and self.unit_ids is None:
            raise ValueError(
                "unit_ids must be given here where the loader has them, and an ordinary "
                "DataLoader; else records would be protected, and not persons"
            )
        if not self.poisson_sampling and (
            self.sample_rate is not None or self.unit_ids is not None
        ):
            raise ValueError(
                "sample_rate and unit_ids go with Poisson sampling; leave poisson_sampling at True"
            )
        if self.unit_ids is None and self.rows_per_unit > 1:
            raise ValueError("rows_per_unit must be 1 without unit_ids; give them")
        _ = self.neighbours
        _check_optimizer(self.module, self.optimizer)

    @property
    def inner_optimizer(self) -> Optimizer:
        """The optimizer, its privacy taken off where it has been made private before."""
        if isinstance(self.optimizer, DPOptimizer):
            return self.optimizer.original_optimizer
        return self.optimizer

    @property
    def clipping_mode(self) -> Clipping | None:
        """The mode that ``clipping`` names; None is flat clipping."""
        if not isinstance(self.clipping, str):
            return self.clipping
        if self.clipping == "per_layer":
            return PerLayer(self.max_grad_norm)
        if self.clipping == "automatic":
            return Automatic(self.max_grad_norm)
        if self.clipping != "flat":
            raise ValueError(
                "clipping must be 'flat', 'per_layer', 'automatic' or a mode of dpengine, got "
                f"{self.clipping!r}; for adaptive clipping give "
                "dpengine.Adaptive(max_grad_norm, count_noise_stddev)"
            )
        return None

    @property
    def noised_values(self) -> int:
        """How many values a step may noise: the sum, and a count where clipping is adaptive.

        Two for the count in any case: an optimizer of an earlier call takes these batches too.
        """
        trained = [param.numel() for param in self.module.parameters() if param.requires_grad]
        return sum(trained) + 2

    @property
    def expected_batch_size(self) -> float:
        """The divisor, in units: a number that the caller has set."""
        batches = self.data_loader.batch_sampler
        if isinstance(batches, IndexBatches):
            return batches.expected_batch_size
        return float(public_batch_size(self.data_loader))

    @property
    def constant_batch(self) -> int | None:
        """``static_batch``, or that of a DPDataLoader which has one."""
        batches = self.data_loader.batch_sampler
        if self.static_batch is None and isinstance(batches, IndexBatches) and batches.pad:
            return batches.physical_batch_size
        return self.static_batch

    @property
    def n_units(self) -> int:
        """The true number of units; public where ``sample_rate`` is not given."""
        if self.unit_ids is not None:
            return int(self.unit_ids.max()) + 1
        return len(self.data_loader.dataset)

    @property
    def rate(self) -> Rate | None:
        """How batches are drawn; None for the caller's own order."""
        if not self.poisson_sampling:
            return None
        given = getattr(self.data_loader.batch_sampler, "rate", None)
        rate = self.sample_rate or (given.sampling_rate if given is not None else None)
        if rate is None:
            rate = self.expected_batch_size / self.n_units
            check_derived(rate)
        unit = "record" if self.unit_ids is None else "unit"
        return Rate(rate, unit, self.rows_per_unit)

    @property
    def public_dataset_size(self) -> int:
        """The number of units that rate and divisor stand for."""
        if self.sample_rate is None:
            return self.n_units
        return round(self.expected_batch_size / self.sample_rate)

    @property
    def neighbours(self) -> Adjacency:
        """Add-remove where every number is public, zero-out where the true size is one of them.

        Replace-one where it is asked for: one contribution of norm at most C becomes another, in
        each Poisson sample, and in one batch of a pass in the caller's own order.
        """
        derived: Adjacency = "zero-out" if self.sample_rate is None else "add-remove"
        if self.adjacency not in (None, "replace-one", derived):
            raise ValueError(
                f"adjacency must be 'replace-one' or left out, as it is {derived} "
                f"{'without' if self.sample_rate is None else 'with'} a public sample_rate, got "
                f"{self.adjacency!r}"
            )
        return self.adjacency or derived


def _check_bound(max_grad_norm: object) -> None:
    if isinstance(max_grad_norm, list | tuple) and all(
        isinstance(bound, int | float) for bound in max_grad_norm
    ):
        raise TypeError(
            "max_grad_norm must be one number, the bound of a record's whole contribution: give "
            f"{math.hypot(*max_grad_norm):.6g}, the root of the sum of squares of the "
            f"{len(max_grad_norm)} bounds, at the same noise and epsilon; clipping='per_layer' "
            "divides it evenly among the layers, a layer's weight and bias together"
        )
    if not isinstance(max_grad_norm, int | float):
        raise TypeError(
            f"max_grad_norm must be one number, got a {type(max_grad_norm).__name__}; "
            "clipping='per_layer' divides it among the layers"
        )


def _check_optimizer(module: nn.Module, optimizer: Optimizer) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}")
    if type(optimizer).__module__.startswith("accelerate."):
        raise TypeError(
            "optimizer is prepared by accelerate, which may scale or leave out its steps; call "
            "accelerator.prepare after make_private"
        )
    in_module = {id(param) for param in module.parameters()}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if not all(isinstance(param, torch.Tensor) and id(param) in in_module for param in params):
        raise ValueError(
            "optimizer must hold the module's parameters and no others; make it from "
            "module.parameters(), after the module was moved and adapted, and of several modules "
            "make one first with dpengine.Together"
        )

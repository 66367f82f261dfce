"""PrivacyEngine: module, optimizer and loader of a user's own loop, made private."""

import warnings
from collections.abc import Callable, Iterable
from decimal import ROUND_CEILING, Context, Decimal
from os import PathLike
from typing import Any, BinaryIO

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ..accounting import calibrate_noise_multiplier, noise_tail_delta
from ..capture import Capture, first_batch, wiring
from ..capture.layers import trained_layers
from ..capture.soundness import refuse_unsound_modules
from ..errors import not_negative, positive_int
from ..mechanism.plan import check_delta
from ..mechanism.ranks import refuse_several
from ..optim import DPOptimizer
from . import checkpointing
from .accountant import Accountant, Budget, Mechanism
from .arguments import Arguments
from .loader import DPDataLoader, IndexBatches, lookahead


class PrivacyEngine:
    """Makes training private and counts what it costs; the surface is that of Opacus 1.6.

    accountant: `prv`. secure_mode: noise and coins are cryptographic whatever it says.

    Every logical batch is charged before it is drawn, by the loader that ``make_private`` returns,
    which is the only one that its optimizer trains on. Charges live in this object and in the
    checkpoints that it saves; those after the last checkpoint are lost with the process.
    """

    def __init__(self, *, accountant: str = "prv", secure_mode: bool = True) -> None:
        if accountant != "prv":
            raise ValueError(
                f"accountant must be 'prv', got {accountant!r}: it is the tightest of Opacus' "
                "three, its upper bound is certified, and gdp's number can be too small"
            )
        self.accountant = Accountant()

    def make_private(
        self, *, noise_multiplier: float, **arguments: Any
    ) -> tuple[nn.Module | Capture, DPOptimizer, DataLoader] | tuple[Any, ...]:
        """Module, optimizer and loader that train privately with ``noise_multiplier``.

        Arguments are the fields of ``Arguments``: module, optimizer, data_loader and max_grad_norm
        at least. The module is the caller's own. With the `ghost` mode the criterion comes third.

        The loop stays ``loss.backward(); optimizer.step(); optimizer.zero_grad()``, with a loss
        that is a mean or a sum over rows. Loss and weights of the module are private until noised:
        what the loop prints of a loss is not covered.

        Raises ValueError or TypeError, with everything as it was, for what cannot be private.
        """
        return self._make_private(Arguments.of(arguments), noise_multiplier, num_charges=None)

    def make_private_with_epsilon(
        self,
        *,
        target_epsilon: float,
        target_delta: float,
        epochs: int | None = None,
        num_steps: int | None = None,
        **arguments: Any,
    ) -> tuple[nn.Module | Capture, DPOptimizer, DataLoader] | tuple[Any, ...]:
        """``make_private`` with the noise that ``epochs`` passes over the loader need.

        Or ``num_steps`` noisy updates in its place, what a loop that counts steps asks for; with
        ``BatchMemoryManager`` that is not how often the loop runs, but ``optimizer.num_steps``.
        The certified epsilon after them is at most ``target_epsilon`` at ``target_delta``, and the
        loader refuses to draw more. What this engine has charged before comes on top.
        """
        checked = Arguments.of(arguments)
        check_delta(target_delta, checked.public_dataset_size)
        num_charges = _num_charges(checked, epochs, num_steps)
        noise_multiplier = calibrate_noise_multiplier(
            target_epsilon,
            target_delta,
            1.0 if checked.rate is None else checked.rate.sampling_rate,
            num_charges,
            checked.noised_values,
            checked.neighbours,
        )
        return self._make_private(checked, noise_multiplier, num_charges=num_charges)

    def _make_private(
        self, arguments: Arguments, noise_multiplier: float, num_charges: int | None
    ) -> tuple[Any, ...]:
        refuse_several()
        not_negative(noise_multiplier=noise_multiplier)
        _check_certifiable(arguments, noise_multiplier)
        batches = self._batches(arguments, noise_multiplier, num_charges)
        old = _captured(arguments.module)
        if old is not None:
            old.detach()
        capture = None
        try:
            capture = Capture(
                arguments.module,
                draws_per_record=arguments.draws_per_record * arguments.rows_per_unit,
                norm_only=arguments.grad_sample_mode == "ghost",
                impl=arguments.impl,
            )
            loader = DPDataLoader.from_data_loader(arguments.data_loader, batches=batches(capture))
            optimizer = DPOptimizer(
                arguments.inner_optimizer,
                noise_multiplier=noise_multiplier,
                max_grad_norm=arguments.max_grad_norm,
                expected_batch_size=arguments.expected_batch_size,
                loss_reduction=arguments.loss_reduction,
                loss_scale=arguments.loss_scale,
                clipping=arguments.clipping_mode,
                charged_only=True,
            )
            optimizer.charges = self.accountant
        except BaseException:
            if capture is not None:
                capture.detach()
            if old is not None:
                old.attach()
                first_batch.look_now_and_then(old)
            raise
        capture.announcements.expect()
        first_batch.look_now_and_then(capture)
        made = arguments.module if arguments.wrap_model else capture
        if arguments.grad_sample_mode == "ghost":
            return made, optimizer, arguments.criterion, loader
        return made, optimizer, loader

    def _batches(
        self, arguments: Arguments, noise_multiplier: float, num_charges: int | None
    ) -> Callable[[Capture], IndexBatches]:
        """The batches that a loader will draw, once the capture that hears of them is known."""
        rate = arguments.rate
        mechanism = Mechanism(
            1.0 if rate is None else rate.sampling_rate,
            noise_multiplier,
            arguments.noised_values,
            arguments.neighbours,
            is_own_order=rate is None,
            unit="record" if rate is None else rate.unit,
        )
        self.accountant.check_unit(mechanism.unit)
        budget = Budget(self.accountant, mechanism, num_charges)
        return lambda capture: IndexBatches(
            len(arguments.data_loader.dataset),
            arguments.expected_batch_size,
            rate=rate,
            order=_order(arguments.data_loader) if rate is None else None,
            unit_ids=arguments.unit_ids,
            physical_batch_size=arguments.constant_batch,
            pad=arguments.constant_batch is not None,
            budget=budget,
            capture=capture,
            prefetch=lookahead(arguments.data_loader),
        )

    def get_epsilon(self, delta: float) -> float:
        """The certified upper bound of epsilon, at ``delta``, of all that was charged so far.

        Where batches came in the caller's own order it warns that the number is that of
        unamplified passes. Raises AccountingError where no number can be certified.
        """
        if self.accountant.passes:
            warnings.warn(
                f"{self.accountant.passes} passes over the data in an order of the caller's own: "
                "epsilon is that of as many Gaussian mechanisms on all records, not amplified by "
                "sampling",
                stacklevel=2,
            )
        return self.accountant.get_epsilon(delta)

    def guarantee(self, delta: float) -> str:
        """What may be claimed of the released weights, in a sentence."""
        unit = {"record": "record", "unit": "unit, all records of one person"}
        one = f"one {unit[self.accountant.unit]}"
        neighbours = {
            "add-remove": f"adding or removing {one}",
            "zero-out": f"replacing {one} by one that contributes nothing, their number being "
            "public",
            "replace-one": f"replacing {one} by any other",
        }
        n_passes, n_all = self.accountant.passes, len(self.accountant)
        epsilon = Decimal(self.accountant.get_epsilon(delta))
        rounded = Context(prec=4, rounding=ROUND_CEILING).plus(epsilon)
        return (
            f"({rounded}, {delta:g})-differential privacy under "
            f"{neighbours[self.accountant.adjacency]}, after {n_all - n_passes} steps on Poisson "
            f"samples and {n_passes} passes over all records without amplification"
        )

    def is_compatible(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer | None = None,
        data_loader: DataLoader | None = None,
    ) -> bool:
        """Whether every trainable tensor of ``module`` has a sound per-record gradient."""
        try:
            self.validate(module=module, optimizer=optimizer, data_loader=data_loader)
        except (TypeError, ValueError):
            return False
        return True

    def validate(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer | None = None,
        data_loader: DataLoader | None = None,
    ) -> None:
        """Raise TypeError or ValueError, naming the first part of ``module`` that is not sound."""
        refuse_unsound_modules(module)
        trained_layers(module)

    @classmethod
    def get_compatible_module(cls, module: nn.Module) -> nn.Module:
        """``module`` itself. Raises where it is not compatible: nothing is replaced silently."""
        cls().validate(module=module)
        return module

    def save_checkpoint(
        self,
        *,
        path: str | PathLike | BinaryIO,
        module: nn.Module,
        optimizer: DPOptimizer | None = None,
        checkpoint_dict: dict[str, Any] | None = None,
        module_state_dict_kwargs: dict[str, Any] | None = None,
        **refused: Any,
    ) -> None:
        """Write weights, optimizer, charges and ``checkpoint_dict`` to one safetensors file.

        path: where, or a file opened in binary mode. A file named is on disk, whole, when this
        returns. ``checkpoint_dict`` may hold tensors, numbers, texts, and lists, tuples and dicts
        of such, as a `state_dict()` does. No key, no noise and no unfinished sum is written.
        """
        checkpointing.refuse_arguments(refused)
        checkpointing.save(
            path,
            module.state_dict(**(module_state_dict_kwargs or {})),
            optimizer,
            self.accountant.state_dict(),
            checkpoint_dict or {},
        )

    def load_checkpoint(
        self,
        *,
        path: str | PathLike | BinaryIO,
        module: nn.Module,
        optimizer: DPOptimizer | None = None,
        module_load_dict_kwargs: dict[str, Any] | None = None,
        **refused: Any,
    ) -> dict[str, Any]:
        """Read what ``save_checkpoint`` wrote; returns its ``checkpoint_dict``, and what it read.

        As in Opacus, under `module_state_dict` and `privacy_accountant_state_dict`.
        The charges of the file are added to those of this engine, none is forgotten. Raises
        ValueError, with nothing changed, where the file is damaged or of another kind.
        """
        checkpointing.refuse_arguments(refused)
        state = checkpointing.load(path)
        if (optimizer is None) != (state.optimizer is None):
            raise ValueError(
                f"checkpoint {path} was saved {'without' if state.optimizer is None else 'with'} "
                "an optimizer; load it the same way"
            )
        strict = (module_load_dict_kwargs or {}).get("strict", True)
        state = checkpointing.without_wrapper(state)
        checkpointing.check_fits(state, module.state_dict(), optimizer, strict)
        self.accountant.load_state_dict(state.accountant)
        module.load_state_dict(state.module, **(module_load_dict_kwargs or {}))
        if optimizer is not None:
            checkpointing.restore_optimizer(optimizer, state.optimizer)
        return state.content


def _num_charges(arguments: Arguments, epochs: int | None, num_steps: int | None) -> int:
    """How many mechanisms are planned: Poisson batches, or passes in the caller's own order."""
    if (epochs is None) == (num_steps is None):
        raise ValueError(
            "give epochs, passes over the loader, or num_steps, noisy updates: one of them"
        )
    if num_steps is None:
        positive_int(epochs=epochs)
        return epochs * (1 if arguments.rate is None else arguments.rate.num_steps)
    positive_int(num_steps=num_steps)
    if arguments.rate is None:
        raise ValueError(
            "num_steps goes with Poisson sampling, as an order of your own is charged by the pass: "
            "give epochs"
        )
    return num_steps


def _check_certifiable(arguments: Arguments, noise_multiplier: float) -> None:
    """Raise ValueError for so little noise that no epsilon could be told after a pass.

    At a delta of 1e-5, or of 1 over a larger public size. 0 is no noise, and no privacy.
    """
    if noise_multiplier == 0:
        return
    rate, delta = arguments.rate, min(1e-5, 1 / arguments.public_dataset_size)
    sampling_rate, num_steps = (1.0, 1) if rate is None else (rate.sampling_rate, rate.num_steps)
    tail = noise_tail_delta(
        sampling_rate, noise_multiplier, num_steps, arguments.noised_values, arguments.neighbours
    )
    if tail > delta / 1000:
        raise ValueError(
            f"noise_multiplier must be large enough for an epsilon to be certified, got "
            f"{noise_multiplier}: after one pass none could be at delta = {delta:.2g}; give 0.3 or "
            "more, or 0 for a run without privacy"
        )


def _captured(module: nn.Module) -> Capture | None:
    """The capture that the module has."""
    of = (wiring.of([param]) for param in module.parameters())
    return next((old for old in of if old is not None and old.module is module), None)


def _order(data_loader: DataLoader) -> Iterable[list[int]]:
    """The batches of a loader in its own order."""
    order = data_loader.batch_sampler
    if isinstance(order, IndexBatches):
        if order.rate is not None:
            raise ValueError("data_loader samples by itself; leave poisson_sampling at True")
        return order.order
    if order is None:
        raise ValueError("the data_loader must have a batch_size; give it one")
    return order

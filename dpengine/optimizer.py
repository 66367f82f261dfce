"""DPOptimizer: any torch optimizer, fed the noised sum of clipped per-record gradients."""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import clipping, noise, sources
from .adaptive import Adaptive
from .clipping import Automatic, ClippedSum, Flat, PerLayer
from .errors import PrivacyError, not_negative, positive
from .processes import refuse_another, refuse_several
from .record_grads import RecordGrads
from .secure_random import SecureRandom
from .sources import Source
from .update import Filter, Identity
from .wrapper import OptimizerWrapper, check_arguments, check_divisor, mark_noised

Clipping = Flat | PerLayer | Automatic | Adaptive

_SETTINGS = (
    "original_optimizer",
    "_noise_multiplier",
    "clipping",
    "expected_batch_size",
    "loss_reduction",
    "loss_scale",
    "filter",
    "charged_only",
    "num_steps",
    "charges",
    "step_hook",
    "public_loss",
)
"""What a copy takes over; its key, and what it has of a batch, are its own."""


class DPOptimizer(OptimizerWrapper):
    """DP-SGD around ``optimizer``: clip each record, sum, add noise once, divide, update.

    noise_multiplier: σ, noise standard deviation over ``max_grad_norm``; 0 gives no privacy.
    max_grad_norm: C, the bound of one record's contribution to the sum.
    expected_batch_size: the constant divisor, never the size of a batch. With ``loss_reduction``
        `sum` the noisy sum is not divided, as in Opacus, and it may be None.
    loss_reduction: `mean` or `sum`, how the loss joins the rows of the batch, padding included.
    generator: refused unless None; noise comes from a generator keyed by the operating system,
        whatever ``secure_mode`` says.
    loss_scale: the public constant that the loss was multiplied by, as for float16; undone before
        the norm. A dynamic one would react to private overflows.
    clipping: how a record is brought to the bound; ``Flat(max_grad_norm)`` by default.
    filter: what is done to the noised gradient, free of privacy cost (``dpengine.update``).
    charged_only: take batches that were charged with ``noise_multiplier`` as they were drawn, and
        no others.

    The trainable parameters must be captured (``Capture``) or belong to Opacus'
    ``GradSampleModule``, not both. One ``step()`` follows each backward pass. With a batch sampler,
    only the one after the last physical batch of a logical batch adds noise and updates the
    weights, the others add to the sum; without, those after ``signal_skip_step()`` add to the sum.
    Records of one sum must be distinct. ``param.grad`` is None until then, so ``clip_grad_norm_``
    sees nothing and does nothing. Parameter groups with a `noise_variance`, as ``AdamWBC`` has, are
    told that of each element of the noised and filtered mean.

    ``num_steps`` counts noised updates, not the backward passes that they are summed from. A copy
    draws fresh noise, calls the same step hook, and steps when its module was captured.
    """

    generator = None
    secure_mode = True

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float | None,
        loss_reduction: str = "mean",
        generator: None = None,
        secure_mode: bool = True,
        loss_scale: float = 1.0,
        clipping: Clipping | None = None,
        filter: Filter | None = None,
        charged_only: bool = False,
    ) -> None:
        refuse_several()
        check_arguments(optimizer, generator)
        if clipping is not None and not isinstance(clipping, Clipping):
            raise TypeError(
                f"clipping must be Flat, PerLayer, Automatic or Adaptive, got {clipping!r}"
            )
        positive(max_grad_norm=max_grad_norm, loss_scale=loss_scale)
        not_negative(noise_multiplier=noise_multiplier)
        check_divisor(expected_batch_size, loss_reduction, isinstance(clipping, Adaptive))
        self.clipping = clipping or Flat(max_grad_norm)
        if self.clipping.max_grad_norm != max_grad_norm:
            raise ValueError(
                f"max_grad_norm must be that of the clipping, {self.clipping.max_grad_norm}, got "
                f"{max_grad_norm}"
            )
        if isinstance(self.clipping, Adaptive):
            self.clipping.sum_noise_multiplier(noise_multiplier)  # refuses too little count noise
        self._noise_multiplier = noise_multiplier
        self.expected_batch_size = expected_batch_size
        self.loss_reduction = loss_reduction
        self.loss_scale = loss_scale
        self.filter = filter or Identity()
        self.charged_only = charged_only
        self._source, self.num_steps = None, 0
        source = sources.find(sources.trainable(optimizer))
        super().__init__(optimizer)
        self._begin(source)

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Clip and add the last backward pass to the sum; after the last one, noise and update.

        Returns what the inner optimizer's ``step()`` returns, None where it was not called.
        """
        if closure is not None:
            with torch.enable_grad():
                closure()
        return self.original_optimizer.step() if self.pre_step() else None

    @torch.no_grad()
    def pre_step(self, closure: None = None) -> bool:
        """All of ``step`` but the update; returns whether an update is due."""
        self.clip_and_accumulate()
        if self._is_last_step_skipped:
            return False
        self.add_noise()
        if self.step_hook is not None:
            self.step_hook(self)
        mark_noised(self.params)
        return True

    def clip_and_accumulate(self) -> None:
        """Clip the records of the last backward pass and add them to the logical batch's sum.

        An exception gives up what was summed of the logical batch; its charge stays.
        """
        if self._is_complete:
            raise PrivacyError(
                "the last logical batch waits for its noise; call add_noise() before the next one"
            )
        with self._all_or_nothing(PrivacyError):  # a refusal to take leaves all as it was
            self._check_params()
            batch = self._source.take()
        with self._all_or_nothing():
            self._add(batch)

    def _add(self, batch: RecordGrads) -> None:
        batch.check_charge(self.noise_multiplier, self.charged_only)
        if self.loss_reduction == "mean":
            batch.check_precision()
        if batch.is_first or batch.logical is not self._logical:
            self._zero_sums()  # an unfinished logical batch leaves nothing; its charge stays
        self._logical = batch.logical
        is_last, loss_scale = self._is_last(batch), self._undone_scale(batch.n_rows)
        grads = batch.grads.by_layer if isinstance(self.clipping, PerLayer) else batch.grads.whole
        clipped = self.clipping.clip_and_sum(grads, batch.is_record, loss_scale=loss_scale)
        packed = ClippedSum(batch.grads.pack(clipped.values), clipped.sensitivity)
        self._sum = packed if self._sum is None else clipping.join(self._sum, packed)
        if isinstance(self.clipping, Adaptive):
            count = self.clipping.count(grads, batch.is_record, loss_scale=loss_scale)
            self._count = count if self._count is None else clipping.join(self._count, count)
        self._accumulated_iterations = batch.n_passes
        self._is_complete, self._is_last_step_skipped = is_last, not is_last
        del self._step_skip_queue[:1]

    def add_noise(self) -> None:
        """Noise the sum of a whole logical batch, once, and put the noisy mean in `param.grad`.

        Whether it succeeds or not, there is nothing left to noise afterwards.
        """
        if not self._is_complete:
            raise PrivacyError(
                "there is no whole logical batch to add noise to: call step() after each backward "
                "pass, and noise is added after the last one"
            )
        refuse_another(self._process)
        with self._all_or_nothing():
            public = sources.public_grads(self._source, self.public_loss)
            noisy_mean = self._noisy_mean()
        self._zero_sums()
        self.num_steps += 1
        self._set_grads(self.filter(noisy_mean), public)
        self._tell_noise_variance(noisy_mean.numel())
        mark_noised(self.params)

    @contextmanager
    def _all_or_nothing(self, *refusals: type[Exception]) -> Iterator[None]:
        """Give up the logical batch on an exception: part of a step may be in its sum already.

        A step that fails to clip has had its gradients and its signal, as one that does not: left
        over, either would go to the next one, and join two logical batches.
        """
        try:
            yield
        except refusals:
            raise
        except BaseException:
            if self._source is not None and not self._is_complete:
                self._source.drop()
                del self._step_skip_queue[:1]
            self._zero_sums()
            raise

    def _noisy_mean(self) -> Tensor:
        """The noised sum over the constant divisor; adaptive clipping moves its bound.  [P]"""
        noise_multiplier = self.noise_multiplier
        is_mean = self.loss_reduction == "mean"
        divisor = self.expected_batch_size * self._accumulated_iterations if is_mean else 1.0
        mode = self.clipping
        if isinstance(mode, Adaptive):
            noise_multiplier = mode.sum_noise_multiplier(noise_multiplier)
            count = noise.noisy_mean(
                self._count, mode.count_noise_multiplier, self.expected_batch_size, self._random
            )
            self.clipping = mode.next(float(count))
        self._noise_variance = (noise_multiplier * mode.sensitivity / divisor) ** 2
        return noise.noisy_mean(self._sum, noise_multiplier, divisor, self._random)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Give up a backward pass that ``step`` has not had, and its signal; keep the sum.

        Ordinary gradients become None, whatever ``set_to_none`` says.
        """
        if self._source is not None and self._source.drop():
            del self._step_skip_queue[:1]
        self.original_optimizer.zero_grad(set_to_none=True)

    def discard(self) -> None:
        """Forget an unfinished logical batch, as after an interrupt; its charge stays."""
        if self._source is not None:
            self._source.reset()
            self._step_skip_queue.clear()
            self._zero_sums()

    def signal_skip_step(self, do_skip: bool = True) -> None:
        """Say of the next ``step`` without a say whether a logical batch goes on after it.

        Records of the batches that it joins must be distinct. With a sampler, which knows where a
        logical batch ends, a signal that says otherwise is an error. A step that fails has had its
        signal; after an exception between a signal and its step call ``discard``.
        """
        self._step_skip_queue.append(do_skip)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add tensors of the same source; all of its tensors must be in before ``step``."""
        if self._source is not None:  # else torch's constructor adds the groups it was given
            params = param_group["params"]
            params = [params] if isinstance(params, Tensor) else list(params)
            param_group = {**param_group, "params": params}
            added = [param for param in params if param.requires_grad]
            sources.find([*self.params, *added])
        self.original_optimizer.add_param_group(param_group)

    @property
    def params(self) -> list[Tensor]:
        """The trainable tensors of all groups."""
        return sources.trainable(self.original_optimizer)

    @property
    def source(self) -> Source | None:
        """Where the per-record gradients come from; None in a copy that has not stepped."""
        return self._source

    @property
    def grad_samples(self) -> list[Tensor]:
        """The per-record gradients that the next ``step`` will clip.  [N, *param.shape] each

        Those of a record's own loss, the mean over its draws, whatever joined the losses.
        """
        loss_scale = self._undone_scale(self._source.n_rows)
        return [loss_scale * grads for grads in self._source.per_record_grads]

    @property
    def accumulated_iterations(self) -> int:
        """Backward passes that the next ``step`` clips, or that the last one has clipped."""
        return self._source.n_waiting or self._accumulated_iterations

    @property
    def noise_multiplier(self) -> float:
        """σ; constant where each batch was charged with it as it was drawn."""
        return self._noise_multiplier

    @noise_multiplier.setter
    def noise_multiplier(self, noise_multiplier: float) -> None:
        if self.charged_only:
            raise PrivacyError(
                "noise_multiplier is what drawn batches were charged with; to change it, call "
                "make_private again"
            )
        not_negative(noise_multiplier=noise_multiplier)
        self._noise_multiplier = noise_multiplier

    @property
    def max_grad_norm(self) -> float:
        """C of the logical batch under way; adaptive clipping moves it between batches."""
        return self.clipping.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, max_grad_norm: float) -> None:
        if self._is_last_step_skipped or self._is_complete:
            raise PrivacyError("max_grad_norm must stay what it is within a logical batch")
        self.clipping = replace(self.clipping, max_grad_norm=max_grad_norm)
        self._zero_sums()

    def _check_skip_next_step(self, pop_next: bool = True) -> bool:
        if not self._step_skip_queue:
            return self._source.will_go_on and not pop_next
        return self._step_skip_queue.pop(0) if pop_next else self._step_skip_queue[0]

    def _is_last(self, batch: RecordGrads) -> bool:
        is_signalled = bool(self._step_skip_queue)
        is_skipped = is_signalled and self._step_skip_queue[0]
        if batch.is_last is None:
            return not is_skipped
        if is_signalled and is_skipped == batch.is_last:
            raise PrivacyError(
                "signal_skip_step() contradicts the sampler, which knows where a logical batch "
                "ends; leave it out, and use BatchMemoryManager for smaller physical batches"
            )
        return batch.is_last

    def _check_params(self) -> None:
        """Raise unless what is about to be updated is what gradients are taken of."""
        refuse_another(self._process)
        refuse_several()
        source = sources.find(self.params)
        sources.check_complete(source, self.params)
        for group in self.param_groups:
            if any(p.grad is not None and not p.requires_grad for p in group["params"]):
                raise PrivacyError(
                    "a frozen tensor of the optimizer holds an ordinary gradient, which would be "
                    "applied without noise; call zero_grad()"
                )
        if not sources.same(source, self._source):
            self._begin(source)

    def _begin(self, source: Source) -> None:
        """Nothing of a batch yet, and a key of its own."""
        self._source, self._process = source, os.getpid()
        self._random = SecureRandom()
        self._step_skip_queue: list[bool] = []
        self._accumulated_iterations = 1
        self._logical: object = None
        self._zero_sums()

    def _zero_sums(self) -> None:
        self._sum = self._count = None  # takes no memory, which may be what is missing
        self._is_complete = self._is_last_step_skipped = False

    def _set_grads(self, noisy_mean: Tensor, public: list[Tensor | float]) -> None:
        params = self._source.parameters
        pieces = noisy_mean.split([param.numel() for param in params])
        for param, piece in zip(params, pieces, strict=True):
            param.grad = piece.view_as(param).to(param.dtype)
        for param, added in zip(params, public, strict=False):
            param.grad += added

    def _tell_noise_variance(self, n_values: int) -> None:
        for group in self.param_groups:
            if "noise_variance" in group:
                gain = self.filter.variance_gain(n_values)
                group["noise_variance"] = self._noise_variance * gain

    def _undone_scale(self, n_rows: int) -> float:
        # A record's loss is the mean over its K draws; undo what the batch's loss did instead.
        rows = n_rows if self.loss_reduction == "mean" else 1
        return rows / self._source.draws_per_record / self.loss_scale

    def __deepcopy__(self, memo: dict[int, Any]) -> "DPOptimizer":
        # The steps of a copy are counted as well.
        shared = self.step_hook, self.public_loss, self.charges
        memo |= {id(of_all): of_all for of_all in shared}
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in _SETTINGS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._source, self._process = None, os.getpid()
        super().__setstate__(state)
        self._is_complete = self._is_last_step_skipped = False

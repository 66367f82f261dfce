"""DPOptimizer: any torch optimizer, fed the noised sum of clipped per-record gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import capture, clipping, noise
from .adaptive import Adaptive
from .capture import RecordGrads
from .clipping import Automatic, ClippedSum, Flat, PerLayer
from .errors import not_negative, positive
from .secure_random import SecureRandom
from .update import Filter, Identity

Clipping = Flat | PerLayer | Automatic | Adaptive


class DPOptimizer(Optimizer):
    """DP-SGD around ``optimizer``: clip each record, sum, add noise once, divide, update.

    noise_multiplier: σ, noise standard deviation over ``max_grad_norm``; 0 gives no privacy.
    max_grad_norm: C, the bound of one record's contribution to the sum.
    expected_batch_size: the constant divisor, never the size of a batch.
    loss_reduction: `mean` or `sum`, how the loss joins the rows of the batch, padding included.
    loss_scale: the public constant that the loss was multiplied by, as for float16; undone before
        the norm. A dynamic one would react to private overflows.
    clipping: how a record is brought to the bound; ``Flat(max_grad_norm)`` by default.
    filter: what is done to the noised gradient, free of privacy cost (``dpengine.update``).

    The parameters must be captured (``Capture``). One ``step()`` follows each backward pass; with
    a batch sampler, only the one after the last physical batch of a logical batch adds noise and
    updates the weights, the others add to the sum. ``param.grad`` is None until then, so
    ``clip_grad_norm_`` sees nothing and does nothing. Parameter groups with a `noise_variance`, as
    ``AdamWBC`` has, are told that of each element of the noised and filtered mean.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
        loss_reduction: str = "mean",
        loss_scale: float = 1.0,
        clipping: Clipping | None = None,
        filter: Filter | None = None,
    ) -> None:
        positive(max_grad_norm=max_grad_norm, expected_batch_size=expected_batch_size)
        positive(loss_scale=loss_scale)
        not_negative(noise_multiplier=noise_multiplier)
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction must be 'mean' or 'sum', got {loss_reduction!r}")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                "LBFGS evaluates a batch several times in a step: choose another optimizer"
            )
        if clipping is not None and not isinstance(clipping, Clipping):
            raise TypeError(
                f"clipping must be Flat, PerLayer, Automatic or Adaptive, got {clipping!r}"
            )
        self.clipping = clipping or Flat(max_grad_norm)
        if self.clipping.max_grad_norm != max_grad_norm:
            raise ValueError(
                f"max_grad_norm must be that of the clipping, {self.clipping.max_grad_norm}, got "
                f"{max_grad_norm}"
            )
        if isinstance(self.clipping, Adaptive):
            self.clipping.sum_noise_multiplier(noise_multiplier)  # refuses too little count noise
        self.original_optimizer = optimizer
        self.noise_multiplier = noise_multiplier
        self.expected_batch_size = expected_batch_size
        self.loss_reduction = loss_reduction
        self.loss_scale = loss_scale
        self.filter = filter or Identity()
        state = optimizer.state
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.state = state
        self._capture = capture.find(self._params())
        self._random = SecureRandom()
        self._zero_sums()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> bool:
        """Clip and add the last backward pass to the sum; after the last one, noise and update.

        Returns whether the weights were updated.
        """
        if closure is not None:
            with torch.enable_grad():
                closure()
        capture.find(self._params())  # a tensor added since would be updated without noise
        batch = self._capture.take()
        if batch.is_first:
            self._zero_sums()  # an unfinished logical batch leaves nothing; its charge stays
        self._clip_and_add(batch)
        is_last = batch.is_last
        del batch  # its gradients are not needed beside the noise
        if not is_last:
            return False

        noisy_mean = self._noisy_mean()
        self._zero_sums()
        self._set_grads(self.filter(noisy_mean))
        self._tell_noise_variance(noisy_mean.numel())
        self.original_optimizer.step()
        return True

    @property
    def max_grad_norm(self) -> float:
        """C of the logical batch under way; adaptive clipping moves it between batches."""
        return self.clipping.max_grad_norm

    def _clip_and_add(self, batch: RecordGrads) -> None:
        loss_scale = self._undone_scale(batch.n_rows)
        by_layer = isinstance(self.clipping, PerLayer)
        grads = batch.grads.by_layer if by_layer else batch.grads.whole
        clipped = self.clipping.clip_and_sum(grads, batch.is_record, loss_scale=loss_scale)
        packed = ClippedSum(batch.grads.pack(clipped.values), clipped.sensitivity)
        self._sum = clipping.join(self._sum, packed)
        if isinstance(self.clipping, Adaptive):
            count = self.clipping.count(grads, batch.is_record, loss_scale=loss_scale)
            self._count = clipping.join(self._count, count)

    def _noisy_mean(self) -> Tensor:
        """The noised sum over the constant divisor; adaptive clipping moves its bound.  [P]"""
        noise_multiplier, divisor = self.noise_multiplier, self.expected_batch_size
        mode = self.clipping
        if isinstance(mode, Adaptive):
            noise_multiplier = mode.sum_noise_multiplier(noise_multiplier)
            count = noise.noisy_mean(
                self._count, mode.count_noise_multiplier, divisor, self._random
            )
            self.clipping = mode.next(float(count))
        self._noise_variance = (noise_multiplier * mode.sensitivity / divisor) ** 2
        return noise.noisy_mean(self._sum, noise_multiplier, divisor, self._random)

    def discard(self) -> None:
        """Forget an unfinished logical batch, as after an interrupt; its charge stays."""
        self._capture.reset()
        self._zero_sums()

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _zero_sums(self) -> None:
        params = self._capture.parameters
        n_values, device = sum(param.numel() for param in params), params[0].device
        self._sum = clipping.empty_sum(n_values, self.clipping.sensitivity, device)
        self._count = clipping.empty_sum(1, 0.5, device)

    def _set_grads(self, noisy_mean: Tensor) -> None:
        params = self._capture.parameters
        pieces = noisy_mean.to(params[0].dtype).split([param.numel() for param in params])
        for param, piece in zip(params, pieces, strict=True):
            param.grad = piece.view_as(param)

    def _tell_noise_variance(self, n_values: int) -> None:
        for group in self.param_groups:
            if "noise_variance" in group:
                gain = self.filter.variance_gain(n_values)
                group["noise_variance"] = self._noise_variance * gain

    def _undone_scale(self, n_rows: int) -> float:
        # A record's loss is the mean over its K draws; undo what the batch's loss did instead.
        rows = n_rows if self.loss_reduction == "mean" else 1
        return rows / self._capture.draws_per_record / self.loss_scale

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.original_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.original_optimizer.param_groups = groups

    @property
    def state(self) -> dict[Any, Any]:
        return self.original_optimizer.state

    @state.setter
    def state(self, state: dict[Any, Any]) -> None:
        self.original_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.original_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.original_optimizer.defaults = defaults

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state: no sum, no noise, no random state."""
        return self.original_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the inner optimizer's state."""
        self.original_optimizer.load_state_dict(state_dict)

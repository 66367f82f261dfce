"""DPOptimizer: any torch optimizer, fed the noised sum of clipped per-record gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import capture, clipping, noise
from .errors import not_negative, positive
from .secure_random import SecureRandom


class DPOptimizer(Optimizer):
    """DP-SGD around ``optimizer``: clip each record, sum, add noise once, divide, update.

    noise_multiplier: σ, noise standard deviation over ``max_grad_norm``; 0 gives no privacy.
    max_grad_norm: C, the bound of one record's contribution to the sum.
    expected_batch_size: the constant divisor, never the size of a batch.
    loss_reduction: `mean` or `sum`, how the loss joins the rows of the batch, padding included.

    The parameters must be captured (``Capture``). One ``step()`` follows each backward pass; with
    a batch sampler, only the one after the last physical batch of a logical batch adds noise and
    updates the weights, the others add to the sum. ``param.grad`` is None until then, so
    ``clip_grad_norm_`` sees nothing and does nothing.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
        loss_reduction: str = "mean",
    ) -> None:
        positive(max_grad_norm=max_grad_norm, expected_batch_size=expected_batch_size)
        not_negative(noise_multiplier=noise_multiplier)
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction must be 'mean' or 'sum', got {loss_reduction!r}")
        self.original_optimizer = optimizer
        self.noise_multiplier = noise_multiplier
        self.max_grad_norm = max_grad_norm
        self.expected_batch_size = expected_batch_size
        self.loss_reduction = loss_reduction
        state = optimizer.state
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.state = state
        self._capture = capture.find(self._params())
        self._random = SecureRandom()
        self._zero_sum()

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
            self._zero_sum()  # an unfinished logical batch leaves nothing; its charge stays
        clipped_sum = clipping.clip_and_sum(
            batch.per_record_grads,
            batch.is_record,
            self.max_grad_norm,
            loss_scale=self._loss_scale(batch.n_rows),
        )
        self._sum = clipping.join(self._sum, clipped_sum)
        if not batch.is_last:
            return False

        noisy_mean = noise.noisy_mean(
            self._sum, self.noise_multiplier, self.expected_batch_size, self._random
        )
        self._zero_sum()
        self._set_grads(noisy_mean)
        self.original_optimizer.step()
        return True

    def discard(self) -> None:
        """Forget an unfinished logical batch, as after an interrupt; its charge stays."""
        self._capture.reset()
        self._zero_sum()

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _zero_sum(self) -> None:
        params = self._capture.parameters
        n_values = sum(param.numel() for param in params)
        self._sum = clipping.empty_sum(n_values, self.max_grad_norm, params[0].device)

    def _set_grads(self, noisy_mean: Tensor) -> None:
        params = self._capture.parameters
        pieces = noisy_mean.to(params[0].dtype).split([param.numel() for param in params])
        for param, piece in zip(params, pieces, strict=True):
            param.grad = piece.view_as(param)

    def _loss_scale(self, n_rows: int) -> float:
        # A record's loss is the mean over its K draws; undo what the batch's loss did instead.
        rows = n_rows if self.loss_reduction == "mean" else 1
        return rows / self._capture.draws_per_record

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

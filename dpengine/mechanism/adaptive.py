"""Adaptive clipping: the bound follows a quantile of the gradients' norms, at no further cost.

Each logical batch asks two questions of the same records: the clipped sum, and how many norms lie
within the bound. Both answers are noised, and the next bound depends on the noised count alone.
"""

import math
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import not_negative, positive, probability
from .batches import Grads, PerRecordGrads
from .clipping import ClippedSum, Flat, packed, sq_norms

_FASTEST = 10.0


@dataclass(frozen=True)
class Adaptive:
    """Flat clipping under a bound C that moves towards a quantile of the norms.

    max_grad_norm: C of this logical batch, all of its physical batches together.
    count_noise_stddev: σ_b, the standard deviation, in records, of the noise on the count; above
    half of the noise multiplier. A twentieth of the expected batch size is the paper's choice.
    quantile: the share of records whose norm should lie within C.
    learning_rate: η; a step moves log C by at most η. 0 leaves C and asks for the share alone.
    noisy_share: the noised share of records within C in the batch before, a released number.

    Source: Andrew, Thakkar, McMahan and Ramaswamy, arXiv 1905.03871, algorithm 1 and theorem 1.

    Guarantee: the sum with noise multiplier ``sum_noise_multiplier(σ)`` and the count with
    ``count_noise_multiplier``, drawn independently, are together one Gaussian mechanism with noise
    multiplier σ on the records of the batch. Proof: a record adds v to the sum, ``‖v‖ <= C``, and w
    to the count, ``|w| <= 1/2``. The noise of the sum has standard deviation ``σ_sum C`` and that
    of the count σ_b. Divide both answers by theirs: the noise of the pair, now a vector of P + 1
    elements, is standard normal, and the record shifts the pair by a vector whose squared norm is
    ``‖v‖² / (σ_sum C)² + w² / σ_b² <= σ_sum⁻² + (2 σ_b)⁻² <= σ⁻²``. The division can be undone, so
    nothing is lost or gained by it: what is released is a query of sensitivity at most 1/σ under
    standard normal noise. One Poisson draw serves both questions, so subsampling amplifies the pair
    as it does one Gaussian. C is a function of earlier answers only, which the composition over
    steps allows, and no bound on the cost of a step depends on it.
    """

    max_grad_norm: float
    count_noise_stddev: float
    quantile: float = 0.5
    learning_rate: float = 0.2
    noisy_share: float | None = field(default=None, compare=False)
    bound_moves: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive(max_grad_norm=self.max_grad_norm, count_noise_stddev=self.count_noise_stddev)
        not_negative(learning_rate=self.learning_rate)
        if self.learning_rate > _FASTEST:
            raise ValueError(
                f"learning_rate must be at most {_FASTEST:g}, a factor of exp({_FASTEST:g}) in a "
                f"step, got {self.learning_rate}; 0.2 is usual"
            )
        probability(quantile=self.quantile)

    @property
    def sensitivity(self) -> float:
        return self.max_grad_norm

    @property
    def count_noise_multiplier(self) -> float:
        """``2 σ_b``: the noise of the count over its sensitivity of one half."""
        return 2 * self.count_noise_stddev

    def sum_noise_multiplier(self, noise_multiplier: float) -> float:
        """``σ_sum = (σ⁻² - (2 σ_b)⁻²)^(-1/2)``, the noise multiplier of the sum, above σ.

        Rounded up, so that ``σ_sum⁻² + (2 σ_b)⁻² <= σ⁻²`` in exact arithmetic. 0 gives 0, and no
        privacy. Raises ValueError where the count alone would cost more than σ.
        """
        not_negative(noise_multiplier=noise_multiplier)
        if noise_multiplier == 0:
            return 0.0
        if self.count_noise_multiplier <= noise_multiplier:
            raise ValueError(
                "count_noise_stddev must be above half of the noise multiplier "
                f"{noise_multiplier}, got {self.count_noise_stddev}; a twentieth of the expected "
                "batch size is usual"
            )
        sigma, count_sigma = map(Fraction, (noise_multiplier, self.count_noise_multiplier))
        squared = sigma**-2 - count_sigma**-2
        multiplier = 1 / math.sqrt(squared)
        while Fraction(multiplier) ** -2 > squared:
            multiplier = math.nextafter(multiplier, math.inf)
        return multiplier

    def noise_multipliers(self, noise_multiplier: float) -> tuple[float, float]:
        """Those of the sum and of the count."""
        return self.sum_noise_multiplier(noise_multiplier), self.count_noise_multiplier

    def answers(
        self, grads: PerRecordGrads, is_record: Tensor, *, loss_scale: float = 1.0
    ) -> tuple[ClippedSum, ClippedSum]:
        """The clipped sum, its elements in the order of the parameters', and the count."""
        clipped = self.clip_and_sum(grads.whole, is_record, loss_scale=loss_scale)
        return packed(grads, clipped), self.count(grads.whole, is_record, loss_scale=loss_scale)

    def clip_and_sum(
        self, per_record_grads: list[Grads], is_record: Tensor, *, loss_scale: float = 1.0
    ) -> ClippedSum:
        """The clipped sum of ``Flat`` under this batch's bound."""
        flat = Flat(self.max_grad_norm)
        return flat.clip_and_sum(per_record_grads, is_record, loss_scale=loss_scale)

    def count(
        self, per_record_grads: list[Grads], is_record: Tensor, *, loss_scale: float = 1.0
    ) -> ClippedSum:
        """``Σ_n (b_n - 1/2)`` with b_n = 1 where the norm is at most C, else 0.  One value.

        The arguments are those of ``clip_and_sum``. Padding and records that are not finite add
        exactly 0, any other record 1/2 or -1/2: the sensitivity is 1/2, where that of ``Σ_n b_n``
        would be 1.
        """
        squares = sq_norms(per_record_grads) * loss_scale**2
        counted = is_record & (squares < math.inf)
        votes = (squares.sqrt() <= self.max_grad_norm).double() - 0.5
        return ClippedSum(torch.where(counted, votes, 0.0).sum(0, keepdim=True), 0.5)

    def next(self, noisy_count_mean: float) -> "Adaptive":
        """The mode of the next logical batch: ``C exp(-η (b̄ - quantile))``.

        noisy_count_mean: the noised count over the public expected batch size, b̄ - 1/2; the true
        number of records must not be used. Only noised values enter, so it costs nothing.
        """
        share = min(max(noisy_count_mean + 0.5, 0.0), 1.0)
        change = math.exp(-self.learning_rate * (share - self.quantile))
        return replace(self, max_grad_norm=self.max_grad_norm * change, noisy_share=share)

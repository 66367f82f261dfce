"""The plan: every number that the guarantee depends on, in one frozen object.

The sampler, the optimizer, the ledger, the accountant and the report all read this object, so
the mechanism that is accounted for is the one that runs.
"""

from dataclasses import asdict, dataclass
from typing import Literal, get_args

from .errors import not_negative, positive, positive_int, probability

Adjacency = Literal["add-remove", "zero-out"]


@dataclass(frozen=True)
class PrivacyPlan:
    """A Poisson-subsampled Gaussian mechanism, composed ``num_steps`` times. All fields are public.

    sampling_rate: probability q with which each record enters a logical batch.
    noise_multiplier: σ, noise standard deviation over sensitivity; 0 means no privacy.
    num_steps: T, the most noisy updates that all attempts together may make.
    max_grad_norm: C, the bound of one record's contribution to the sum.
    delta: the δ of the claim, the cut tail of the noise included.
    public_dataset_size: the number of records that q and the divisor were derived from.
    adjacency: `add-remove` where that number is public and need not be the true one; `zero-out`
        where it is the true one and neighbours replace one record by one that contributes 0.
    draws_per_record: K, noise and timestep draws averaged before a record's norm is taken.
    trainable_parameters: P, the dimension of the released sum.
    """

    sampling_rate: float
    noise_multiplier: float
    num_steps: int
    max_grad_norm: float
    delta: float
    public_dataset_size: int
    adjacency: Adjacency
    draws_per_record: int
    trainable_parameters: int
    unit: str = "record"

    def __post_init__(self) -> None:
        probability(sampling_rate=self.sampling_rate)
        positive(max_grad_norm=self.max_grad_norm)
        positive_int(
            num_steps=self.num_steps,
            public_dataset_size=self.public_dataset_size,
            draws_per_record=self.draws_per_record,
            trainable_parameters=self.trainable_parameters,
        )
        not_negative(noise_multiplier=self.noise_multiplier)
        if self.adjacency not in get_args(Adjacency):
            raise ValueError(
                f"adjacency must be one of {get_args(Adjacency)}, got {self.adjacency!r}"
            )
        check_delta(self.delta, self.public_dataset_size)

    @property
    def expected_batch_size(self) -> float:
        """The constant that noisy sums are divided by: ``q`` times the public size."""
        return self.sampling_rate * self.public_dataset_size

    def to_dict(self) -> dict:
        """The plan as JSON types."""
        return asdict(self)


def check_delta(delta: float, public_dataset_size: int) -> None:
    """Raise ValueError unless 0 < δ < 1/N: a larger δ allows publishing a random record."""
    if not 0 < delta < 1 / public_dataset_size:
        raise ValueError(
            f"delta must be above 0 and below 1 / dataset size = {1 / public_dataset_size:.3g}, "
            f"got {delta}; choose, say, {0.1 / public_dataset_size:.1g}"
        )

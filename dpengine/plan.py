"""The plan: every number that the guarantee depends on, in one frozen object.

The sampler, the optimizer, the ledger, the accountant and the report all read this object, so
the mechanism that is accounted for is the one that runs.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from .errors import not_negative, positive, positive_int, probability

Adjacency = Literal["add-remove", "zero-out", "replace-one"]
Unit = Literal["record", "unit"]
Clipping = Literal["flat", "per-layer", "automatic", "adaptive"]


@dataclass(frozen=True)
class PrivacyPlan:
    """A Poisson-subsampled Gaussian mechanism, composed ``num_steps`` times. All fields are public.

    sampling_rate: probability q with which each unit enters a logical batch.
    noise_multiplier: σ, noise standard deviation over sensitivity; 0 means no privacy.
    num_steps: T, the most noisy updates that all attempts together may make.
    max_grad_norm: C, the bound of one unit's contribution to the sum.
    delta: the δ of the claim, the cut tail of the noise included.
    public_dataset_size: the number of units that q and the divisor were derived from.
    adjacency: `add-remove` where that number is public and need not be the true one; `zero-out`
        where it is the true one and neighbours replace one unit by one that contributes 0;
        `replace-one` where neighbours replace one unit by any other, at more noise.
    draws_per_record: K, noise and timestep draws of each record of a unit.
    trainable_parameters: P, the dimension of the released sum.
    unit: what is sampled, counted, clipped and protected: one `record`, or one `unit`, all the
        records of one person.
    rows_per_unit: M, the records that a unit brings to a logical batch, however many it has. Its
        gradient is the average over M·K rows, taken before its norm.
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
    unit: Unit = "record"
    rows_per_unit: int = 1
    clipping: Clipping = "flat"

    def __post_init__(self) -> None:
        probability(sampling_rate=self.sampling_rate)
        positive(max_grad_norm=self.max_grad_norm)
        positive_int(
            num_steps=self.num_steps,
            public_dataset_size=self.public_dataset_size,
            draws_per_record=self.draws_per_record,
            trainable_parameters=self.trainable_parameters,
            rows_per_unit=self.rows_per_unit,
        )
        not_negative(noise_multiplier=self.noise_multiplier)
        if self.adjacency not in get_args(Adjacency):
            raise ValueError(
                f"adjacency must be one of {get_args(Adjacency)}, got {self.adjacency!r}"
            )
        if self.clipping not in get_args(Clipping):
            raise ValueError(f"clipping must be one of {get_args(Clipping)}, got {self.clipping!r}")
        if self.unit not in get_args(Unit):
            raise ValueError(f"unit must be one of {get_args(Unit)}, got {self.unit!r}")
        if self.unit == "record" and self.rows_per_unit > 1:
            raise ValueError(
                "rows_per_unit must be 1 where the unit is one record, got "
                f"{self.rows_per_unit}; to protect all records of a person together, choose "
                "unit 'unit' and give unit_ids"
            )
        check_delta(self.delta, self.public_dataset_size)

    @property
    def expected_batch_size(self) -> float:
        """The constant that noisy sums are divided by: ``q`` times the public size."""
        return self.sampling_rate * self.public_dataset_size

    @property
    def noised_values(self) -> int:
        """How many values of a step are noised: the sum, and the count of adaptive clipping.

        The count is drawn on its own, and normals come in pairs.
        """
        return self.trainable_parameters + 2 * (self.clipping == "adaptive")

    def to_dict(self) -> dict:
        """The plan as JSON types."""
        return asdict(self)


def adjacency_of_all(adjacencies: Iterable[Adjacency]) -> Adjacency:
    """What mechanisms on one data set protect together.

    Where q and the divisor are public, a record replaced by one that contributes nothing gives the
    same outputs as its removal, so add-remove mechanisms cover zero-out as well. All of them cover
    replace-one, at the cost that the accountant computes for it: neighbours have one size.
    """
    found = set(adjacencies)
    return next((a for a in ("replace-one", "zero-out") if a in found), "add-remove")


def check_delta(delta: float, public_dataset_size: int) -> None:
    """Raise ValueError unless 0 < δ < 1/N: δ = 1/N allows publishing one record drawn at random."""
    if not 0 < delta < 1 / public_dataset_size:
        raise ValueError(
            f"delta must be above 0 and below 1 / dataset size = {1 / public_dataset_size:.3g}, "
            f"got {delta}: with 1 / dataset size or more, publishing one record drawn at random "
            f"would be allowed; choose a tenth of it, {0.1 / public_dataset_size:.1g}"
        )

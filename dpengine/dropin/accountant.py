"""What a ``PrivacyEngine`` has charged, and what it costs."""

import math
import os
import secrets
from collections import Counter
from typing import Any, NamedTuple, get_args

from .. import accounting
from ..accounting import Charge
from ..errors import PrivacyError, not_negative, positive_int, probability
from ..mechanism.plan import Adjacency, Unit, adjacency_of_all
from ..mechanism.ranks import refuse_another


class Mechanism(NamedTuple):
    """One noisy step, or one pass over the data: a Gaussian mechanism, perhaps subsampled.

    sampling_rate: q; 1 is a mechanism on all records. noised_values: how many values get noise.
    is_own_order: a pass in an order of the caller's own, and no Poisson sample. unit: what it
    samples, clips and protects.
    """

    sampling_rate: float
    noise_multiplier: float
    noised_values: int
    adjacency: Adjacency
    is_own_order: bool = False
    unit: Unit = "record"


class Accountant:
    """Counts charged mechanisms, those of each run apart.

    A run is what one object has charged; a checkpoint that is loaded adds its runs, or brings them
    up to date, and never lowers a count. What a process charged after its last checkpoint is not in
    it: two processes that go on from one checkpoint both count on from there.
    """

    def __init__(self) -> None:
        self._runs: dict[str, Counter[Mechanism]] = {}
        self._begin_run()

    def _begin_run(self) -> None:
        self._run, self._process = secrets.token_hex(8), os.getpid()
        self._runs[self._run] = Counter()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin_run()  # what a copy charges from now on is its own

    @staticmethod
    def mechanism() -> str:
        """`prv`: numerical composition (Gopi, Lee, Wutschitz, arXiv 2106.02848)."""
        return "prv"

    def charge(self, mechanism: Mechanism) -> None:
        """Count one more ``mechanism``; to be called before it draws anything.

        Raises PrivacyError in a fork, whose charges nobody else would see.
        """
        refuse_another(self._process)
        self.check_unit(mechanism.unit)
        self._runs[self._run][mechanism] += 1

    def check_unit(self, unit: Unit) -> None:
        """Raise PrivacyError where mechanisms that protect something else were charged."""
        if any(m.unit != unit for m in self._counts):
            raise PrivacyError(
                f"steps that protect a {unit} and steps that protect something else have no claim "
                "in common; make another PrivacyEngine, whose claim is a claim of its own"
            )

    @property
    def _counts(self) -> Counter[Mechanism]:
        return sum(self._runs.values(), Counter())

    @property
    def history(self) -> list[tuple[float, float, int]]:
        """Noise multiplier, sampling rate and number of each mechanism, as in Opacus."""
        return [(m.noise_multiplier, m.sampling_rate, n) for m, n in self._counts.items()]

    @property
    def passes(self) -> int:
        """How many of the mechanisms were passes in an order of the caller's own."""
        return sum(n for m, n in self._counts.items() if m.is_own_order)

    @property
    def unit(self) -> Unit:
        """What all the mechanisms protect."""
        return next((m.unit for m in self._counts), "record")

    @property
    def adjacency(self) -> Adjacency:
        """What all the mechanisms protect: what the one asks for that asks for most."""
        return adjacency_of_all(m.adjacency for m in self._counts)

    def __len__(self) -> int:
        return self._counts.total()

    def get_epsilon(self, delta: float) -> float:
        """The certified upper bound of ε at ``delta``, the cut tail of the noise charged.

        Raises AccountingError where no number can be certified.
        """
        self.check_unit(self.unit)
        charges = [
            Charge(m.sampling_rate, m.noise_multiplier, n, m.noised_values)
            for m, n in self._counts.items()
        ]
        return accounting.spent_together(charges, delta, self.adjacency).upper

    def state_dict(self) -> dict[str, Any]:
        """All counts as JSON types."""
        runs = {run: [[*m, n] for m, n in counts.items()] for run, counts in self._runs.items()}
        return {"mechanism": self.mechanism(), "runs": runs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Add the runs of a ``state_dict``; of a run that is known the larger counts stay."""
        try:
            loaded = {
                run: Counter({_mechanism(*entry[:-1]): _count(entry[-1]) for entry in entries})
                for run, entries in state_dict["runs"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ValueError(
                "the accountant's state must be what its state_dict() gave; it cannot be read, so "
                "what was spent is unknown"
            ) from error
        for run, counts in loaded.items():
            self._runs[run] = self._runs.get(run, Counter()) | counts


class Budget:
    """Charges one mechanism, at most ``num_charges`` times; None sets no limit."""

    def __init__(
        self, accountant: Accountant, mechanism: Mechanism, num_charges: int | None
    ) -> None:
        self.mechanism = mechanism
        self._accountant, self._num_charges, self._n_charged = accountant, num_charges, 0

    @property
    def remaining(self) -> float:
        """How many charges are left."""
        return math.inf if self._num_charges is None else self._num_charges - self._n_charged

    def reserve(self) -> None:
        """Charge once. Raises PrivacyError, with nothing charged, beyond the limit."""
        if self.remaining < 1:
            raise PrivacyError(
                f"all {self._num_charges} planned draws are charged, and another one would exceed "
                "the budget; plan more in make_private_with_epsilon, before training"
            )
        self._n_charged += 1
        self._accountant.charge(self.mechanism)


def _mechanism(*values: Any) -> Mechanism:
    mechanism = Mechanism(*values)
    probability(sampling_rate=mechanism.sampling_rate)
    not_negative(noise_multiplier=mechanism.noise_multiplier)
    positive_int(noised_values=mechanism.noised_values)
    if mechanism.adjacency not in get_args(Adjacency):
        raise ValueError(f"adjacency must be one of {get_args(Adjacency)}")
    if mechanism.unit not in get_args(Unit):
        raise ValueError(f"unit must be one of {get_args(Unit)}")
    if not isinstance(mechanism.is_own_order, bool):
        raise TypeError("is_own_order must be true or false")
    return mechanism


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise TypeError(f"a count must be a whole number of at least 1, got {value!r}")
    return value

"""All planted privacy bugs, and the table that the documentation shows of them."""

from tests.mutants import (
    of_accounting,
    of_claims,
    of_clipping,
    of_gradients,
    of_noise,
    of_protocol,
    of_real_sizes,
)
from tests.mutants.mutant import Mutant

MUTANTS: tuple[Mutant, ...] = (
    *of_noise.MUTANTS,
    *of_clipping.MUTANTS,
    *of_gradients.MUTANTS,
    *of_protocol.MUTANTS,
    *of_real_sizes.MUTANTS,
    *of_claims.MUTANTS,
    *of_accounting.MUTANTS,
)

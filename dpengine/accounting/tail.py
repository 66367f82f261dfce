"""What the cut tail of the noise adds to δ."""

import math

from scipy.stats import ncx2, norm

from ..mechanism.plan import Adjacency
from ..mechanism.secure_random import MAX_GAUSSIAN


def noise_tail_delta(
    sampling_rate: float,
    noise_multiplier: float,
    num_steps: int,
    trainable_parameters: int,
    adjacency: Adjacency = "add-remove",
) -> float:
    """What the cut tail of the noise adds to δ over all steps.

    Box-Muller draws pairs inside a disc of radius R = ``MAX_GAUSSIAN``. Between neighbours the
    pairs are shifted by a_i standard deviations with Σ a_i² <= s², and a pair shifted by a leaves
    the disc of its neighbour with probability m(a). Add-remove and zero-out: s = 1/σ, a record and
    nothing. Replace-one: s = 2/σ, for two contributions of norm at most C are at most 2 C apart.

    To first order m(a) is the mass of a crescent at the rim, a R √(2/π) φ(R); what it has beyond
    that grows at least as a², so it is largest when one pair takes the whole shift, where it is
    below ncx2.sf(R², 2, s²). The shifts of ⌈P/2⌉ pairs add up to at most s √⌈P/2⌉:
    T q (ncx2.sf(R², 2, s²) + R √(2/π) √⌈P/2⌉ φ(R) s).
    """
    shift = (2 if adjacency == "replace-one" else 1) / noise_multiplier
    pairs = math.ceil(trainable_parameters / 2)
    rim = MAX_GAUSSIAN * math.sqrt(2 / math.pi * pairs) * norm.pdf(MAX_GAUSSIAN) * shift
    # Beyond 2 R nearly all of the mass is outside; the series of ncx2 ends before that.
    outside = ncx2.sf(MAX_GAUSSIAN**2, 2, shift**2) if shift < 2 * MAX_GAUSSIAN else 1.0
    return float(num_steps * sampling_rate * (outside + rim))

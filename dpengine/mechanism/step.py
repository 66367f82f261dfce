"""A step of DP-SGD: clip, sum, noise, divide, as functions over plain values.

    for each physical batch of a logical batch:
        answers = add(answers, clip_and_sum(batch, mode, loss_scale))
    noised = noise_and_divide(answers, mode, noise_multiplier, divisor, ...)

Abadi et al., arXiv 1607.00133, algorithm 1. Private gradients come in, and what goes out of
``noise_and_divide`` is what the accountant has charged. ``DPOptimizer`` calls these functions, in
the command and in a loop of one's own, and then the optimizer within it with ``noised.mean``.
"""

from dataclasses import dataclass, field

from torch import Tensor

from . import clipping, noise
from .adaptive import Adaptive
from .batches import RecordGrads
from .clipping import Automatic, ClippedSum, Flat, PerLayer
from .secure_random import SecureRandom

Clipping = Flat | PerLayer | Automatic | Adaptive

Answers = tuple[ClippedSum, ...]
"""What a logical batch answers: the clipped sum, and what else its clipping asks of its records."""


@dataclass(frozen=True)
class Noised:
    """What a step gives away.

    mean: the noised sum over the divisor, float64 [P]. stddev: of the noise in each of its
    elements. clipping: that of the next logical batch, a function of noised answers.
    """

    mean: Tensor = field(repr=False)
    stddev: float
    clipping: Clipping


def clip_and_sum(batch: RecordGrads, mode: Clipping, loss_scale: float) -> Answers:
    """The answers of one physical batch: each record brought to the bound, and summed.

    loss_scale: by which gradients are multiplied before the norm, as where the loss was divided.
    """
    return mode.answers(batch.grads, batch.is_record, loss_scale=loss_scale)


def add(answers: Answers | None, more: Answers) -> Answers:
    """The answers of two parts of one logical batch that share no record; None is none yet."""
    if answers is None:
        return more
    return tuple(clipping.join(one, other) for one, other in zip(answers, more, strict=True))


def noise_and_divide(
    answers: Answers,
    mode: Clipping,
    noise_multiplier: float,
    divisor: float,
    expected_batch_size: float | None,
    random: SecureRandom,
) -> Noised:
    """Noise each answer once, by its own sensitivity, and divide it by a public constant.

    noise_multiplier: σ, that of all answers together (``mode.noise_multipliers``). divisor: of
    the sum. expected_batch_size: of the other answers, which count records.
    """
    of_sum, *of_others = mode.noise_multipliers(noise_multiplier)
    others = [
        noise.noisy_mean(answer, multiplier, expected_batch_size, random)
        for answer, multiplier in zip(answers[1:], of_others, strict=True)
    ]
    return Noised(
        mean=noise.noisy_mean(answers[0], of_sum, divisor, random),
        stddev=of_sum * mode.sensitivity / divisor,
        clipping=mode.next(*map(float, others)),
    )

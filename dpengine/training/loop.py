"""The training loop: DP-SGD with Poisson sampling over physical batches of one shape."""

from collections.abc import Callable, Iterator

from ..data.draws import draw_rows
from ..mechanism.sampling import PoissonSampler
from ..mechanism.secure_random import SecureRandom
from ..optim import DPOptimizer
from .job import Job


def train(
    job: Job,
    optimizer: DPOptimizer,
    sampler: PoissonSampler,
    *,
    draws_per_record: int,
    interrupted: Callable[[], bool],
) -> Iterator[None]:
    """Run the sampler's steps, yielding after each noisy update of the weights.

    When ``interrupted()`` becomes true, the sum of the unfinished logical batch is forgotten, its
    charge stays, and the loop ends with the weights of the last whole step.
    """
    random, device = SecureRandom(), job.device
    job.objective.denoiser.train()
    for batch in sampler:
        rows = draw_rows(job.records, batch, draws_per_record, job.times, random).reveal()
        job.backward({name: tensor.to(device) for name, tensor in rows.items()})
        optimizer.step()
        optimizer.zero_grad()
        if batch.is_last:
            yield
        if interrupted():
            optimizer.discard()
            return

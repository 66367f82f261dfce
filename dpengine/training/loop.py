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
    random = SecureRandom()
    num_train_timesteps = job.noise_scheduler.config.num_train_timesteps
    job.pipeline.unet.train()
    for batch in sampler:
        rows = draw_rows(job.records, batch, draws_per_record, num_train_timesteps, random)
        job.backward(*(tensor.to(job.device) for tensor in rows.reveal().tensors))
        optimizer.step()
        optimizer.zero_grad()
        if batch.is_last:
            yield
        if interrupted():
            optimizer.discard()
            return

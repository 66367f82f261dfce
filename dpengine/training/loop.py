"""The training loop: DP-SGD with Poisson sampling over physical batches of one shape."""

from collections.abc import Callable, Iterator

from ..capture import selfcheck
from ..data.draws import draw_rows
from ..mechanism.sampling import PoissonSampler
from ..mechanism.secure_random import SecureRandom
from ..optim import DPOptimizer
from ..run.folder import RunFolder
from ..run.ledger import Ledger
from ..run.progress import progress_bar
from ..settings import Settings
from .job import Job
from .state import Trainer


def steps(
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


def train(
    settings: Settings,
    folder: RunFolder,
    ledger: Ledger,
    job: Job,
    trainer: Trainer,
    interrupt: Callable[[], bool],
) -> None:
    """Run the steps that the ledger has left, with a checkpoint after each."""
    plan = ledger.plan
    records = job.records.reveal()
    sampler = PoissonSampler(
        len(records),
        plan,
        num_steps=ledger.remaining,
        physical_batch_size=job.physical_batch_size,
        reserve=lambda: ledger.reserve(trainer.optimizer.max_grad_norm),
        announce=job.capture.announcements.announce,
        unit_ids=records.unit_ids,
    )
    done = steps(
        job,
        trainer.optimizer,
        sampler,
        draws_per_record=plan.draws_per_record,
        interrupted=interrupt,
    )
    before = [param.detach().clone() for param in trainer.params]
    with progress_bar(ledger) as progress:
        for number, _ in enumerate(done):
            if number == 0:
                selfcheck.check_updated(job.capture, before, plan.noise_multiplier)
            trainer.after_step()
            trainer.save(folder.checkpoints, ledger)
            progress.advance(trainer.noisy_share)

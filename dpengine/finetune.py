"""Fine-tune a diffusion model on private images under differential privacy.

python -m dpengine.finetune                       # embedded: public glyphs -> private handwriting
python -m dpengine.finetune --base PATH_OR_HUB_ID --data FOLDER --epsilon 8
"""

if __name__ == "__main__":  # before torch is loaded
    from .threads import sleep_soon

    sleep_soon()


import shlex
from pathlib import Path

from . import cli, engine, report, run_folder, selfcheck
from .interrupt import Interrupt, deferred
from .ledger import Ledger
from .prepare import Job, check_unchanged, make_plan, prepare
from .progress import progress_bar
from .release import release
from .run_folder import RunFolder
from .sampling import PoissonSampler
from .settings import OutputSettings, Settings
from .trainer import Trainer, make_trainer


def finetune(settings: Settings) -> int:
    """Run the command: prepare, reserve, train, release. Returns the exit status."""
    if settings.output.resume is None:
        settings.check()
        settings = settings.with_absolute_paths()
        folder = run_folder.choose(settings)
        job = prepare(settings)
        print("Calibrating the noise to the budget ...", flush=True)
        ledger = run_folder.create(folder, settings, make_plan(settings.privacy, job))
        print(report.plan_lines(ledger.plan, folder.path, job.inert_tensors), flush=True)
    else:
        folder = RunFolder(Path(settings.output.resume))
        if settings != Settings(output=OutputSettings(resume=settings.output.resume)):
            raise ValueError("--resume takes the run's own settings; leave out the other options")
        settings, ledger = run_folder.reopen(folder)
        job = prepare(settings)
        check_unchanged(ledger.plan, job)
    trainer = make_trainer(settings, ledger.plan, job.capture.parameters, job.loss_scale)
    trainer.restore(folder.checkpoints, ledger)
    with deferred() as interrupt:
        train(settings, folder, ledger, job, trainer, interrupt)
    if interrupt.requested:
        again = f"python -m dpengine.finetune --resume {shlex.quote(str(folder.path))}"
        print(
            f"Stopped with {trainer.average.num_updates} steps done; every step reserved stays "
            f"charged.\nGo on with: {again}"
        )
        return cli.INTERRUPTED
    trainer.average.copy_to_params()
    try:
        release(settings, folder, ledger, job)
    except KeyboardInterrupt:
        print(
            "Stopped while the results were written; all steps are spent.\n"
            f"Finish by: python -m dpengine.finetune --resume {shlex.quote(str(folder.path))}"
        )
        return cli.INTERRUPTED
    return 0


def train(
    settings: Settings,
    folder: RunFolder,
    ledger: Ledger,
    job: Job,
    trainer: Trainer,
    interrupt: Interrupt,
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
        announce=job.capture.announce,
        unit_ids=records.unit_ids,
    )
    steps = engine.train(
        job,
        trainer.optimizer,
        sampler,
        draws_per_record=plan.draws_per_record,
        interrupted=interrupt,
    )
    before = [param.detach().clone() for param in trainer.params]
    with progress_bar(ledger) as progress:
        for number, _ in enumerate(steps):
            if number == 0:
                selfcheck.check_updated(job.capture, before, plan.noise_multiplier)
            trainer.after_step()
            trainer.save(folder.checkpoints, ledger)
            progress.advance(trainer.noisy_share)


def main(args: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run("python -m dpengine.finetune", Settings, finetune, args)


if __name__ == "__main__":
    raise SystemExit(main())

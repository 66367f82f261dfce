"""Fine-tune a diffusion model on private images under differential privacy.

python -m dpengine.finetune                       # embedded: public glyphs -> private handwriting
python -m dpengine.finetune --base PATH_OR_HUB_ID --data FOLDER --epsilon 8
"""

if __name__ == "__main__":  # before torch is loaded
    from .threads import sleep_soon

    sleep_soon()


import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import cli
from .cli import deferred
from .errors import PrivacyError, is_of_compiler, is_out_of_memory
from .execution import performance
from .mechanism.ranks import refuse_several
from .run import durable, report
from .run import folder as run_folder
from .run.folder import RunFolder
from .run.progress import phase
from .run.together import cost_of_runs
from .settings import Settings
from .training.job import prepare
from .training.loop import train
from .training.planning import check_unchanged, make_plan
from .training.release import release
from .training.state import make_trainer


def finetune(settings: Settings) -> int:
    """Run the command: prepare, reserve, train, release. Returns the exit status."""
    refuse_several()
    durable.check_system()
    if settings.output.resume is None:
        settings.check()
        _check_device(settings)
        settings = settings.with_absolute_paths()
        folder = run_folder.choose(settings)
        job = prepare(settings)
        settings = job.settings
        phase("Calibrating the noise to the budget")
        ledger = run_folder.create(folder, settings, make_plan(settings.privacy, job))
        print(report.plan_lines(ledger.plan, folder.path, job.inert_tensors), flush=True)
        _tell_of_other_runs(folder)
    else:
        folder = RunFolder(Path(settings.output.resume))
        own, ledger = run_folder.reopen(folder)
        settings = own.resumed(settings)
        _check_device(settings)
        _tell_of_other_runs(folder)
        job = prepare(settings)
        settings = job.settings
        check_unchanged(ledger.plan, job)
    fewer = f"--physical-batch-size {max(1, job.physical_batch_size // 2)}"
    with _resumable(folder, fewer):
        trainer = make_trainer(settings, ledger.plan, job.capture.parameters, job.loss_scale)
        trainer.restore(folder.checkpoints, ledger)
        with deferred() as interrupt:
            train(settings, folder, ledger, job, trainer, interrupt)
    if interrupt.requested:
        print(
            f"Stopped with {trainer.average.num_updates} steps done; every step reserved stays "
            f"charged.\nGo on with: {_resume(folder)}"
        )
        return cli.INTERRUPTED
    trainer.average.copy_to_params()
    fewer = f"--num-synthetic {max(1, settings.output.num_synthetic // 10)}"
    try:
        with _resumable(folder, fewer):
            release(settings, folder, ledger, job)
    except KeyboardInterrupt:
        print(
            "Stopped while the results were written; all steps are spent.\n"
            f"Finish by: {_resume(folder)}"
        )
        return cli.INTERRUPTED
    return 0


def _check_device(settings: Settings) -> None:
    """Raise ValueError where the device asked for is missing, before anything is loaded."""
    device = performance.device(settings.performance)
    if settings.performance.compile == "cuda-graph" and device.type != "cuda":
        raise ValueError("compile must be 'eager' or 'inductor' without a GPU, got 'cuda-graph'")


@contextmanager
def _resumable(folder: RunFolder, fewer: str) -> Iterator[None]:
    """Add to a failure of the machine, or of ours, how the run goes on; ``fewer`` saves memory."""
    try:
        yield
    except (ValueError, TypeError, PrivacyError):
        raise  # they say what to do, which may be a new run
    except Exception as error:
        again = _resume(folder)
        if is_out_of_memory(error):
            again += f" {fewer}"
        elif is_of_compiler(error):
            again += " --compile eager"
        error.add_note(f"Every step reserved stays charged. Go on with: {again}")
        raise


def _resume(folder: RunFolder) -> str:
    return f"python -m dpengine.finetune --resume {shlex.quote(str(folder.path))}"


def _tell_of_other_runs(folder: RunFolder) -> None:
    """Say what this run and those beside it on the same data cost together."""
    runs = run_folder.of_same_data(folder)
    if len(runs) < 2:
        return
    try:
        cost = cost_of_runs(runs)
    except (ValueError, PrivacyError) as error:
        cost = f"no number for all together: {error}"
    print(f"Runs on this data compose, as those on copies of it would:\n{cost}", flush=True)


def main(args: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run("python -m dpengine.finetune", Settings, finetune, args, run_folder.to_resume)


if __name__ == "__main__":
    raise SystemExit(main())

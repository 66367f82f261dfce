"""The results of a run: adapter, images, report and model card, all from released weights."""

from ..errors import PrivacyError
from ..execution import performance
from ..run import digests, durable, report
from ..run.folder import RunFolder
from ..run.ledger import Ledger
from ..run.progress import phase
from ..run.together import cost_beside
from ..settings import Settings
from . import results
from .job import Job


def release(settings: Settings, folder: RunFolder, ledger: Ledger, job: Job) -> None:
    """Write the results, and their digests to the ledger.

    The report comes last: a folder that has one is complete and sealed. Stopped before, a run is
    released again, from the same weights.
    """
    objective = job.objective
    performance.uncast(objective.denoiser, job.frozen)
    results.write_adapter(objective, folder.path, settings)
    phase(f"Drawing {settings.output.num_synthetic:,} images and the preview")
    results.write_images(objective, settings, folder.synthetic, folder.samples)

    if digests.sha256(durable.read(folder.config)) != ledger.config_digest:
        raise PrivacyError(
            f"{folder.config} was changed since the run began; restore it, and finish the run by "
            f"--resume {folder.path}"
        )
    together = cost_beside(folder)
    content = report.privacy_report(ledger.plan, job.inert_tensors, together)
    claim = report.to_json(content).encode()
    durable.write(folder.card, report.model_card(settings, content).encode())
    written = (folder.adapter, folder.synthetic, folder.samples, folder.card, folder.config)
    sealed = {file.name: digests.sha256(durable.read(file)) for file in written}
    ledger.seal(sealed | {folder.report.name: digests.sha256(claim)})
    durable.write(folder.report, claim)
    print(report.summary(content, folder.path))

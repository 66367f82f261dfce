"""The results of a run: adapter, images, report and model card, all from released weights."""

from . import account, digests, durable, performance, report, results
from .errors import PrivacyError
from .ledger import Ledger
from .prepare import Job
from .progress import phase
from .run_folder import RunFolder
from .settings import Settings


def release(settings: Settings, folder: RunFolder, ledger: Ledger, job: Job) -> None:
    """Write the results, and their digests to the ledger.

    The report comes last: a folder that has one is complete and sealed. Stopped before, a run is
    released again, from the same weights.
    """
    pipeline = job.pipeline
    performance.uncast(pipeline.unet, job.frozen)
    results.write_adapter(pipeline, folder.path, settings.model.base)
    phase(f"Drawing {settings.output.num_synthetic:,} images and the preview")
    results.write_images(pipeline, settings, folder.synthetic, folder.samples)

    if digests.sha256(durable.read(folder.config)) != ledger.config_digest:
        raise PrivacyError(
            f"{folder.config} was changed since the run began; restore it, and finish the run by "
            f"--resume {folder.path}"
        )
    together = account.cost_beside(folder)
    content = report.privacy_report(ledger.plan, job.inert_tensors, together)
    claim = report.to_json(content).encode()
    durable.write(folder.card, report.model_card(settings, content).encode())
    written = (folder.adapter, folder.synthetic, folder.samples, folder.card, folder.config)
    sealed = {file.name: digests.sha256(durable.read(file)) for file in written}
    ledger.seal(sealed | {folder.report.name: digests.sha256(claim)})
    durable.write(folder.report, claim)
    print(report.summary(content, folder.path))

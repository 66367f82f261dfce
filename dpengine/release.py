"""The results of a run: adapter, images, report and model card, all from released weights."""

from . import adapter, digests, durable, performance, preview, report
from .errors import PrivacyError
from .generate import draw_images, even_labels, save_images
from .ledger import Ledger
from .prepare import Job
from .progress import phase
from .run_folder import RunFolder
from .settings import Settings

_COLUMNS = 20


def release(settings: Settings, folder: RunFolder, ledger: Ledger, job: Job) -> None:
    """Write the results, and their digests to the ledger.

    The report comes last: a folder that has one is complete and sealed. Stopped before, a run is
    released again, from the same weights.
    """
    pipeline = job.pipeline
    performance.uncast(pipeline.unet, job.frozen)
    adapter.save_lora(pipeline.unet, folder.path)
    class_names = pipeline.class_embedding.config.class_names
    drawn = {"sampler_steps": settings.output.sampler_steps, "seed": settings.training.seed}

    labels = even_labels(settings.output.num_synthetic, len(class_names))
    phase(f"Drawing {len(labels):,} images and the preview")
    save_images(folder.synthetic, draw_images(pipeline, labels, **drawn), labels, **drawn)

    labels = even_labels(_COLUMNS * len(class_names), len(class_names))
    private = draw_images(pipeline, labels, **drawn)
    pipeline.unet.disable_adapters()
    public = draw_images(pipeline, labels, **drawn)
    pipeline.unet.enable_adapters()
    preview.save_grid(
        folder.samples, class_names, {"base model": public, "private adapter": private}
    )

    if digests.sha256(durable.read(folder.config)) != ledger.config_digest:
        raise PrivacyError(
            f"{folder.config} was changed since the run began; restore it, and finish the run by "
            f"--resume {folder.path}"
        )
    content = report.privacy_report(ledger.plan, job.inert_tensors)
    claim = report.to_json(content).encode()
    durable.write(folder.card, report.model_card(settings, content).encode())
    written = (folder.adapter, folder.synthetic, folder.samples, folder.card, folder.config)
    sealed = {file.name: digests.sha256(durable.read(file)) for file in written}
    ledger.seal(sealed | {folder.report.name: digests.sha256(claim)})
    durable.write(folder.report, claim)
    print(report.summary(content, folder.path))

"""The results of a run: adapter, images, report and model card, all from released weights."""

from . import adapter, performance, preview, report
from .checkpoint import write_durably
from .generate import draw_images, even_labels, save_images
from .plan import PrivacyPlan
from .prepare import Job
from .run_folder import RunFolder
from .settings import Settings

_COLUMNS = 20


def release(settings: Settings, folder: RunFolder, plan: PrivacyPlan, job: Job) -> None:
    """Write the results. The report comes last: a folder that has one is complete."""
    pipeline = job.pipeline
    performance.uncast(pipeline.unet, job.frozen)
    adapter.save_lora(pipeline.unet, folder.path)
    class_names = pipeline.class_embedding.config.class_names
    drawn = {"sampler_steps": settings.output.sampler_steps, "seed": settings.training.seed}

    labels = even_labels(settings.output.num_synthetic, len(class_names))
    save_images(folder.synthetic, draw_images(pipeline, labels, **drawn), labels)

    labels = even_labels(_COLUMNS * len(class_names), len(class_names))
    private = draw_images(pipeline, labels, **drawn)
    pipeline.unet.disable_adapters()
    public = draw_images(pipeline, labels, **drawn)
    pipeline.unet.enable_adapters()
    preview.save_grid(
        folder.samples, class_names, {"base model": public, "private adapter": private}
    )

    content = report.privacy_report(plan, job.inert_tensors)
    write_durably(folder.card, report.model_card(settings, content).encode())
    write_durably(folder.report, report.to_json(content).encode())
    print(report.summary(content, folder.path))

"""Before anything is spent: model, records and plan, loaded and checked."""

import copy
import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from diffusers import DDPMScheduler

from .. import accounting
from ..capture import Capture, selfcheck
from ..capture.probing import moved_off_init
from ..data import records as data
from ..data.records import Records
from ..errors import PrivacyError
from ..execution import passes, performance
from ..mechanism.plan import PrivacyPlan, check_delta, noised_values
from ..mechanism.private import Private
from ..models import ClassConditionalPipeline, adapter, denoising_losses
from ..models.base import load_base
from ..run import progress
from ..run.progress import phase
from ..settings import PrivacySettings, Settings
from . import results

_CHECK_RECORDS = 3


@dataclass(frozen=True)
class Job:
    """What training works on: a checked model with its captured adapter, and the records.

    ``noise_scheduler`` adds diffusion noise by the base model's schedule, whatever its sampler.
    ``backward`` runs a physical batch of ``physical_batch_size`` units on ``device``; its loss was
    multiplied by ``loss_scale``. ``frozen`` holds the base weights that were cast for it.
    """

    pipeline: ClassConditionalPipeline
    noise_scheduler: DDPMScheduler
    capture: Capture
    records: Private[Records]
    inert_tensors: list[str]
    backward: passes.Pass
    physical_batch_size: int
    device: torch.device
    loss_scale: float
    frozen: dict[str, torch.Tensor]


def prepare(settings: Settings) -> Job:
    """Load model and records, add the adapter, and check every trainable tensor."""
    phase("Loading the base model and the images")
    pipeline = load_base(settings.model.base)
    unet = pipeline.unet
    # Refuses a number of steps that the schedule does not have, before anything is spent; on a
    # copy, because it changes what some schedulers do with noise.
    copy.deepcopy(pipeline.scheduler).set_timesteps(settings.output.sampler_steps)
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    names = pipeline.class_embedding.config.class_names
    records = data.load(settings.data.data, names, pipeline.image_channels, pipeline.image_size)
    if settings.privacy.rows_per_unit > 1 and not records.has_units:
        raise ValueError(
            f"rows_per_unit is {settings.privacy.rows_per_unit}, but the data names no units; give "
            "unit_ids in the .npz or units.csv in the folder, or leave rows_per_unit at 1"
        )
    if settings.privacy.public_dataset_size is None:
        check_delta(settings.privacy.delta, records.n_units)  # before anything that takes minutes
    records = replace(records, images=_encode(pipeline, records.images))
    pipeline.class_embedding.requires_grad_(False)
    adapter.add_lora(
        unet,
        rank=settings.model.rank,
        alpha=settings.model.alpha,
        target_modules=settings.model.target_modules,
        seed=settings.training.seed,
    )
    phase("Checking the gradients of each record")
    device = performance.device(settings.performance)
    pipeline.to(device)
    draws = settings.privacy.rows_per_unit * settings.privacy.draws_per_record
    synthetic = partial(_synthetic_rows, pipeline, noise_scheduler, draws)
    losses = _losses_of(pipeline, noise_scheduler, synthetic(_CHECK_RECORDS))
    unet.train()
    inert_tensors = selfcheck.freeze_inert_tensors(unet, losses)
    per_record_grads = performance.DTYPES[settings.performance.per_record_grads]
    capture = Capture(unet, draws_per_record=draws, dtype=per_record_grads)
    selfcheck.check_per_record_grads(capture, losses, _CHECK_RECORDS)
    phase("Rehearsing what is written at the end")
    with moved_off_init(capture.parameters):
        results.rehearse(pipeline, settings)
    frozen = performance.cast(unet, settings.performance)
    loss = performance.make_loss(pipeline, noise_scheduler, settings.performance)
    public_size = settings.privacy.public_dataset_size or records.n_units
    n_slots = performance.physical_batch_size(
        capture,
        loss,
        synthetic,
        settings.performance,
        at_most=math.ceil(settings.privacy.sampling_rate * public_size),
    )
    backward = passes.make_pass(capture, loss, settings.performance.compile)
    if settings.performance.compile != "eager":
        selfcheck.check_pass(capture, backward, loss, synthetic(n_slots))
    selfcheck.check_slots(capture, backward, synthetic(n_slots))
    return Job(
        pipeline,
        noise_scheduler,
        capture,
        Private(records),
        inert_tensors,
        backward,
        n_slots,
        device,
        performance.loss_scale(settings.performance),
        frozen,
    )


def _encode(pipeline: ClassConditionalPipeline, images: torch.Tensor) -> torch.Tensor:
    """What the UNet works on, image by image."""
    if pipeline.vae is None:
        return pipeline.encode(images)
    phase("Encoding the images")
    try:
        return torch.cat(
            [pipeline.encode(i) for i in progress.percent(images.split(1), "Encoding")]
        )
    except AttributeError as error:
        if "latent_dist" not in str(error):
            raise
        raise ValueError(
            "the base's vae must encode an image to a distribution, as AutoencoderKL does, got "
            f"{type(pipeline.vae).__name__}; choose another base"
        ) from error


def _synthetic_rows(
    pipeline: ClassConditionalPipeline,
    noise_scheduler: DDPMScheduler,
    draws: int,
    n_records: int,
) -> tuple[torch.Tensor, ...]:
    """Rows of fixed synthetic records: noise images, every class, every timestep.

    Latents, labels, timesteps and diffusion noise of ``n_records * draws`` rows, on the device of
    the model.
    """
    generator = torch.Generator().manual_seed(0)
    config, n_rows = pipeline.unet.config, n_records * draws
    shape = (n_rows, config.in_channels, config.sample_size, config.sample_size)
    latents, diffusion_noise = (torch.randn(shape, generator=generator) for _ in range(2))
    num_classes = len(pipeline.class_embedding.config.class_names)
    labels = torch.randint(num_classes, (n_rows,), generator=generator)
    num_train_timesteps = noise_scheduler.config.num_train_timesteps
    timesteps = torch.randint(num_train_timesteps, (n_rows,), generator=generator)
    device = pipeline.unet.device
    return tuple(t.to(device) for t in (latents, labels, timesteps, diffusion_noise))


def _losses_of(
    pipeline: ClassConditionalPipeline,
    noise_scheduler: DDPMScheduler,
    rows: tuple[torch.Tensor, ...],
) -> selfcheck.Losses:
    """One loss for each of a choice of ``rows``."""

    def losses(chosen: slice | torch.Tensor) -> torch.Tensor:
        latents, labels, timesteps, diffusion_noise = (tensor[chosen] for tensor in rows)
        return denoising_losses(
            pipeline.unet,
            noise_scheduler,
            pipeline.class_embedding,
            latents,
            labels,
            timesteps,
            diffusion_noise,
        )

    return losses


def make_plan(privacy: PrivacySettings, job: Job) -> PrivacyPlan:
    """Calibrate the noise to the budget. Raises ValueError where the budget cannot be met."""
    public_dataset_size = privacy.public_dataset_size or job.records.reveal().n_units
    trainable_parameters = sum(param.numel() for param in job.capture.parameters)
    noise_multiplier = accounting.calibrate_noise_multiplier(
        privacy.epsilon,
        privacy.delta,
        privacy.sampling_rate,
        privacy.num_steps,
        noised_values(trainable_parameters, privacy.clipping),
        privacy.neighbours,
    )
    return PrivacyPlan(
        sampling_rate=privacy.sampling_rate,
        noise_multiplier=noise_multiplier,
        num_steps=privacy.num_steps,
        max_grad_norm=privacy.max_grad_norm,
        delta=privacy.delta,
        public_dataset_size=public_dataset_size,
        adjacency=privacy.neighbours,
        draws_per_record=privacy.draws_per_record,
        trainable_parameters=trainable_parameters,
        unit="unit" if job.records.reveal().has_units else "record",
        rows_per_unit=privacy.rows_per_unit,
        clipping=privacy.clipping,
    )


def check_unchanged(plan: PrivacyPlan, job: Job) -> None:
    """Raise PrivacyError where an unfinished run's plan does not fit what was loaded again."""
    trainable_parameters = sum(param.numel() for param in job.capture.parameters)
    records = job.records.reveal()
    # The true number of records is public under zero-out adjacency only.
    resized = plan.adjacency == "zero-out" and plan.public_dataset_size != records.n_units
    regrouped = (plan.unit == "unit") != records.has_units
    if resized or regrouped or plan.trainable_parameters != trainable_parameters:
        raise PrivacyError(
            "the data or the base model changed since the run began; restore them, or start a new "
            "run"
        )

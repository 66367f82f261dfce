"""Before anything is spent: model, records and plan, loaded and checked."""

import copy
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import DDPMScheduler

from . import accounting, adapter, data, selfcheck
from .base import load_base
from .capture import Capture
from .data import Records
from .errors import PrivacyError
from .models import ClassConditionalPipeline, denoising_losses
from .plan import PrivacyPlan, check_delta
from .settings import PrivacySettings, Settings

_CHECK_RECORDS = 3


@dataclass(frozen=True)
class Job:
    """What training works on: a checked model with its captured adapter, and the records.

    ``noise_scheduler`` adds diffusion noise by the base model's schedule, whatever its sampler.
    """

    pipeline: ClassConditionalPipeline
    noise_scheduler: DDPMScheduler
    capture: Capture
    records: Records
    inert_tensors: list[str]


def prepare(settings: Settings) -> Job:
    """Load model and records, add the adapter, and check every trainable tensor."""
    pipeline = load_base(settings.model.base)
    unet = pipeline.unet
    # Refuses a number of steps that the schedule does not have, before anything is spent; on a
    # copy, because it changes what some schedulers do with noise.
    copy.deepcopy(pipeline.scheduler).set_timesteps(settings.output.sampler_steps)
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    names = pipeline.class_embedding.config.class_names
    records = data.load(settings.data.data, names, pipeline.image_channels, pipeline.image_size)
    records = Records(pipeline.encode(records.images), records.labels)
    pipeline.class_embedding.requires_grad_(False)
    adapter.add_lora(
        unet,
        rank=settings.model.rank,
        alpha=settings.model.alpha,
        target_modules=settings.model.target_modules,
        seed=settings.training.seed,
    )
    draws = settings.privacy.draws_per_record
    losses = partial(_synthetic_losses, pipeline, noise_scheduler, _CHECK_RECORDS * draws)
    unet.train()
    inert_tensors = selfcheck.freeze_inert_tensors(unet, losses)
    capture = Capture(unet, draws_per_record=draws)
    selfcheck.check_per_record_grads(capture, losses, _CHECK_RECORDS)
    n_slots = settings.training.physical_batch_size
    losses = partial(_synthetic_losses, pipeline, noise_scheduler, n_slots * draws)
    selfcheck.check_slots(capture, losses, n_slots)
    return Job(pipeline, noise_scheduler, capture, records, inert_tensors)


def _synthetic_losses(
    pipeline: ClassConditionalPipeline,
    noise_scheduler: DDPMScheduler,
    n_rows: int,
    rows: slice | torch.Tensor,
) -> torch.Tensor:
    """Losses of ``rows`` of fixed synthetic rows: noise images, every class, every timestep."""
    generator = torch.Generator().manual_seed(0)
    config = pipeline.unet.config
    shape = (n_rows, config.in_channels, config.sample_size, config.sample_size)
    latents, diffusion_noise = (torch.randn(shape, generator=generator) for _ in range(2))
    num_classes = len(pipeline.class_embedding.config.class_names)
    labels = torch.randint(num_classes, (n_rows,), generator=generator)
    num_train_timesteps = noise_scheduler.config.num_train_timesteps
    timesteps = torch.randint(num_train_timesteps, (n_rows,), generator=generator)
    return denoising_losses(
        pipeline.unet,
        noise_scheduler,
        pipeline.class_embedding,
        latents[rows],
        labels[rows],
        timesteps[rows],
        diffusion_noise[rows],
    )


def make_plan(privacy: PrivacySettings, job: Job) -> PrivacyPlan:
    """Calibrate the noise to the budget. Raises ValueError where the budget cannot be met."""
    public_dataset_size = privacy.public_dataset_size or len(job.records)
    trainable_parameters = sum(param.numel() for param in job.capture.parameters)
    check_delta(privacy.delta, public_dataset_size)  # before the search, which takes seconds
    noise_multiplier = accounting.calibrate_noise_multiplier(
        privacy.epsilon,
        privacy.delta,
        privacy.sampling_rate,
        privacy.num_steps,
        trainable_parameters,
    )
    return PrivacyPlan(
        sampling_rate=privacy.sampling_rate,
        noise_multiplier=noise_multiplier,
        num_steps=privacy.num_steps,
        max_grad_norm=privacy.max_grad_norm,
        delta=privacy.delta,
        public_dataset_size=public_dataset_size,
        adjacency="zero-out" if privacy.public_dataset_size is None else "add-remove",
        draws_per_record=privacy.draws_per_record,
        trainable_parameters=trainable_parameters,
    )


def check_unchanged(plan: PrivacyPlan, job: Job) -> None:
    """Raise PrivacyError where an unfinished run's plan does not fit what was loaded again."""
    trainable_parameters = sum(param.numel() for param in job.capture.parameters)
    # The true number of records is public under zero-out adjacency only.
    resized = plan.adjacency == "zero-out" and plan.public_dataset_size != len(job.records)
    if resized or plan.trainable_parameters != trainable_parameters:
        raise PrivacyError(
            "the data or the base model changed since the run began; restore them, or start a new "
            "run"
        )

"""Before anything is spent: model, records and plan, loaded, adapted, checked and fitted."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..capture import Capture, selfcheck
from ..capture.probing import moved_off_init
from ..data import records as data
from ..data.records import Records
from ..execution import passes, performance
from ..mechanism.plan import check_delta
from ..mechanism.private import Private
from ..models import (
    Batch,
    NoisePath,
    Objective,
    Times,
    adapter,
    family_of,
    make_path,
    make_times,
    row_losses,
    synthetic_rows,
)
from ..models.base import load_base, quiet, read_family
from ..run import progress
from ..run.progress import phase
from ..settings import Settings
from . import results

_CHECK_RECORDS = 3


@dataclass(frozen=True)
class Job:
    """What training works on: a checked model with its captured adapter, and the records.

    ``settings`` are whole: what depends on the base is filled in. ``times`` is the law of times.
    ``backward`` runs a physical batch of ``physical_batch_size`` units on ``device``; its loss was
    multiplied by ``loss_scale``. ``frozen`` holds the base weights that were cast for it.
    """

    settings: Settings
    objective: Objective
    times: Times
    capture: Capture
    records: Private[Records]
    inert_tensors: list[str]
    backward: passes.Pass
    physical_batch_size: int
    frozen: dict[str, Tensor]

    @property
    def device(self) -> torch.device:
        return self.objective.denoiser.device

    @property
    def loss_scale(self) -> float:
        return performance.loss_scale(self.settings.performance)


def prepare(settings: Settings) -> Job:
    """Load model and records, add the adapter, check every trainable tensor, and fit the batch."""
    settings = complete(settings)
    phase("Loading the base model and the images")
    objective = load_objective(settings)
    path = _path(objective, settings)
    records = _load_records(objective, settings)
    adapter.add_lora(
        objective.denoiser,
        rank=settings.model.rank,
        alpha=settings.model.alpha,
        target_modules=settings.model.target_modules,
        seed=settings.training.seed,
    )
    phase("Checking the gradients of each record")
    draws = settings.privacy.rows_per_unit * settings.privacy.draws_per_record
    capture, inert_tensors = _check_gradients(objective, path, draws, settings)
    phase("Rehearsing what is written at the end")
    with moved_off_init(capture.parameters):
        results.rehearse(objective, settings)
    frozen = performance.cast(objective.denoiser, settings.performance)
    public_size = settings.privacy.public_dataset_size or records.n_units
    backward, n_slots = _fit(
        capture,
        performance.make_loss(objective, path, settings.performance),
        lambda n_records: synthetic_rows(objective, path, n_records * draws),
        settings,
        at_most=math.ceil(settings.privacy.sampling_rate * public_size),
    )
    return Job(
        settings,
        objective,
        make_times(settings.training.time_law, path),
        capture,
        Private(records),
        inert_tensors,
        backward,
        n_slots,
        frozen,
    )


def complete(settings: Settings) -> Settings:
    """The same with what depends on the kind of base filled in; its weights are not read.

    Raises ValueError where the base follows prompts and none is given, or follows none.
    """
    family, chosen, source = read_family(settings.model.base), settings.model, settings.data
    if not family.follows_prompts and source.prompt is not None:
        raise ValueError(
            f"base {chosen.base!r} follows no prompts, it knows classes; leave prompt out"
        )
    if family.follows_prompts:
        if source.prompt is None:
            raise ValueError(
                f"base {chosen.base!r} follows prompts; give one for the images, such as --prompt "
                "'a photo of {class}', whose {class} is the name of each image's class"
            )
        if "{class}" in source.prompt and not source.class_names:
            source = replace(source, class_names=data.class_names(source.data))
    return replace(
        settings,
        data=source,
        model=replace(chosen, target_modules=chosen.target_modules or family.target_modules),
        training=replace(settings.training, time_law=settings.training.time_law or family.time_law),
    )


def load_objective(settings: Settings) -> Objective:
    """The base of complete ``settings``, on the device to train on, as training sees it."""
    pipeline = load_base(settings.model.base)
    try:
        objective = family_of(pipeline).make(
            pipeline, settings.data.texts, settings.data.image_size
        )
    except ValueError as error:
        raise ValueError(f"base {settings.model.base!r} cannot be used so: {error}") from error
    # Refuses a number of steps that the schedule does not have, before anything is spent; on a
    # copy, because it changes what some schedulers do with noise.
    if not pipeline.scheduler.config.get("use_dynamic_shifting"):  # then any number will do
        copy.deepcopy(pipeline.scheduler).set_timesteps(settings.output.sampler_steps)
    pipeline.to(performance.device(settings.performance))
    return objective


def _path(objective: Objective, settings: Settings) -> NoisePath:
    path = make_path(objective.pipeline.scheduler)
    if settings.training.loss_weights == "min-snr":
        path = path.with_min_snr(settings.training.snr_gamma)
    return path.to(objective.denoiser.device)


def _load_records(objective: Objective, settings: Settings) -> Records:
    """The private records, encoded: what training reads of them, on the CPU."""
    source, conditions = settings.data, _conditions(objective, objective.texts)
    names = source.class_names or (objective.texts if source.prompt is None else None)
    records = data.load(
        source.data,
        names if conditions else None,  # labels are not read where nothing is shown for them
        objective.image_channels,
        objective.image_size,
    )
    if settings.privacy.rows_per_unit > 1 and not records.has_units:
        raise ValueError(
            f"rows_per_unit is {settings.privacy.rows_per_unit}, but the data names no units; give "
            "unit_ids in the .npz or units.csv in the folder, or leave rows_per_unit at 1"
        )
    if settings.privacy.public_dataset_size is None:
        check_delta(settings.privacy.delta, records.n_units)  # before anything that takes minutes
    labels = records.labels
    if records.captions is not None:  # equal ones are encoded and kept once
        texts = sorted(set(records.captions))
        number_of = {text: number for number, text in enumerate(texts)}
        labels = torch.tensor([number_of[text] for text in records.captions])
        with quiet():  # diffusers shows what it cuts off of a text that is too long
            conditions = _conditions(objective, texts)
    images = _encode(objective, records.images)
    return replace(records, images=images, labels=labels, captions=None, conditions=conditions)


def _conditions(objective: Objective, texts: Sequence[str]) -> Batch:
    """What the denoiser is given for each text, on the CPU; nothing, where it is given nothing.

    Texts are encoded one by one, as images are: in a batch, rounding would make one depend on how
    many others there are.
    """
    lines = [objective.condition([text]) for text in texts]
    return {name: torch.cat([line[name] for line in lines]).cpu() for name in lines[0]}


def _encode(objective: Objective, images: Tensor) -> Tensor:
    """What the denoiser works on, image by image."""
    if getattr(objective.pipeline, "vae", None) is None:
        return images
    phase("Encoding the images")
    device = objective.denoiser.device
    images = progress.percent(images.split(1), "Encoding")
    return torch.cat([objective.encode(image.to(device)).cpu() for image in images])


def _check_gradients(
    objective: Objective, path: NoisePath, draws: int, settings: Settings
) -> tuple[Capture, list[str]]:
    """Capture the denoiser, its per-record gradients checked, and name what is not trained."""
    for part in objective.pipeline.components.values():
        if isinstance(part, torch.nn.Module) and part is not objective.denoiser:
            part.requires_grad_(False)
    denoiser, rows = objective.denoiser, synthetic_rows(objective, path, _CHECK_RECORDS * draws)

    def losses(chosen: slice | Tensor) -> Tensor:
        return row_losses(objective, path, {name: rows[name][chosen] for name in rows})

    denoiser.train()
    inert_tensors = selfcheck.freeze_inert_tensors(denoiser, losses)
    per_record_grads = performance.DTYPES[settings.performance.per_record_grads]
    capture = Capture(denoiser, draws_per_record=draws, dtype=per_record_grads)
    selfcheck.check_per_record_grads(capture, losses, _CHECK_RECORDS)
    return capture, inert_tensors


def _fit(
    capture: Capture,
    loss: passes.Loss,
    synthetic: performance.Synthetic,
    settings: Settings,
    at_most: int,
) -> tuple[passes.Pass, int]:
    """The pass over a physical batch, and how many units it has; both checked on synthetic rows."""
    how = settings.performance.compile
    n_slots = performance.physical_batch_size(
        capture, loss, synthetic, settings.performance, at_most=at_most
    )
    backward = passes.make_pass(capture, loss, how)
    if how != "eager":
        selfcheck.check_pass(capture, backward, loss, synthetic(n_slots))
    selfcheck.check_slots(capture, backward, synthetic(n_slots))
    return backward, n_slots

"""The plan of a run: calibrated to its budget, and compared with what was loaded again."""

from .. import accounting
from ..errors import PrivacyError
from ..mechanism.plan import PrivacyPlan, noised_values
from ..settings import PrivacySettings
from .job import Job


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

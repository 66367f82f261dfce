"""Ways from data to noise: hand computations, diffusers' own training formulas, laws of time."""

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr
from scipy import stats

from dpengine.models import make_path, make_times

TIMES = torch.tensor([0, 10, 500, 998])


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, 4, 2, 3, 3, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddpm_by_hand(prediction_type):
    path = make_path(DDIMScheduler(prediction_type=prediction_type))
    x, noise = rows()
    noisy, target = path(x, noise, TIMES)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    for row, t in enumerate(TIMES):
        signal = torch.prod(1 - betas[: t + 1]).sqrt()
        spread = (1 - signal**2).sqrt()
        expected = {
            "epsilon": noise[row],
            "v_prediction": signal * noise[row] - spread * x[row],
            "sample": x[row],
        }[prediction_type]
        # Tables are float32, the sum of 1000 logarithms among them.
        torch.testing.assert_close(
            noisy[row], signal * x[row] + spread * noise[row], rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(target[row], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(path.steps, torch.arange(1000))


@pytest.mark.parametrize("config", [{}, {"shift": 3.0}, {"use_dynamic_shifting": True}])
def test_flow_matching_is_that_of_diffusers_scripts(config):
    """σ and timestep of an index of the scheduler; (1 - σ) x + σ n, and n - x."""
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    path, (x, noise) = make_path(scheduler), rows()
    noisy, target = path(x, noise, TIMES)
    for row, t in enumerate(TIMES):
        sigma = scheduler.sigmas[999 - t].double()
        torch.testing.assert_close(
            noisy[row], (1 - sigma) * x[row] + sigma * noise[row], rtol=1e-6, atol=1e-6
        )
        torch.testing.assert_close(target[row], noise[row] - x[row])
    assert torch.equal(path.steps.flip(0), scheduler.timesteps)


def test_a_flow_sampler_that_was_set_to_some_steps_is_trained_as_before():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    expected = make_path(scheduler)
    scheduler.set_timesteps(5)
    assert torch.equal(make_path(scheduler).spread, expected.spread)


@pytest.mark.parametrize("kind", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_edm_is_its_weighted_loss_of_the_denoised_image(kind, prediction_type):
    """(σ² + σ_data²) / (σ σ_data)² · |D - x|², D by diffusers' own preconditioning."""
    scheduler = kind(prediction_type=prediction_type, sigma_data=0.5)
    path, (x, noise) = make_path(scheduler), rows()
    answer = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    noisy, target = path(x, noise, TIMES)
    for row, t in enumerate(TIMES):
        sigma = scheduler.sigmas[len(path) - 1 - t].double()
        seen = x[row] + sigma * noise[row]
        expected = scheduler.precondition_inputs(seen, sigma)
        torch.testing.assert_close(noisy[row], expected, rtol=1e-5, atol=1e-6)
        denoised = scheduler.precondition_outputs(seen, answer[row], sigma)
        weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
        loss = weight * (denoised - x[row]).square().sum()
        torch.testing.assert_close(
            (answer[row] - target[row]).square().sum(), loss, rtol=1e-3, atol=0
        )
    steps = scheduler.precondition_noise(scheduler.sigmas[:-1])
    torch.testing.assert_close(path.steps.flip(0), steps, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("prediction_type", "divisor"), [("epsilon", 0), ("v_prediction", 1)])
def test_min_snr_is_that_of_diffusers_scripts(prediction_type, divisor):
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    snr = compute_snr(scheduler, torch.arange(1000)).double()
    expected = snr.clamp(max=5.0) / (snr + divisor)
    weights = make_path(scheduler).with_min_snr(5.0).weights
    torch.testing.assert_close(weights.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(prediction_type="sample"),
        FlowMatchEulerDiscreteScheduler(),
        EDMEulerScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_min_snr_is_one_weight_of_the_error_of_the_image(scheduler):
    """Whatever the target: an answer that means an image off by e costs min(SNR, γ) e²."""
    path = make_path(scheduler).with_min_snr(5.0)
    tables = {
        n: getattr(path, n).double() for n in ("signal", "spread", "target_signal", "target_noise")
    }
    times = torch.arange(0, len(path) - 1, 97)
    signal, spread, of_x, of_noise = (tables[n][times] for n in tables)
    x, noise, error = 0.3, -1.1, 1e-3
    noisy = signal * x + spread * noise
    answer = of_x * (x + error) + of_noise * (noisy - signal * (x + error)) / spread
    losses = path.weights[times] * (answer - (of_x * x + of_noise * noise)) ** 2
    expected = ((signal / spread) ** 2).clamp(max=5.0) * error**2
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-12)


def test_min_snr_of_pure_noise_is_finite():
    for prediction_type, last in (("epsilon", 1.0), ("v_prediction", 0.0), ("sample", 0.0)):
        scheduler = DDPMScheduler(prediction_type=prediction_type, rescale_betas_zero_snr=True)
        weights = make_path(scheduler).with_min_snr(5.0).weights
        assert weights.isfinite().all() and float(weights[-1]) == pytest.approx(last, abs=1e-3)


def test_what_is_not_understood_is_refused():
    for scheduler in (
        CMStochasticIterativeScheduler(),
        DDPMScheduler(prediction_type="other"),
        FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        EDMEulerScheduler(prediction_type="other"),
    ):
        with pytest.raises(ValueError, match=r"scheduler"):
            make_path(scheduler)
    with pytest.raises(ValueError, match="time law must be one of"):
        make_times("mode", make_path(DDPMScheduler()))


@pytest.mark.parametrize("law", ["uniform", "logit-normal", "edm"])
def test_times_rise_with_the_uniforms_and_stay_in_the_tables(law):
    path = make_path(DDPMScheduler())
    edges = np.array([0.0, 1e-300, 0.1, 0.5, 0.9, 1 - 2**-53])
    times = make_times(law, path)(edges.reshape(2, 3))
    assert times.shape == (2, 3) and times.dtype == np.int64
    assert (np.diff(times.ravel()) >= 0).all() and times.min() >= 0 and times.max() <= 999


def test_logit_normal_times_have_the_law_of_diffusers():
    path = make_path(FlowMatchEulerDiscreteScheduler())
    drawn = make_times("logit-normal", path)(np.random.default_rng(0).random(20_000))
    generator = torch.Generator().manual_seed(0)
    theirs = compute_density_for_timestep_sampling(
        "logit_normal", 20_000, logit_mean=0.0, logit_std=1.0, generator=generator
    )
    assert stats.ks_2samp(drawn / 1000, theirs.numpy()).pvalue > 1e-7


def test_edm_times_have_log_normal_noise():
    """The nearest of 1,000 levels: no more than half a gap from EDM's own."""
    path = make_path(EDMEulerScheduler())
    u = np.linspace(0.01, 0.99, 99)
    times = make_times("edm", path)(u)
    ratio = (path.spread / path.signal).double().log().numpy()
    gaps = np.diff(ratio)[np.clip(times, 0, 998)]
    assert (np.abs(ratio[times] - (1.2 * stats.norm.ppf(u) - 1.2)) <= 0.51 * gaps + 1e-3).all()

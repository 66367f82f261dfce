"""Ways from data to noise: what a denoiser is given at each time, and what it must answer.

Every law of noise in use is linear in the data x and the noise n, so one table describes it:

    input  = signal · x + spread · n            what the denoiser sees
    target = target_signal · x + target_noise · n

    epsilon, v, x of DDPM     signal = √ᾱ, spread = √(1 - ᾱ); target n, √ᾱ n - √(1 - ᾱ) x, or x
                              (Ho et al. 2020; Salimans and Ho 2022)
    flow matching             signal = 1 - σ, spread = σ; target n - x (Esser et al. 2024)
    EDM                       input c_in (x + σ n); target (x - c_skip (x + σ n)) / c_out, whose
                              squared error is EDM's loss with its own weight 1 / c_out²
                              (Karras et al. 2022)
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from scipy.special import expit, ndtri
from torch import Tensor

TimeLaw = Literal["uniform", "logit-normal", "edm"]
"""How the times of draws are spread: evenly, in the middle of the way, or by EDM's noise levels."""

Times = Callable[[np.ndarray], np.ndarray]
"""From uniforms in [0, 1) to times, int64 in 0..T-1, of the same shape. It rises with them, so that
uniforms from separate strata give times from separate strata of the law."""

DDPM_SCHEDULERS = (
    *("DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler"),
    *("DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler"),
    *("HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler"),
    *("LMSDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler"),
)
"""Samplers of models that were trained by DDPM's law of noise."""

EDM_SCHEDULERS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler",)


@dataclass(frozen=True)
class NoisePath:
    """A way from data to noise in T times, the clean end first. All tables float32 [T].

    ``steps`` is what the denoiser is told of a time, ``weights`` what a row's loss is multiplied
    by: both public functions of the time alone.
    """

    signal: Tensor
    spread: Tensor
    target_signal: Tensor
    target_noise: Tensor
    steps: Tensor
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.steps)

    def __call__(self, x: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Input and target of each row: x, noise [B, ...], times int64 [B] -> twice [B, ...]."""

        def at(table: Tensor) -> Tensor:
            return table[times].to(x.dtype).view(-1, *(1,) * (x.ndim - 1))

        noisy = at(self.signal) * x + at(self.spread) * noise
        return noisy, at(self.target_signal) * x + at(self.target_noise) * noise

    def to(self, device: torch.device) -> "NoisePath":
        """The same on ``device``."""
        tables = {field.name: getattr(self, field.name) for field in fields(self)}
        return NoisePath(**{n: None if t is None else t.to(device) for n, t in tables.items()})

    def with_min_snr(self, gamma: float) -> "NoisePath":
        """The same with the weights of min-SNR-γ (Hang et al. 2023), whatever the target.

        On the squared error of x the weight is min(SNR, γ). An error of the target is κ times one
        of x with κ = target_signal - target_noise · signal / spread, as the input fixes n given x.
        """
        snr = (self.signal.double() / self.spread.double()) ** 2
        kappa = self.target_signal.double() - self.target_noise * snr.sqrt()
        # Of pure noise that is to be told as such κ and SNR vanish together: SNR / κ² = 1.
        weights = torch.where(kappa == 0, 1.0, snr.clamp(max=gamma) / kappa**2)
        return replace(self, weights=weights.float())


def make_path(scheduler: Any) -> NoisePath:
    """The law of noise that ``scheduler`` samples by, as its model was trained.

    Raises ValueError for one that is not understood.
    """
    kind, config = type(scheduler).__name__, scheduler.config
    if kind in FLOW_SCHEDULERS and not config.invert_sigmas:
        # As made: a sampler that was set to some steps has only these in its tables.
        trained = FlowMatchEulerDiscreteScheduler.from_config(config)
        sigma = trained.sigmas.flip(0)
        ones = torch.ones_like(sigma)
        return NoisePath(1 - sigma, sigma, -ones, ones, trained.timesteps.flip(0))
    if kind in EDM_SCHEDULERS:
        return _edm_path(scheduler)
    if kind in DDPM_SCHEDULERS:
        return _ddpm_path(scheduler)
    raise ValueError(
        f"the scheduler {kind} means a law of noise that is not understood; known are "
        f"{', '.join((*DDPM_SCHEDULERS, *FLOW_SCHEDULERS, *EDM_SCHEDULERS))}"
    )


def _ddpm_path(scheduler: Any) -> NoisePath:
    config = scheduler.config
    alphas = DDPMScheduler.from_config(config).alphas_cumprod
    same = len(alphas) == len(scheduler.alphas_cumprod) and torch.allclose(
        alphas, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6
    )
    if config.get("use_flow_sigmas") or not same:
        raise ValueError(
            "the scheduler's law of noise is not DDPM's of the same betas, which is trained here"
        )
    signal, spread = alphas**0.5, (1 - alphas) ** 0.5
    zeros, ones = torch.zeros_like(signal), torch.ones_like(signal)
    targets = {"epsilon": (zeros, ones), "v_prediction": (-spread, signal), "sample": (ones, zeros)}
    if config.prediction_type not in targets:
        raise ValueError(
            f"the scheduler's prediction_type must be one of {', '.join(map(repr, targets))}, got "
            f"{config.prediction_type!r}"
        )
    return NoisePath(signal, spread, *targets[config.prediction_type], torch.arange(len(alphas)))


def _edm_path(scheduler: Any) -> NoisePath:
    config = scheduler.config
    if config.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            "the scheduler's prediction_type must be 'epsilon' or 'v_prediction' with EDM, got "
            f"{config.prediction_type!r}"
        )
    # As made; the last is the end of a sampler's way.
    sigma = type(scheduler).from_config(config).sigmas[:-1].flip(0).double()
    data = config.sigma_data
    total = (sigma**2 + data**2).sqrt()
    c_in, c_skip, c_out = 1 / total, (data / total) ** 2, sigma * data / total
    if config.prediction_type == "v_prediction":
        c_out = -c_out
    tables = (c_in, c_in * sigma, (1 - c_skip) / c_out, -c_skip * sigma / c_out, sigma.log() / 4)
    return NoisePath(*(table.float() for table in tables))


def make_times(law: TimeLaw, path: NoisePath) -> Times:
    """``law`` over the times of ``path``, as a public function of uniforms.

    `logit-normal`: the place on the way is the logistic function of a standard normal (Esser et al.
    2024). `edm`: the ratio of noise to signal is exp(-1.2 + 1.2 n), n standard normal, at the
    nearest time (Karras et al. 2022).
    """
    if law == "uniform":
        return partial(_uniform, len(path))
    if law == "logit-normal":
        return lambda uniforms: _uniform(len(path), expit(ndtri(uniforms)))
    if law == "edm":
        ratio = np.log((path.spread.double() / path.signal.double()).numpy(force=True))
        middles = (ratio[1:] + ratio[:-1]) / 2
        return lambda uniforms: np.searchsorted(middles, 1.2 * ndtri(uniforms) - 1.2)
    raise ValueError(f"time law must be one of {', '.join(get_args(TimeLaw))}, got {law!r}")


def _uniform(num_times: int, places: np.ndarray) -> np.ndarray:
    return np.minimum((places * num_times).astype(np.int64), num_times - 1)

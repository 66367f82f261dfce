"""Networks; knows nothing of differential privacy."""

from .diffusion import denoising_losses as denoising_losses
from .pipeline import DEFAULT_BASE as DEFAULT_BASE
from .pipeline import ClassConditionalPipeline as ClassConditionalPipeline
from .pipeline import ClassEmbedding as ClassEmbedding

"""Fine-tune diffusion models with LoRA under differential privacy."""

from .capture import Capture as Capture
from .clipping import ClippedSum as ClippedSum
from .errors import PrivacyError as PrivacyError
from .optimizer import DPOptimizer as DPOptimizer
from .plan import PrivacyPlan as PrivacyPlan

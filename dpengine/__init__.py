"""Fine-tune diffusion models with LoRA under differential privacy.

The names are loaded when they are first asked for: `python -m dpengine.X` imports this package
before it can say how torch's threads shall wait, which is read as torch is loaded.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

_HERE = Path(__file__).parent
if not (_HERE / "kernels").is_dir():
    # A checkout, whose kernels/ and models/ stand beside this folder: it works from its root
    # whether the package is installed or not, and how.
    __path__.append(str(_HERE.parent))

if TYPE_CHECKING:
    from .capture import check_per_record_grads as check_per_record_grads
    from .capture.capture import Capture as Capture
    from .data.draws import secure_integers as secure_integers
    from .data.draws import secure_normal as secure_normal
    from .data.draws import secure_normal_like as secure_normal_like
    from .dropin import BatchMemoryManager as BatchMemoryManager
    from .dropin import DPDataLoader as DPDataLoader
    from .dropin import PrivacyEngine as PrivacyEngine
    from .dropin import Together as Together
    from .errors import PrivacyError as PrivacyError
    from .execution import make_pass as make_pass
    from .mechanism.adaptive import Adaptive as Adaptive
    from .mechanism.clipping import Automatic as Automatic
    from .mechanism.clipping import ClippedSum as ClippedSum
    from .mechanism.clipping import Flat as Flat
    from .mechanism.clipping import PerLayer as PerLayer
    from .mechanism.plan import PrivacyPlan as PrivacyPlan
    from .mechanism.sampling import PoissonSampler as PoissonSampler
    from .models.base import load_base as load_base
    from .optim import DPOptimizer as DPOptimizer

_HOME = {
    "Adaptive": "mechanism.adaptive",
    "Automatic": "mechanism.clipping",
    "BatchMemoryManager": "dropin",
    "Capture": "capture",
    "ClippedSum": "mechanism.clipping",
    "DPDataLoader": "dropin",
    "DPOptimizer": "optim",
    "Flat": "mechanism.clipping",
    "PerLayer": "mechanism.clipping",
    "PoissonSampler": "mechanism.sampling",
    "PrivacyEngine": "dropin",
    "PrivacyError": "errors",
    "PrivacyPlan": "mechanism.plan",
    "Together": "dropin",
    "check_per_record_grads": "capture",
    "load_base": "models.base",
    "make_pass": "execution",
    "secure_integers": "data.draws",
    "secure_normal": "data.draws",
    "secure_normal_like": "data.draws",
}
"""The public names, and the module that each comes from."""

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})

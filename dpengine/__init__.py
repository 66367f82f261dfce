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
    from .adaptive import Adaptive as Adaptive
    from .capture import Capture as Capture
    from .clipping import Automatic as Automatic
    from .clipping import ClippedSum as ClippedSum
    from .clipping import Flat as Flat
    from .clipping import PerLayer as PerLayer
    from .draws import secure_integers as secure_integers
    from .draws import secure_normal as secure_normal
    from .draws import secure_normal_like as secure_normal_like
    from .dropin import BatchMemoryManager as BatchMemoryManager
    from .dropin import DPDataLoader as DPDataLoader
    from .dropin import PrivacyEngine as PrivacyEngine
    from .dropin import Together as Together
    from .errors import PrivacyError as PrivacyError
    from .optimizer import DPOptimizer as DPOptimizer
    from .passes import make_pass as make_pass
    from .plan import PrivacyPlan as PrivacyPlan
    from .sampling import PoissonSampler as PoissonSampler
    from .selfcheck import check_per_record_grads as check_per_record_grads

_HOME = {
    "Adaptive": "adaptive",
    "Automatic": "clipping",
    "BatchMemoryManager": "dropin",
    "Capture": "capture",
    "ClippedSum": "clipping",
    "DPDataLoader": "dropin",
    "DPOptimizer": "optimizer",
    "Flat": "clipping",
    "PerLayer": "clipping",
    "PoissonSampler": "sampling",
    "PrivacyEngine": "dropin",
    "PrivacyError": "errors",
    "PrivacyPlan": "plan",
    "Together": "dropin",
    "check_per_record_grads": "selfcheck",
    "make_pass": "passes",
    "secure_integers": "draws",
    "secure_normal": "draws",
    "secure_normal_like": "draws",
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

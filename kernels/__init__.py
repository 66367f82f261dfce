"""Operations on tensors; knows nothing of privacy. Imported as ``dpengine.kernels``."""

import sys

if __name__ == "dpengine.kernels":
    from .ops import clip_factors as clip_factors
    from .ops import lora_per_record_grads as lora_per_record_grads
    from .ops import sq_norms as sq_norms
    from .ops import weighted_sum as weighted_sum
else:
    # Someone imports Hugging Face's `kernels` where the folder that holds this one is on the path.
    # Step aside for the next one there; where there is none, be the empty module without a file
    # that transformers takes for a package that is not installed.
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    _here = Path(__file__).resolve().parent.parent
    _spec = PathFinder.find_spec("kernels", [p for p in sys.path if Path(p).resolve() != _here])
    if _spec is not None and _spec.loader is not None:
        sys.modules[__name__] = module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[__name__])
    else:
        __path__ = []
        del __file__

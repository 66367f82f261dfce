"""Operations on tensors; knows nothing of privacy. Imported as ``dpengine.kernels``."""

import sys

if __name__ == "dpengine.kernels":
    from . import ops as ops
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

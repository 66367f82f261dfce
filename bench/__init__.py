"""Measurements. Each command's results go to `bench/results/`.

The GPU suite must run where little more than torch and triton is installed: without an installed
dpengine, its kernels alone are loaded from the folder beside this one.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def _load_kernels_alone() -> None:
    folder = Path(__file__).resolve().parent.parent / "kernels"
    parent = ModuleType("dpengine")
    parent.__path__ = []
    spec = importlib.util.spec_from_file_location(
        "dpengine.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    kernels = importlib.util.module_from_spec(spec)
    sys.modules["dpengine"], sys.modules["dpengine.kernels"] = parent, kernels
    spec.loader.exec_module(kernels)
    parent.kernels = kernels


try:
    from dpengine.threads import sleep_soon

    sleep_soon()  # as the commands do, before torch is loaded
    import dpengine.kernels  # noqa: F401
except ImportError:
    for _name in [name for name in sys.modules if name.partition(".")[0] == "dpengine"]:
        del sys.modules[_name]
    _load_kernels_alone()

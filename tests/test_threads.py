"""Commands choose how OpenMP's threads wait; the package as a library leaves it alone."""

import os
import subprocess
import sys

import pytest

COMMANDS = ("finetune", "generate", "evaluate", "account", "audit", "verify")

SEE_TORCH = """
import os, runpy, sys

class See:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            os._exit(0)

sys.meta_path.insert(0, See())
sys.stdout.reconfigure(line_buffering=True)
sys.argv[1:] = ["--help"]
"""
"""Prints the variable at the moment that torch is loaded, when it is read, and ends."""


def spins(code: str, **variables: str) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", SEE_TORCH + code],
        env=kept | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_lets_threads_sleep_soon_before_torch_is_loaded(command):
    assert spins(f"runpy.run_module('dpengine.{command}', run_name='__main__')") == "1000"


@pytest.mark.parametrize(
    ("variables", "left"),
    [({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
    ids=["spin count", "wait policy"],
)
def test_what_the_user_has_chosen_stays(variables, left):
    code = "runpy.run_module('dpengine.finetune', run_name='__main__')"
    assert spins(code, **variables) == left


@pytest.mark.parametrize("code", ["import torch", "import dpengine.finetune", "dpengine.Capture"])
def test_the_package_as_a_library_chooses_nothing(code):
    assert spins(f"import dpengine\n{code}") == "None"


def test_the_package_loads_torch_when_a_name_is_asked_for():
    code = "import dpengine, sys; print(any(m in sys.modules for m in ('torch', 'numpy')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_public_name_is_there():
    import dpengine

    assert {getattr(dpengine, name).__name__ for name in dpengine.__all__} == set(dpengine.__all__)
    assert set(dpengine.__all__) <= set(dir(dpengine))
    with pytest.raises(AttributeError, match="no attribute 'Adam'"):
        _ = dpengine.Adam

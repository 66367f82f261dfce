"""Imports point down, and what must not be needed is not imported."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STANDARD = sys.stdlib_module_names

FILES = [file for name in ("kernels", "models", "dpengine") for file in (ROOT / name).glob("*.py")]
GPU = list((ROOT / "kernels" / "gpu").glob("*.py"))
LAYERS = list((ROOT / "dpengine" / "layers").glob("*.py"))
UPDATE = list((ROOT / "dpengine" / "update").glob("*.py"))
ACCOUNTING = list((ROOT / "dpengine" / "accounting").glob("*.py"))
DROPIN = list((ROOT / "dpengine" / "dropin").glob("*.py"))
AUDITING = list((ROOT / "dpengine" / "auditing").glob("*.py"))

ALLOWED = {
    "kernels": {"torch", "triton"},
    "models": {
        "torch",
        "diffusers",
        "peft",
        "numpy",
        "matplotlib",
        "safetensors",
        "scipy",
        "PIL",
        "tqdm",
    },
    "dpengine": {
        "torch",
        "diffusers",
        "peft",
        "numpy",
        "scipy",
        "prv_accountant",
        "safetensors",
        "cryptography",
        "huggingface_hub",
        "sklearn",
        "matplotlib",
        "tyro",
        "tqdm",
        "PIL",
    },
}
NO_TRITON = (
    *("checks", "cost", "ops", "reference"),
    *("gpu/__init__", "gpu/library", "gpu/operators", "gpu/tiling"),
)
NO_TORCH = (
    "digests",
    "durable",
    "ledger",
    "plan",
    "secure_random",
    "errors",
    "settings",
    "threads",
)


def imports(file: Path) -> tuple[set[str], set[str]]:
    """Top-level names of the packages that a file imports, and the siblings it imports."""
    outside, inside = set(), set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            outside.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            inside |= {name.split(".")[0] for name in names}
    return outside - STANDARD, inside


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_layer_imports_only_what_is_below_it(file):
    outside, inside = imports(file)
    assert outside <= ALLOWED[file.parent.name]
    siblings = {path.stem for path in file.parent.glob("*.py")}
    folders = {"kernels", "models", "layers", "update", "accounting", "dropin", "auditing"}
    below = {"dpengine": folders, "kernels": {"gpu"}}.get(file.parent.name, set())
    assert inside <= siblings | below


@pytest.mark.parametrize("file", LAYERS, ids=lambda file: f"layers/{file.stem}")
def test_the_rules_of_layers_know_nothing_of_batches_and_privacy(file):
    outside, inside = imports(file)
    assert outside <= {"torch", "peft"}
    assert inside <= {path.stem for path in LAYERS} | {"kernels"}


@pytest.mark.parametrize("file", UPDATE, ids=lambda file: f"update/{file.stem}")
def test_what_becomes_of_noised_gradients_sees_nothing_private(file):
    outside, inside = imports(file)
    assert outside <= {"torch"}
    assert inside <= {path.stem for path in UPDATE} | {"errors"}


@pytest.mark.parametrize("file", ACCOUNTING, ids=lambda file: f"accounting/{file.stem}")
def test_accounting_is_arithmetic_on_plans(file):
    outside, inside = imports(file)
    assert outside <= {"numpy", "scipy", "prv_accountant", "dp_accounting"}
    # What a second library says is one file's business.
    assert "dp_accounting" not in outside or file.stem == "library"
    assert inside <= {path.stem for path in ACCOUNTING} | {"errors", "plan", "secure_random"}


@pytest.mark.parametrize("file", DROPIN, ids=lambda file: f"dropin/{file.stem}")
def test_the_drop_in_stands_on_the_mechanism_and_not_on_the_commands(file):
    outside, inside = imports(file)
    assert outside <= {"torch", "numpy", "safetensors"}
    commands = {"finetune", "prepare", "trainer", "engine", "settings", "data", "report", "cli"}
    assert not inside & commands


def test_the_mechanism_does_not_know_the_drop_in():
    for file in FILES:
        if file.parent.name == "dpengine" and file.stem != "__init__":
            assert "dropin" not in imports(file)[1], file.stem


@pytest.mark.parametrize("name", NO_TRITON)
def test_what_must_work_without_triton_does_not_import_it(name):
    assert "triton" not in imports(ROOT / "kernels" / f"{name}.py")[0]


@pytest.mark.parametrize("file", GPU, ids=lambda file: f"gpu/{file.stem}")
def test_a_kernel_knows_neither_its_specification_nor_its_dispatch(file):
    outside, inside = imports(file)
    assert outside <= {"torch", "triton"}
    assert not inside & {"ops", "cost"}
    if file.stem not in ("library", "operators"):
        assert not inside & {"library", "operators", "reference"}


@pytest.mark.parametrize("name", NO_TORCH)
def test_accounting_and_its_kin_do_not_import_torch(name):
    assert "torch" not in imports(ROOT / "dpengine" / f"{name}.py")[0]


def test_no_module_imports_itself_through_others():
    """A cycle among the modules of dpengine would make the layers meaningless."""
    graph = {f.stem: imports(f)[1] for f in FILES if f.parent.name == "dpengine"}
    graph.pop("__init__")
    graph |= {"layers": {"kernels"}, "update": {"errors"}}
    graph["accounting"] = {"errors", "plan", "secure_random"}
    for name, files in (("dropin", DROPIN), ("auditing", AUDITING)):
        graph[name] = set.union(*(imports(file)[1] for file in files)) & set(graph)
    done: set[str] = set()
    while len(done) < len(graph):
        ready = [
            n for n, below in graph.items() if n not in done and not (below & set(graph) - done)
        ]
        assert ready, f"import cycle among {sorted(set(graph) - done)}"
        done.update(ready)


def python(code: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )


def test_dpengine_imports_without_triton(tmp_path):
    code = "import sys; sys.modules['triton'] = None; import dpengine, dpengine.finetune"
    result = python(code, tmp_path)
    assert result.returncode == 0, result.stderr


def test_an_installed_kernels_package_wins_over_the_folder(tmp_path):
    """From the repository root, `import kernels` finds the one that is installed."""
    stub = tmp_path / "site" / "kernels"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("from .get import get_kernel\n")
    (stub / "get.py").write_text("get_kernel = 'the installed one'\n")
    code = (
        f"import sys; sys.path.append({str(stub.parent)!r}); import kernels, kernels.get; "
        "print(kernels.get_kernel, kernels.__file__); import dpengine.kernels; "
        "print(dpengine.kernels.ops.clip_factors.__name__)"
    )
    result = python(code, ROOT)
    assert result.stdout.splitlines() == [
        f"the installed one {stub / '__init__.py'}",
        "clip_factors",
    ]


def test_without_an_installed_kernels_package_its_names_are_missing():
    result = python("import kernels; from kernels import get_kernel", ROOT)
    assert "ImportError: cannot import name 'get_kernel'" in result.stderr


def test_transformers_imports_from_the_repository_root():
    """It looks for a package named `kernels` and must not take the folder for it."""
    code = "from transformers.utils import is_kernels_available as f; print(f())"
    result = python(code, ROOT)
    assert result.stdout.strip() == "False", result.stderr


def test_nothing_is_read_or_written_as_objects():
    """No module of the three packages knows pickle or one of its kin, whatever wraps it."""
    banned = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    of_torch = {"load", "save", "hub", "package"}
    files = [
        file for name in ("kernels", "models", "dpengine") for file in (ROOT / name).rglob("*.py")
    ]
    assert len(files) > 60
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            assert not objects(node, banned, of_torch), f"{file}:{node.lineno}"


def objects(node: ast.AST, banned: set[str], of_torch: set[str]) -> bool:
    """Whether ``node`` imports or calls what can make objects of bytes."""
    if isinstance(node, ast.Import):
        return any(set(alias.name.split(".")) & banned for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        names = {alias.name for alias in node.names}
        parts = set((node.module or "").split("."))
        return bool((parts | names) & banned) or (parts == {"torch"} and bool(names & of_torch))
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.value.id == "torch" and node.attr in of_torch
    if isinstance(node, ast.Call):
        # numpy.load refuses objects unless it is told otherwise.
        given = {k.arg: k.value for k in node.keywords}
        told = given.get("allow_pickle", ast.Constant(False))
        of_hub = given.get("use_safetensors", ast.Constant(True))
        allowed = ast.unparse(told) != "False" or ast.unparse(of_hub) != "True"
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        loads = name in ("from_pretrained", "load_lora_weights")
        return allowed or (loads and "use_safetensors" not in given)
    return False


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import torch.multiprocessing.pickle",
        "from torch import load",
        "torch.load(f)",
        "f = torch.save",
        "np.load(f, allow_pickle=True)",
        "np.load(f, allow_pickle=flag)",
        "pipeline.load_lora_weights(folder)",
        "Pipeline.from_pretrained(f, use_safetensors=None)",
    ],
)
def test_reading_objects_would_be_seen(code):
    nodes = ast.walk(ast.parse(code))
    assert any(objects(node, {"pickle"}, {"load", "save"}) for node in nodes)

"""Imports point down, and what must not be needed is not imported."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STANDARD = sys.stdlib_module_names

FOLDERS: dict[str, tuple[str, str]] = {
    # Each folder, from the lowest: what it imports of other projects, and what of this one.
    "errors": ("", ""),
    "threads": ("", ""),
    "kernels.gpu": ("torch triton", "kernels.reference kernels.checks"),
    "kernels": ("torch", "kernels.gpu"),
    "mechanism": ("torch numpy cryptography", "errors kernels"),
    "option_types": ("tyro", "errors"),
    "settings": ("tyro", "errors option_types mechanism"),
    "accounting": (
        "numpy scipy prv_accountant dp_accounting",
        "errors mechanism.plan mechanism.secure_random",
    ),
    "capture.layers": ("torch peft", "kernels"),
    "capture": ("torch numpy", "errors kernels mechanism capture.layers"),
    "optim.update": ("torch", "errors"),
    "optim": ("torch", "errors mechanism capture optim.update"),
    "run": ("torch safetensors tqdm", "errors settings mechanism accounting"),
    "models": (
        "torch diffusers peft transformers numpy scipy PIL matplotlib safetensors huggingface_hub "
        "tqdm",
        "errors run",
    ),
    "data": ("torch numpy sklearn PIL", "errors settings mechanism models"),
    "execution": ("torch diffusers", "errors settings mechanism capture models"),
    "evaluation": ("torch numpy sklearn PIL matplotlib", "errors settings data models run"),
    "dropin": (
        "torch numpy",
        "errors kernels mechanism accounting data capture capture.layers optim run",
    ),
    "auditing": ("torch numpy scipy", "errors mechanism accounting capture optim"),
    "training": (
        "torch diffusers numpy",
        "errors settings mechanism accounting data capture optim optim.update run models execution "
        "evaluation",
    ),
    "cli": ("tyro diffusers safetensors", "errors"),
    "commands": (
        "torch numpy matplotlib safetensors tyro",
        "errors threads settings cli mechanism accounting data capture run models execution "
        "evaluation training auditing",
    ),
}
"""What stands in a line stands above all that it imports: there is no way back up."""

COMMANDS = ("account", "audit", "evaluate", "finetune", "generate", "verify")
NO_TRITON = (
    *("checks", "cost", "ops", "reference"),
    *("gpu/__init__", "gpu/library", "gpu/operators", "gpu/tiling"),
)
NO_TORCH = (
    *("errors", "settings", "threads"),
    *(f"mechanism/{n}" for n in ("__init__", "plan", "private", "secure_random", "units")),
    *(f"run/{name}" for name in ("__init__", "digests", "durable", "ledger")),
)


def files() -> list[Path]:
    """All modules of the package, wherever their folder stands."""
    tops = ("kernels", "models", "dpengine")
    return [file for top in tops for file in sorted((ROOT / top).rglob("*.py"))]


def folder_of(file: Path) -> str:
    """The line of ``FOLDERS`` that a module belongs to; of the package itself `__init__`."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "dpengine" else parts
    if len(parts) > 1:
        return ".".join(parts[:-1])
    return "commands" if parts[0] in COMMANDS else parts[0]


def imports(file: Path) -> tuple[set[str], set[str]]:
    """The other projects that a file imports, and the modules of this one, dotted from its root."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    package = parts[1:-1] if parts[0] == "dpengine" else parts[:-1]
    outside, inside = set(), set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            outside.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            dotted = ".".join(filter(None, base))
            inside |= {f"{dotted}.{alias.name}".lstrip(".") for alias in node.names}
    return outside - STANDARD, inside


def lies_in(module: str, folder: str) -> bool:
    return f"{module}.".startswith(f"{folder}.")


MODULES = [file for file in files() if folder_of(file) != "__init__"]


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_folder_imports_only_what_is_below_it(file):
    folder = folder_of(file)
    outside, inside = imports(file)
    others, below = map(str.split, FOLDERS[folder])
    assert outside <= set(others)
    strangers = {
        module
        for module in inside
        if not lies_in(module, folder) and not any(lies_in(module, name) for name in below)
    }
    assert not strangers


def test_the_lines_of_the_table_are_in_order():
    """A folder may import those of earlier lines alone; kernels and their operators are one."""
    names = list(FOLDERS)
    for number, (name, (_, below)) in enumerate(FOLDERS.items()):
        if name == "kernels.gpu":
            continue
        above = set(names[number:])
        assert not [n for n in below.split() if n in above], name


def test_every_folder_is_in_the_table():
    assert {folder_of(file) for file in MODULES} == FOLDERS.keys()
    assert {file.stem for file in MODULES if folder_of(file) == "commands"} == set(COMMANDS)


def test_the_second_library_of_accounting_is_one_files_business():
    using = {file.stem for file in MODULES if "dp_accounting" in imports(file)[0]}
    assert using == {"library"}


@pytest.mark.parametrize("name", NO_TRITON)
def test_what_must_work_without_triton_does_not_import_it(name):
    assert "triton" not in imports(ROOT / "kernels" / f"{name}.py")[0]


def test_a_kernel_knows_neither_its_specification_nor_its_dispatch():
    for file in (ROOT / "kernels" / "gpu").glob("*.py"):
        inside = {module.split(".")[-1] for module in imports(file)[1]}
        assert not inside & {"ops", "cost"}
        if file.stem not in ("library", "operators"):
            assert not inside & {"library", "operators", "reference"}, file.stem


@pytest.mark.parametrize("name", NO_TORCH)
def test_accounting_and_its_kin_do_not_import_torch(name):
    assert "torch" not in imports(ROOT / "dpengine" / f"{name}.py")[0]


@pytest.mark.parametrize("name", ["accounting", "run.ledger", "mechanism.plan", "settings"])
def test_what_plans_and_counts_runs_without_torch(name, tmp_path):
    code = f"import sys, dpengine.{name}; assert 'torch' not in sys.modules"
    result = python(code, tmp_path)
    assert result.returncode == 0, result.stderr


def test_no_module_imports_itself_through_others():
    """Within a folder as well as among folders."""
    paths = {}
    for file in files():
        parts = file.relative_to(ROOT).with_suffix("").parts
        parts = parts[1:] if parts[0] == "dpengine" else parts
        paths[".".join(parts).removesuffix(".__init__")] = file
    graph = {}
    for name, file in paths.items():
        targets = {m if m in paths else m.rpartition(".")[0] for m in imports(file)[1]}
        # A package's door imports its rooms, which import one another directly.
        graph[name] = {t for t in targets if t in paths and file.stem != "__init__"} - {name}
    done: set[str] = set()
    while len(done) < len(graph):
        ready = [n for n, below in graph.items() if n not in done and not below - done]
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


def test_draws_for_a_loop_of_ones_own_load_no_readers_of_data(tmp_path):
    code = (
        "import sys, dpengine; dpengine.secure_normal((2,)); "
        "print(*{'PIL', 'sklearn', 'dpengine.data.records'} & set(sys.modules))"
    )
    result = python(code, tmp_path)
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stderr


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

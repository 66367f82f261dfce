"""No generator but ours in the noise path: read from the sources, imports followed.

`torch.randn` and `tl.randn` stop near 5.7 standard deviations, NumPy's and Python's generators can
be seeded, and whoever knows a seed subtracts the noise.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
ROOTS = (
    "mechanism/noise mechanism/secure_random mechanism/sampling mechanism/clipping "
    "mechanism/adaptive mechanism/step mechanism/batches data/draws optim/optimizer optim/sources "
    "optim/update/__init__ training/loop training/state execution/passes capture/capture "
    "capture/slots capture/layers/__init__ dropin/loader dropin/privacy_engine "
    "dropin/memory_manager dropin/checkpointing"
)
KERNELS = ("ops", "reference", "gpu/library", "gpu/noise")
NAMES = {
    "torch": "rand randn randint randperm rand_like randn_like randint_like normal bernoulli "
    "multinomial poisson distributions",
    "numpy": "random",
    "triton.language": "rand rand4x randn randn4x randint randint4x philox",
}
BANNED = {f"{package}.{name}" for package, names in NAMES.items() for name in names.split()}
MODULES = {"random", "numpy.random", "torch.distributions"}
_DRAWING = (
    "normal_ uniform_ random_ bernoulli_ exponential_ cauchy_ log_normal_ geometric_ "
    "kaiming_uniform_ kaiming_normal_ xavier_uniform_ xavier_normal_ trunc_normal_ "
    "rand randn rand_like randn_like randint randperm multinomial default_rng standard_normal"
)
METHODS = set(_DRAWING.split())
PUBLIC = {f"dpengine/capture/{name}.py" for name in ("comparisons", "probing")}
PUBLIC |= {f"models/{name}.py" for name in ("adapter", "dit", "objective", "pipeline")}
"""Draw what is public: initial weights, synthetic rows for checks, images of released weights."""


def aliases(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for, as a dotted path."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                top = name.name.split(".")[0]
                found[name.asname or top] = name.name if name.asname else top
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for name in node.names:
                found[name.asname or name.name] = f"{node.module}.{name.name}"
    return found


def dotted(node: ast.AST, known: dict[str, str]) -> str | None:
    """The path of an expression like ``nr.random.normal``, its first name looked up."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        base = dotted(node.value, known)
        return base and f"{base}.{node.attr}"
    return None


def is_banned(path: str) -> bool:
    parts = path.split(".")
    starts = {".".join(parts[: end + 1]) for end in range(len(parts))}
    return bool(starts & (BANNED | MODULES))


def generators(source: str) -> set[str]:
    """Generators that ``source`` imports or uses."""
    tree = ast.parse(source)
    known = aliases(tree)
    paths = set(known.values()) | {
        f"{node.module}.*"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*" and node.level == 0
    }
    paths |= {path for node in ast.walk(tree) if (path := dotted(node, known))}
    methods = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)} & METHODS
    return {path for path in paths if is_banned(path)} | methods


def imported(file: Path) -> set[Path]:
    """The files of this project that ``file`` imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        folder = file.parent
        for _ in range(node.level - 1):
            folder = folder.parent
        path = (node.module or "").split(".")
        if folder == ROOT / "dpengine" and path[0] in ("kernels", "models"):
            folder = ROOT
        base = folder.joinpath(*filter(None, path))
        names = [base / alias.name for alias in node.names]
        for candidate in (base, *names):
            for option in (candidate.with_suffix(".py"), candidate / "__init__.py"):
                if option.is_file():
                    found.add(option)
    return found


def noise_path() -> set[Path]:
    """The roots and all that they import inside of the project."""
    waiting = [ROOT / "dpengine" / f"{name}.py" for name in ROOTS.split()]
    waiting += [ROOT / "kernels" / f"{name}.py" for name in KERNELS]
    found: set[Path] = set()
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += imported(file)
    return found


def test_the_noise_path_uses_no_generator_but_its_own():
    used = {
        str(file.relative_to(ROOT)): names
        for file in noise_path()
        if (names := generators(file.read_text(encoding="utf-8")))
    }
    assert not {file: names for file, names in used.items() if file not in PUBLIC}


def test_the_noise_path_reaches_every_layer_below():
    names = {str(file.relative_to(ROOT)) for file in noise_path()}
    assert {
        "dpengine/mechanism/noise.py",
        "dpengine/optim/wrapper.py",
        "dpengine/capture/announcements.py",
        "dpengine/optim/update/filters.py",
        "dpengine/capture/layers/fallback.py",
        "kernels/gpu/noise.py",
        "kernels/gpu/tiles.py",
    } <= names
    assert len(names) > 50


PLANTED = {
    "import torch\nz = torch.randn(3)": "torch.randn",
    "import torch as t\nz = t.randn_like(x)": "torch.randn_like",
    "from torch import randn as r\nz = r(3)": "torch.randn",
    "from torch import normal": "torch.normal",
    "import torch\nz = torch.empty(3).normal_()": "normal_",
    "z = self.backend.randn(3)": "randn",
    "z = x.uniform_()": "uniform_",
    "import torch.nn.init\ntorch.nn.init.xavier_normal_(x)": "xavier_normal_",
    "import torch.distributions as d\nd.Normal(0, 1)": "torch.distributions",
    "from torch.distributions import Normal": "torch.distributions.Normal",
    "import numpy as np\nz = np.random.normal(3)": "numpy.random.normal",
    "import numpy.random as nr\nz = nr.rand(3)": "numpy.random",
    "from numpy import random": "numpy.random",
    "from numpy.random import default_rng as f": "numpy.random.default_rng",
    "import numpy as np\nf = np.random": "numpy.random",
    "import triton.language as tl\nz = tl.randn(0, x)": "triton.language.randn",
    "import triton.language as tl\nz = tl.rand(0, x)": "triton.language.rand",
    "from triton.language import randn4x": "triton.language.randn4x",
    "import triton\nz = triton.language.randint(0, x)": "triton.language.randint",
    "import random\nz = random.gauss(0, 1)": "random",
    "import random as secret": "random",
    "from random import gauss": "random.gauss",
    "def f():\n    import random": "random",
    "from numpy.random import *": "numpy.random.*",
}


@pytest.mark.parametrize("source", PLANTED, ids=lambda source: source.splitlines()[0])
def test_a_planted_generator_is_seen(source):
    assert PLANTED[source] in generators(source)


def test_what_is_secret_or_no_generator_is_let_through():
    source = (
        "import torch\nimport numpy as np\nfrom .secure_random import SecureRandom\n"
        "def f(random: SecureRandom):\n    return random.words(3), random.uniform(3)\n"
        "with torch.random.fork_rng():\n    torch.get_rng_state(), np.unique(x), torch.where(x)\n"
    )
    assert generators(source) == set()

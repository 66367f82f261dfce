"""Compare what is inside a wheel with what the repository says belongs there.

python .ci/wheel.py DIST.whl
"""

import subprocess
import sys
import zipfile

MAPPED = {"kernels/": "dpengine/kernels/", "models/": "dpengine/models/", "dpengine/": "dpengine/"}


def belongs(path: str) -> bool:
    """Whether a tracked file is installed: modules, the mark of types, and base weights."""
    return path.endswith((".py", "/py.typed")) or path.startswith("models/weights/")


def main(wheel: str) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", *MAPPED], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    expected = {
        target + path.removeprefix(folder)
        for path in tracked
        for folder, target in MAPPED.items()
        if path.startswith(folder) and belongs(path)
    }
    names = zipfile.ZipFile(wheel).namelist()
    info = {name for name in names if ".dist-info/" in name}
    found = set(names) - info
    if found != expected:
        raise SystemExit(
            f"missing in the wheel: {sorted(expected - found)}; foreign: {sorted(found - expected)}"
        )
    if not any(name.endswith("/licenses/LICENSE") for name in info):
        raise SystemExit("the wheel has no licence")
    print(f"{wheel}: {len(found)} files, all that belong there and no others")


if __name__ == "__main__":
    main(sys.argv[1])

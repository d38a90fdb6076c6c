"""Builds the source distribution and the wheel into dist, and tries the wheel: see ``make dist``.

The wheel is built from the source distribution, unpacked in an empty folder, so it tests both.
``python tools/dist.py torch==2.13.0`` names the torch of the new environment that it is tried in.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from zipfile import ZipFile

import torch

from repository import REPOSITORY

DIST = REPOSITORY / "dist"
REQUIRED = ("fastnn/__init__.py", "fastnn/py.typed", "fastnn/_build_info.json")

# Run in an empty folder, so that it imports what has been installed.
SMOKE = """
import fastnn, torch
from torch import nn

assert fastnn.is_available(), fastnn._extension.unavailable_reason

def train(fuse, sgd):
    torch.manual_seed(0)
    model = fuse(nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5)))
    loss_fn = fuse(nn.CrossEntropyLoss())
    optimizer = sgd(model.parameters(), lr=0.1, momentum=0.9)
    x, target = torch.randn(64, 20), torch.arange(64) % 5
    losses = []
    for _ in range(20):
        loss = loss_fn(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)

ours = train(fastnn.fuse, fastnn.optim.SGD)
stock = train(lambda module: module, torch.optim.SGD)
# Twenty steps of float32, in which the order of the sums differs.
torch.testing.assert_close(ours, stock, rtol=1e-4, atol=0)
assert ours[-1] < ours[0] / 2
print(f"trained: loss {ours[0]:.3f} -> {ours[-1]:.3f}, as with stock PyTorch")
"""


def main(requirement: str) -> None:
    shutil.rmtree(DIST, ignore_errors=True)
    print("--- building (some minutes)", flush=True)
    # Without --wheel and --sdist, the wheel is built from the unpacked source distribution.
    os.environ["FASTNN_LOCAL_VERSION"] = tag_of(torch.__version__)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", DIST, quiet=True)
    (wheel,) = DIST.glob("*.whl")
    check_contents(wheel)
    with TemporaryDirectory() as folder:
        print(f"--- installing {wheel.name} and {requirement} into a new environment", flush=True)
        python = make_environment(Path(folder) / "venv")
        run(python, "-m", "pip", "install", "--quiet", requirement, wheel)
        empty = Path(folder) / "empty"
        empty.mkdir()
        # -I ignores PYTHONPATH. Without the extension the import warns.
        run(python, "-I", "-W", "error::RuntimeWarning", "-c", SMOKE, cwd=empty)
        run(python, "-I", "-m", "fastnn.env", cwd=empty)
    print("\n".join(f"dist/{path.name}" for path in sorted(DIST.iterdir())))


def tag_of(torch_version: str) -> str:
    """The local version of a wheel for this torch."""
    return f"torch{torch_version.replace('+', '.')}"


def run(*command: str | Path, cwd: Path = REPOSITORY, quiet: bool = False) -> None:
    """Runs a command; if it fails, ends the program with the command's output."""
    output = subprocess.PIPE if quiet else None
    process = subprocess.run(
        [*map(str, command)], cwd=cwd, stdout=output, stderr=subprocess.STDOUT, text=True
    )
    if process.returncode != 0:
        sys.exit(f"{process.stdout or ''}\ndist.py: {' '.join(map(str, command[:4]))} … failed")


def check_contents(wheel: Path) -> None:
    """Checks that it holds the package, its extension and its metadata, and nothing else."""
    with ZipFile(wheel) as archive:
        names = archive.namelist()
        extensions = [name for name in names if name.endswith(".so")]
        problems = [f"{path} is missing" for path in REQUIRED if path not in names]
        if len(extensions) != 1 or not extensions[0].startswith("fastnn/_C."):
            problems.append(f"expected one extension, got {extensions}")
        problems += [f"{name} should not be in it" for name in names if not is_ours(name)]
        if problems:
            sys.exit("\n".join([f"dist.py: {wheel.name}:", *problems]))
        info = json.loads(archive.read("fastnn/_build_info.json"))
    if f"+{tag_of(info['torch'])}-" not in wheel.name:
        sys.exit(f"dist.py: {wheel.name} does not name torch {info['torch']}, which it is for")
    cuda = "with" if info["cuda"] else "without"
    print(f"{wheel.name}: for torch {info['torch']}, {cuda} CUDA", flush=True)


def is_ours(name: str) -> bool:
    """Whether the file is the wheel's own record or in one of fastnn's packages."""
    path = PurePosixPath(name)
    in_package = (REPOSITORY / path.parent / "__init__.py").exists()
    return path.parts[0].endswith(".dist-info") or (path.parts[0] == "fastnn" and in_package)


def make_environment(folder: Path) -> Path:
    """A new virtual environment's Python."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


if __name__ == "__main__":
    main(*sys.argv[1:])

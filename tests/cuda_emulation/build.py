"""Builds fastnn's extension with the CUDA launchers and kernels in place of the CPU's, emulated.

It lies outside the package, in ``build/``; only the tests load it (see chosen.py).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import torch
from torch.utils import cpp_extension

REPOSITORY = Path(__file__).resolve().parents[2]
EMULATION = REPOSITORY / "tests/cuda_emulation"
FOLDER = REPOSITORY / "build/cuda_emulation/extension"
LIBRARY = FOLDER / "_C.so"

CXX = os.environ.get("CXX") or "g++"
INCLUDES = [
    f"-I{EMULATION / 'include'}",  # first: its headers stand in for CUDA's
    f"-I{REPOSITORY / 'csrc'}",
    *[f"-isystem {path}" for path in cpp_extension.include_paths()],
    f"-isystem {sysconfig.get_paths()['include']}",
]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas"]
# Not -O2: GCC 12's vectorizer then takes a load that is aligned in one branch for aligned in both.
FLAGS = [
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-DTORCH_EXTENSION_NAME=_C",
]
LIBRARIES = ["c10", "torch", "torch_cpu", "torch_python"]


def write_if_new(path: Path, text: str) -> None:
    """Keeps the time of a file that would not change, and with it what was built from it."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def write_common_sources() -> Path:
    """The sources that CPU and CUDA share as one, so that torch's headers are compiled once."""
    folders = ("csrc/ops", "csrc/autograd", "csrc/python")
    sources = [path for folder in folders for path in sorted((REPOSITORY / folder).glob("*.cpp"))]
    path = FOLDER / "common.cpp"
    write_if_new(path, "".join(f'#include "{source}"\n' for source in sources))
    return path


def write_ninja_file() -> None:
    launchers = sorted((REPOSITORY / "csrc/cuda").glob("*.cu"))
    sources = [write_common_sources(), *launchers, *sorted(EMULATION.glob("*.cpp"))]
    lines = [
        "rule compile",
        f"  command = {CXX} {' '.join([*FLAGS, *WARNINGS, *INCLUDES])} "
        " -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
        "rule link",
        f"  command = {CXX} -shared $in -o $out {link_flags()}",
    ]
    lines += [f"build {source.name}.o: compile {source}" for source in sources]
    objects = " ".join(f"{source.name}.o" for source in sources)
    lines.append(f"build {LIBRARY.name}: link {objects}")
    write_if_new(FOLDER / "build.ninja", "\n".join(lines) + "\n")


def link_flags() -> str:
    folders = [f"-L{path}" for path in cpp_extension.library_paths()]
    return " ".join([*folders, *[f"-l{name}" for name in LIBRARIES], "-pthread"])


def build() -> None:
    """Compiles what has changed."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_ninja_file()
    ninja = [sys.executable, "-m", "ninja", "-C", str(FOLDER), "--quiet"]
    jobs = os.environ.get("MAX_JOBS")
    subprocess.run([*ninja, *(["-j", jobs] if jobs else [])], check=True)


def load() -> ModuleType:
    """Builds the extension and puts it where ``import fastnn`` finds it, as its own."""
    if "fastnn" in sys.modules:
        raise RuntimeError("fastnn has been imported with its own extension already")
    build()
    spec = importlib.util.spec_from_file_location("fastnn._C", LIBRARY)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fastnn._C"] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    build()
    print(f"{LIBRARY.relative_to(REPOSITORY)}, for torch {torch.__version__}")

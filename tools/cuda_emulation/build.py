"""Builds fastnn's extension with the CUDA launchers and kernels in place of the CPU's, emulated.

It is outside the package, in ``build/``; only the tests load it (see chosen.py). There are two: one
with the kernels as the host's compiler compiles them, and one as nvcc did, that is, with the PTX of
a built library, translated (see ptx/).
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import torch
from torch.utils import cpp_extension

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cuda_emulation.ptx.translate import COMPILER_FLAGS, translate
from repository import REPOSITORY

EMULATION = REPOSITORY / "tools/cuda_emulation"
FOLDER = REPOSITORY / "build/cuda_emulation"

CXX = os.environ.get("CXX") or "g++"
INCLUDES = [
    f"-I{EMULATION / 'include'}",  # first: its headers stand in for CUDA's
    f"-I{EMULATION}",
    f"-I{REPOSITORY / 'csrc'}",
    *[f"-isystem{path}" for path in cpp_extension.include_paths()],
    f"-isystem{sysconfig.get_paths()['include']}",
]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas"]
# GCC misses the base of defaults if an operator over rows is made with designated initializers.
WARNINGS += ["-Wno-missing-field-initializers"]
# Not -O2: GCC 12's vectorizer then assumes a load that is aligned in one branch aligned in both.
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fopenmp", "-DTORCH_EXTENSION_NAME=_C"]
LIBRARIES = ["c10", "torch", "torch_cpu", "torch_python"]


class Emulation:
    """The extension with the kernels as the host's compiler compiles them."""

    folder = FOLDER / "extension"
    flags = (*FLAGS, "-fvisibility=hidden")

    def sources(self) -> list[Path]:
        launchers = sorted((REPOSITORY / "csrc/cuda").glob("*.cu"))
        return [self.write_common_sources(), *launchers, *sorted(EMULATION.glob("*.cpp"))]

    def write_common_sources(self) -> Path:
        """Joins the sources that CPU and CUDA share: torch's headers are then compiled once."""
        folders = ("csrc/ops", "csrc/autograd", "csrc/python")
        paths = [path for folder in folders for path in sorted((REPOSITORY / folder).glob("*.cpp"))]
        paths.remove(REPOSITORY / "csrc/python/mlp_step.cpp")  # only for the CPU
        path = self.folder / "common.cpp"
        write_if_new(path, "".join(f'#include "{source}"\n' for source in paths))
        return path

    def build(self) -> Path:
        """Compiles what has changed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_if_new(self.folder / "build.ninja", "\n".join(self.ninja_lines()) + "\n")
        ninja = [sys.executable, "-m", "ninja", "-C", str(self.folder), "--quiet"]
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run([*ninja, *(["-j", jobs] if jobs else [])], check=True)
        return self.folder / "_C.so"

    def ninja_lines(self) -> list[str]:
        sources = self.sources()
        compile_command = f"{CXX} {shlex.join([*self.flags, *WARNINGS, *INCLUDES])}"
        return [
            "rule compile",
            f"  command = {compile_command} $more -MMD -MF $out.d -x c++ -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
            "rule link",
            f"  command = {CXX} -shared $in -o $out {link_flags()}",
            *[line for source in sources for line in self.ninja_edge(source)],
            f"build _C.so: link {' '.join(f'{source.name}.o' for source in sources)}",
        ]

    def ninja_edge(self, source: Path) -> list[str]:
        return [f"build {source.name}.o: compile {str(source).replace(' ', '$ ')}"]


class PTXEmulation(Emulation):
    """The extension with the kernels' PTX, from the folder where `extract_ptx` puts it."""

    folder = FOLDER / "ptx"
    # The launchers' kernels are exported: their names lead to those of the PTX.
    flags = (*FLAGS, "-DFASTNN_EMULATION_PTX")

    def sources(self) -> list[Path]:
        runtime = sorted((EMULATION / "ptx").glob("*.cpp"))
        return [*super().sources(), *runtime, *self.write_translations()]

    def write_translations(self) -> list[Path]:
        paths = []
        for module in sorted(self.folder.glob("*.ptx")):
            for i, text in enumerate(translate(module)):
                paths.append(self.folder / f"{module.stem}_{i}.translated.cpp")
                write_if_new(paths[-1], text)
        if not paths:
            sys.exit(f"build.py: there is no PTX in {self.folder}; make cuda-check puts it there")
        return paths

    def ninja_edge(self, source: Path) -> list[str]:
        edge = super().ninja_edge(source)
        if source.name.endswith(".translated.cpp"):
            edge.append(f"  more = {' '.join(COMPILER_FLAGS)}")
        return edge


def write_if_new(path: Path, text: str) -> None:
    """Leaves an unchanged file alone, so that nothing is rebuilt from it."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def link_flags() -> str:
    folders = [f"-L{path}" for path in cpp_extension.library_paths()]
    return shlex.join([*folders, *[f"-l{name}" for name in LIBRARIES], "-pthread"])


def load(emulation: Emulation) -> ModuleType:
    """Builds the extension and puts it where ``import fastnn`` finds it as its own."""
    if "fastnn" in sys.modules:
        raise RuntimeError("fastnn has been imported with its own extension already")
    spec = importlib.util.spec_from_file_location("fastnn._C", emulation.build())
    module = importlib.util.module_from_spec(spec)
    sys.modules["fastnn._C"] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    library = Emulation().build()
    print(f"{library.relative_to(REPOSITORY)}, for torch {torch.__version__}")

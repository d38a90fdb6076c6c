"""Builds fastnn's extension. ``FASTNN_CUDA=auto|0|1`` chooses whether the CUDA part is built."""

from __future__ import annotations

import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

ROOT = Path(__file__).parent
os.chdir(ROOT)  # pip may run us from elsewhere; sources are named relative to the repository


def fail(sentence: str) -> None:
    """Ends the build with one sentence that says what to do."""
    sys.exit(f"\nfastnn: {sentence}\n")


try:
    import torch
except ImportError:
    fail(
        "torch can't be imported while building; install it and build without isolation: "
        "`pip install torch==2.13.0 setuptools ninja && pip install --no-build-isolation .`"
    )


CUDA = runpy.run_path("csrc/cuda/toolkit.py")


def cuda_toolkit() -> Any:
    """The toolkit to build the CUDA part with, or None; as FASTNN_CUDA says."""
    choice = os.environ.get("FASTNN_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        fail(f"FASTNN_CUDA must be auto, 0 or 1, not {choice!r}.")
    if choice == "0":
        return None
    try:
        return CUDA["find"](torch.__version__, torch.version.cuda, os.environ)
    except CUDA["NotBuildable"] as reason:
        if choice == "1":
            fail(str(reason))
        if torch.version.cuda is not None:
            print(f"fastnn: built without CUDA: {reason}")
        return None


TOOLKIT = cuda_toolkit()
if TOOLKIT is not None:
    # Before torch looks for a toolkit itself, as it does when this is imported:
    os.environ["CUDA_HOME"] = str(TOOLKIT.home)
    os.environ["TORCH_CUDA_ARCH_LIST"] = TOOLKIT.architectures
from torch.utils import cpp_extension  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402

if TOOLKIT is not None:
    try:
        cpp_extension._get_cuda_arch_flags()
    except ValueError as error:  # a name that nvcc knows, or may know, and this torch doesn't
        fail(f"TORCH_CUDA_ARCH_LIST is {TOOLKIT.architectures!r}, which torch refuses: {error}.")

COMMON_FLAGS = ["-std=c++20", "-O3", "-g0", "-Wall", "-Wextra", "-fvisibility=hidden"]
# -fopenmp without linking a runtime: the symbols resolve to the OpenMP runtime that torch itself
# loaded, so that torch.set_num_threads() holds here and no second thread pool is started.
TORCH_FLAGS = [*COMMON_FLAGS, "-fopenmp", "-Wno-unused-parameter"]


# Which instruction sets the kernels are compiled for; their tests read it too.
SIMD = runpy.run_path("csrc/cpu/simd/targets.py")


def simd_targets() -> dict[str, list[str]]:
    return SIMD["targets"](platform.machine())


class BuildFastnn(BuildExtension):
    """Compiles the SIMD kernels with flags of their own, then the extension; records the build."""

    def build_extensions(self) -> None:
        for extension in self.extensions:
            extension.extra_objects += self.build_simd_kernels(compiler_command())
        super().build_extensions()

    def run(self) -> None:
        super().run()
        self.write_build_info(Path("fastnn") if self.inplace else Path(self.build_lib) / "fastnn")

    def build_simd_kernels(self, compiler: list[str]) -> list[str]:
        folder = Path(self.build_temp) / "simd"
        folder.mkdir(parents=True, exist_ok=True)
        outputs = {target: folder / f"kernels_{target}.o" for target in simd_targets()}
        compiles = {
            target: start_simd_compile(compiler, target, output)
            for target, output in outputs.items()
            if not is_up_to_date(output)
        }
        for target, process in compiles.items():
            if process.wait() != 0:
                outputs[target].unlink(missing_ok=True)
                fail(
                    f"{compiler[0]} could not compile {SIMD['SOURCE']} (its message is "
                    "above); a C++20 compiler is needed: GCC 11 or newer."
                )
        return [str(output.resolve()) for output in outputs.values()]

    def write_build_info(self, folder: Path) -> None:
        version = subprocess.run(
            [*compiler_command(), "--version"], capture_output=True, text=True
        ).stdout
        info = {
            "torch": torch.__version__,
            "compiler": version.splitlines()[0],
            "flags": " ".join(TORCH_FLAGS),
            "simd_targets": {k: " ".join(v) for k, v in simd_targets().items()},
            "cuda": TOOLKIT is not None,
            "cuda_toolkit": TOOLKIT.version if TOOLKIT else None,
            "cuda_architectures": TOOLKIT.architectures if TOOLKIT else None,
        }
        (folder / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")


def start_simd_compile(compiler: list[str], target: str, output: Path) -> subprocess.Popen:
    flags = [*COMMON_FLAGS, *SIMD["target_flags"](platform.machine(), target), "-fPIC"]
    dependencies = ["-MMD", "-MF", str(output.with_suffix(".d"))]
    command = [*compiler, *flags, *dependencies, "-c", SIMD["SOURCE"], "-o", str(output)]
    print(" ".join(command))
    return subprocess.Popen(command)


def is_up_to_date(output: Path) -> bool:
    """Whether an object is newer than all that it was compiled from, and how."""
    rule = output.with_suffix(".d")
    if not (output.exists() and rule.exists()):
        return False
    files = rule.read_text().replace("\\\n", " ").partition(":")[2].split()
    files += ["setup.py", "csrc/cpu/simd/targets.py"]
    return all(
        Path(file).exists() and Path(file).stat().st_mtime < output.stat().st_mtime
        for file in files
    )


def compiler_command() -> list[str]:
    """The C++ compiler that torch's build will use: CXX, or c++ or g++."""
    command = os.environ.get("CXX", "").split() or ["c++" if shutil.which("c++") else "g++"]
    if shutil.which(command[0]) is None:
        fail(
            f"no C++ compiler ({command[0]}) was found; install one (Debian and Ubuntu: "
            "`apt install g++`, Fedora: `dnf install gcc-c++`, macOS: `xcode-select --install`) "
            "or name it in CXX."
        )
    return command


def extension() -> Extension:
    folders = ["csrc/ops", "csrc/autograd", "csrc/cpu", "csrc/python"]
    sources = sorted(str(path) for folder in folders for path in Path(folder).glob("*.cpp"))
    arguments = {"include_dirs": [str(ROOT.resolve() / "csrc")]}
    if TOOLKIT is None:
        return CppExtension("fastnn._C", sources, extra_compile_args=TORCH_FLAGS, **arguments)
    sources += sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))
    flags = {"cxx": TORCH_FLAGS, "nvcc": CUDA["FLAGS"]}
    return CUDAExtension("fastnn._C", sources, extra_compile_args=flags, **arguments)


setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildFastnn},
    # A folder that stays, so that a second build compiles only what changed.
    options={"build_ext": {"build_temp": "build/temp"}},
)

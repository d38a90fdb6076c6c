"""Builds fastnn's extension. ``FASTNN_CUDA=auto|0|1`` chooses whether the CUDA part is built."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Thread
from zlib import crc32

import setuptools
from setuptools import Extension, setup

ROOT = Path(__file__).absolute().parent
os.chdir(ROOT)  # pip may run us from elsewhere; sources are named relative to the repository


def fail(sentence: str) -> None:
    """Ends the build with one sentence that says what to do."""
    sys.exit(f"\nfastnn: {sentence}\n")


if int(setuptools.__version__.split(".")[0]) < 77:
    fail(
        f"setuptools {setuptools.__version__} is too old to read pyproject.toml; "
        '`pip install --upgrade "setuptools>=77"`.'
    )
try:
    import torch
except (ImportError, OSError) as error:  # OSError: a library of torch is missing
    fail(
        f"torch can't be imported while building ({error}); install it and build without "
        "isolation: `pip install torch setuptools ninja && pip install --no-build-isolation .`"
    )

OLDEST_TORCH, NEWEST_TRIED_TORCH = (2, 9), (2, 15)
TORCH_VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
if TORCH_VERSION < OLDEST_TORCH:
    fail(f"torch {torch.__version__} is too old; install torch 2.9 or newer, then fastnn.")

# A build fits this torch only: the installed version and the object folder's name include it.
TORCH_TAG = f"torch{torch.__version__.replace('+', '.')}"
BUILD_FOLDER = Path("build", f"{sys.implementation.cache_tag}-{TORCH_TAG}")

# torch runs ninja by name; pip installs it next to the interpreter.
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])


# pip runs this file without its folder on the path.
sys.path.insert(0, str(ROOT))
from build_support import cuda_toolkit, instruction_sets  # noqa: E402


def find_toolkit() -> cuda_toolkit.Toolkit | None:
    """The toolkit for the CUDA part, or None; FASTNN_CUDA decides."""
    choice = os.environ.get("FASTNN_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        fail(f"FASTNN_CUDA must be auto, 0 or 1, not {choice!r}.")
    if choice == "0":
        return None
    try:
        return cuda_toolkit.find(torch.__version__, torch.version.cuda, os.environ)
    except cuda_toolkit.NotBuildable as reason:
        if choice == "1":
            fail(str(reason))
        if torch.version.cuda is not None:
            print(f"fastnn: built without CUDA: {reason}")
        return None


TOOLKIT = find_toolkit()
if TOOLKIT is not None:
    # Set before the import, during which torch looks for a toolkit itself.
    os.environ["CUDA_HOME"] = str(TOOLKIT.home)
    os.environ["TORCH_CUDA_ARCH_LIST"] = TOOLKIT.architectures
from torch.utils import cpp_extension  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402

if TOOLKIT is not None:
    try:
        cpp_extension._get_cuda_arch_flags()
    except ValueError as error:  # a name that nvcc (perhaps) knows and this torch doesn't
        fail(f"TORCH_CUDA_ARCH_LIST is {TOOLKIT.architectures!r}, which torch refuses: {error}.")

COMMON_FLAGS = ["-std=c++20", "-O3", "-g0", "-Wall", "-Wextra", "-fvisibility=hidden"]
# -fopenmp without linking a runtime: the symbols resolve to the OpenMP runtime that torch loaded,
# so torch.set_num_threads() applies here and no second thread pool is started.
TORCH_FLAGS = [*COMMON_FLAGS, "-fopenmp", "-Wno-unused-parameter"]


def simd_targets() -> dict[str, list[str]]:
    return instruction_sets.targets(platform.machine())


class BuildFastnn(BuildExtension):
    """Compiles the SIMD kernels with their own flags, then the extension; records the build."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # A fixed folder, so that the next build only compiles what changed; an editable install
        # would use a new one each time.
        self.build_temp = str(BUILD_FOLDER / "temp")

    def build_extensions(self) -> None:
        for extension in self.extensions:
            extension.extra_objects += self.build_simd_kernels(compiler_command())
        with one_line_per_file():
            super().build_extensions()

    def run(self) -> None:
        if TORCH_VERSION > NEWEST_TRIED_TORCH:
            newest = ".".join(map(str, NEWEST_TRIED_TORCH))
            print(
                f"fastnn: torch {torch.__version__} is newer than {newest}, the newest that fastnn "
                "has been tried with."
            )
        if shutil.which("ninja") is None:
            print("fastnn: ninja was not found; one file is compiled after the other, all anew.")
        compiler_version()  # fails before the first file is compiled
        if len(compiler_command()) > 1:
            make_one_word(compiler_command())
        elif "CXX" in os.environ:
            os.environ["CXX"] = compiler_command()[0]
        super().run()
        self.write_build_info(Path("fastnn") if self.inplace else Path(self.build_lib) / "fastnn")

    def build_simd_kernels(self, compiler: list[str]) -> list[str]:
        folder = Path("build", "simd")
        folder.mkdir(parents=True, exist_ok=True)
        outputs = {target: folder / f"kernels_{target}.o" for target in simd_targets()}
        compiles = {}
        for target, output in outputs.items():
            command = simd_command(compiler, target, output)
            if not is_up_to_date(output, command):
                print(instruction_sets.SOURCE, "for", target, flush=True)
                output.with_suffix(".command").write_text(shlex.join(command))
                compiles[target] = subprocess.Popen(command)
        for target, process in compiles.items():
            if process.wait() != 0:
                outputs[target].unlink(missing_ok=True)
                fail(
                    f"{shlex.join(compiler)} could not compile {instruction_sets.SOURCE} (its "
                    "message is above); a C++20 compiler is needed: GCC 11 or newer."
                )
        return [str(output.resolve()) for output in outputs.values()]

    def write_build_info(self, folder: Path) -> None:
        info = {
            "torch": torch.__version__,
            "python": sys.implementation.cache_tag,
            "compiler": compiler_version(),
            "flags": " ".join(TORCH_FLAGS),
            "simd_targets": {k: " ".join(v) for k, v in simd_targets().items()},
            "cuda": TOOLKIT is not None,
            "cuda_toolkit": TOOLKIT.version if TOOLKIT else None,
            "cuda_architectures": TOOLKIT.architectures if TOOLKIT else None,
        }
        (folder / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")


def simd_command(compiler: list[str], target: str, output: Path) -> list[str]:
    flags = [*COMMON_FLAGS, *instruction_sets.target_flags(platform.machine(), target), "-fPIC"]
    dependencies = ["-MMD", "-MF", str(output.with_suffix(".d"))]
    return [*compiler, *flags, *dependencies, "-c", instruction_sets.SOURCE, "-o", str(output)]


# What ninja prints for each file: its number and a long command.
COMMAND = re.compile(r"(\[\d+/\d+\]) .*(csrc/\S+\.(?:cpp|cu))\b.*")


@contextmanager
def one_line_per_file() -> Iterator[None]:
    """Shortens each command that is printed to its number and file."""
    output = os.dup(1)
    reading, writing = os.pipe()
    os.dup2(writing, 1)
    os.close(writing)

    def shorten() -> None:
        with open(reading, errors="replace") as lines, open(output, "w", buffering=1) as shown:
            for line in lines:
                shown.write(COMMAND.sub(r"\1 \2", line))

    thread = Thread(target=shorten)
    thread.start()
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(output, 1)  # ends the pipe
        thread.join()


def is_up_to_date(output: Path, command: list[str]) -> bool:
    """Whether an object comes from this command and is newer than all of its sources."""
    rule, earlier = output.with_suffix(".d"), output.with_suffix(".command")
    if not (output.exists() and rule.exists() and earlier.exists()):
        return False
    if earlier.read_text() != shlex.join(command):
        return False
    files = rule.read_text().replace("\\\n", " ").partition(":")[2].split()
    return all(
        Path(file).exists() and Path(file).stat().st_mtime < output.stat().st_mtime
        for file in files
    )


@cache
def compiler_command() -> list[str]:
    """The C++ compiler that torch's build will use: CXX, else c++ or g++."""
    try:
        command = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        fail(f"CXX is {os.environ['CXX']!r}, which is no command ({error}).")
    if not command:
        os.environ.pop("CXX", None)  # torch would take an empty CXX as the compiler
        command = ["c++" if shutil.which("c++") else "g++"]
    if os.path.dirname(command[0]):
        command[0] = os.path.abspath(command[0])  # ninja runs in another folder
    if shutil.which(command[0]) is None:
        fail(
            f"no C++ compiler ({command[0]}) was found; install one (Debian and Ubuntu: "
            "`apt install g++`, Fedora: `dnf install gcc-c++`, macOS: `xcode-select --install`) "
            "or name it in CXX."
        )
    return command


@cache
def compiler_version() -> str:
    command = compiler_command()
    try:
        process = subprocess.run([*command, "--version"], capture_output=True, text=True)
    except OSError as error:
        fail(f"the C++ compiler {shlex.join(command)} doesn't start ({error}); name one in CXX.")
    if process.returncode != 0 or not process.stdout:
        fail(f"{shlex.join(command)} does not tell its version; name a C++ compiler in CXX.")
    return process.stdout.splitlines()[0]


def make_one_word(command: list[str]) -> None:
    """Points CXX to a script that runs the command: torch takes CXX as one word."""
    folder = BUILD_FOLDER.resolve() / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    script = f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n'
    program = folder / f"c++-{crc32(script.encode()):08x}"  # another command recompiles everything
    program.write_text(script)
    program.chmod(0o755)
    os.environ["PATH"] = os.pathsep.join([str(folder), os.environ["PATH"]])
    os.environ["CXX"] = program.name
    os.environ["TORCH_NO_COMPILER_WRAPPER"] = "1"  # the command includes ccache if it is wanted


def extension() -> Extension:
    folders = ["csrc/ops", "csrc/autograd", "csrc/cpu", "csrc/python"]
    sources = sorted(str(path) for folder in folders for path in Path(folder).glob("*.cpp"))
    arguments = {"include_dirs": [str(ROOT / "csrc")]}
    if TOOLKIT is None:
        return CppExtension("fastnn._C", sources, extra_compile_args=TORCH_FLAGS, **arguments)
    sources += sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))
    flags = {"cxx": TORCH_FLAGS, "nvcc": cuda_toolkit.FLAGS}
    return CUDAExtension("fastnn._C", sources, extra_compile_args=flags, **arguments)


def version() -> str:
    """fastnn's version, with the torch that it is built for."""
    source = Path("fastnn/__init__.py").read_text()
    own = re.search(r'^__version__ = "(.+)"', source, re.MULTILINE)[1]
    if "sdist" in sys.argv:
        return own
    # pip rejects a source distribution, which has a PKG-INFO, that is built as another version.
    local = os.environ.get("FASTNN_LOCAL_VERSION", "" if Path("PKG-INFO").exists() else TORCH_TAG)
    if not re.fullmatch(r"([a-zA-Z0-9]+([._-][a-zA-Z0-9]+)*)?", local):
        fail(f"FASTNN_LOCAL_VERSION must be letters, digits and dots, not {local!r}.")
    return f"{own}+{local}" if local else own


setup(
    version=version(),
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildFastnn},
    options={"build": {"build_base": str(BUILD_FOLDER)}},
)

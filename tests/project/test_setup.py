"""setup.py: its messages before the first file is compiled, its compiler, its version."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastnn
from repository import REPOSITORY

pytestmark = pytest.mark.cpu_only("the build")


def run(script: str, folder: Path = REPOSITORY, **variables: str) -> subprocess.CompletedProcess:
    """Runs a Python script in which ``setup(...)`` runs setup.py with the given arguments."""
    prelude = f"""
import os, runpy, sys
import setuptools, torch
os.environ.update({variables})
def setup(*arguments):
    sys.argv = ["setup.py", *arguments]
    return runpy.run_path({str(REPOSITORY / "setup.py")!r}, run_name="__main__")
"""
    command = [sys.executable, "-W", "ignore", "-c", prelude + script]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def sentence(script: str, **variables: str) -> str:
    """The sentence that the build ends with."""
    process = run(script, **{"FASTNN_CUDA": "0", **variables})
    assert process.returncode == 1
    # torch may log before it that its CUDA finds no GPU.
    line = process.stderr.strip().splitlines()[-1]
    assert line.startswith("fastnn: ") and line.endswith((".", "`"))
    assert "Traceback" not in process.stderr
    return line


# --- versions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2.8.0", "2.8.1+cu128", "1.13.1"])
def test_torch_that_is_too_old(version):
    message = sentence(f"torch.__version__ = {version!r}; setup('--version')")
    assert f"torch {version} is too old; install torch 2.9 or newer" in message


def test_no_torch():
    message = sentence("sys.modules['torch'] = None; setup('--version')")
    assert "torch can't be imported while building" in message


def test_torch_without_its_libraries(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so: no such file')")
    script = f"sys.modules.pop('torch'); sys.path.insert(0, {str(tmp_path)!r}); setup('--version')"
    assert "can't be imported while building (libcudart.so: no such file)" in sentence(script)


def test_setuptools_that_is_too_old():
    message = sentence("setuptools.__version__ = '65.5.0'; setup('--version')")
    assert "setuptools 65.5.0 is too old" in message and '"setuptools>=77"' in message


@pytest.mark.parametrize("version", ["2.9.0", "2.15.3+cpu", "2.16.0", "3.0.0.dev20270101+cu140"])
def test_torch_that_is_new_enough(version):
    """Versions newer than all that were tried get a one-line warning."""
    process = run(f"torch.__version__ = {version!r}; setup('build_ext')", CXX="false")
    assert "false does not tell its version" in process.stderr
    warnings = [line for line in process.stdout.splitlines() if "newer" in line]
    expected = (
        f"fastnn: torch {version} is newer than 2.15, the newest that fastnn has been tried with."
    )
    assert warnings == ([] if version.startswith(("2.9", "2.15")) else [expected])


def test_the_bounds_are_those_of_the_package_and_of_the_page():
    required = re.search(r'"torch>=([\d.]+)",', (REPOSITORY / "pyproject.toml").read_text())
    page = (REPOSITORY / "docs/install.md").read_text()
    oldest, newest = re.search(r"PyTorch ([\d.]+) to ([\d.]+)", page).groups()
    script = "found = setup('--version'); print(found['OLDEST_TORCH'], found['NEWEST_TRIED_TORCH'])"
    bounds = re.findall(r"\d+", run(script).stdout.splitlines()[-1])
    assert bounds == [*oldest.split("."), *newest.split(".")]
    assert required[1] == oldest


@pytest.mark.parametrize(
    ("torch_version", "tag"),
    [("2.13.0+cpu", "torch2.13.0.cpu"), ("2.15.0", "torch2.15.0"), ("2.11.0a0+git1a2b", None)],
)
def test_the_version_names_the_torch_that_it_is_for(torch_version, tag):
    process = run(f"torch.__version__ = {torch_version!r}; setup('--version')")
    found = process.stdout.splitlines()[-1]
    assert found == f"{fastnn.__version__}+{tag or 'torch2.11.0a0.git1a2b'}"


def test_the_version_of_a_source_distribution_is_fixed(tmp_path):
    """pip rejects one whose version changes while it is built."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "fastnn/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    for name in ("build_support", "csrc"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    (tmp_path / "PKG-INFO").touch()
    own = fastnn.__version__
    for variables, expected in (
        ({}, own),
        ({"FASTNN_LOCAL_VERSION": "torch2.13"}, f"{own}+torch2.13"),
    ):
        command = [sys.executable, "-W", "ignore", "setup.py", "--version"]
        environment = {**os.environ, "FASTNN_CUDA": "0", **variables}
        process = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert process.stdout.splitlines()[-1] == expected


def test_a_local_version_that_is_none():
    message = sentence("setup('--version')", FASTNN_LOCAL_VERSION="my build")
    assert "FASTNN_LOCAL_VERSION must be letters, digits and dots, not 'my build'." in message


# --- tools ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("torch_cuda", "variables", "expected"),
    [
        ("13.0", {"FASTNN_CUDA": "2"}, "FASTNN_CUDA must be auto, 0 or 1, not '2'."),
        (None, {"FASTNN_CUDA": "1"}, "is built without CUDA"),
        ("13.0", {"FASTNN_CUDA": "1", "CUDA_HOME": "/nowhere"}, "no nvcc at /nowhere/bin/nvcc"),
    ],
)
def test_cuda_part_that_can_t_be_built(torch_cuda, variables, expected):
    script = f"torch.version.cuda = {torch_cuda!r}; setup('--version')"
    assert expected in sentence(script, **variables)


def test_without_ninja_a_line_says_so():
    script = """
import shutil
which = shutil.which
shutil.which = lambda name, **options: None if name == "ninja" else which(name, **options)
setup("build_ext")
"""
    process = run(script, FASTNN_CUDA="0", CXX="false")
    assert process.stdout.splitlines()[1:] == [
        "fastnn: ninja was not found; one file is compiled after the other, all anew."
    ]


# --- the compiler ---------------------------------------------------------------------------------


def test_no_compiler():
    message = sentence("setup('build_ext')", CXX="no-such-compiler")
    assert "no C++ compiler (no-such-compiler) was found" in message


@pytest.mark.parametrize("command", ["false", "env no-such-compiler -pipe"])
def test_compiler_that_does_not_run(command):
    assert f"{command} does not tell its version" in sentence("setup('build_ext')", CXX=command)


def test_compiler_that_is_no_command():
    assert "is no command (No closing quotation)" in sentence("setup('build_ext')", CXX='g++ "')


def test_compiler_that_is_no_program(tmp_path):
    program = tmp_path / "compiler"
    program.write_bytes(b"\x7f")
    program.chmod(0o755)
    message = sentence("setup('build_ext')", CXX=str(program))
    assert f"the C++ compiler {program} doesn't start" in message


COMPILER = "found = setup('--version'); print(found['compiler_command'](), os.environ.get('CXX'))"


def test_a_compiler_set_to_nothing_is_as_if_it_were_not_set():
    found = run(COMPILER, FASTNN_CUDA="0", CXX="").stdout.splitlines()[-1]
    assert found in ("['c++'] None", "['g++'] None")


def test_a_compiler_in_a_folder_is_found_from_any_other():
    compiler = shutil.which("g++")
    relative = os.path.relpath(compiler, REPOSITORY)
    assert relative != compiler
    found = run(COMPILER, FASTNN_CUDA="0", CXX=f"{relative} -pipe").stdout.splitlines()[-1]
    assert found.startswith(f"[{os.path.abspath(compiler)!r}, '-pipe']")


def test_kernels_are_compiled_anew_by_another_command(tmp_path):
    output = tmp_path / "kernels.o"
    output.with_suffix(".d").write_text("kernels.o: setup.py\n")
    output.with_suffix(".command").write_text("g++ -O3")
    output.touch()
    script = f"""
is_up_to_date = setup('--version')["is_up_to_date"]
from pathlib import Path
print(*(is_up_to_date(Path({str(output)!r}), command) for command in (["g++", "-O3"], ["g++"])))
"""
    assert run(script, FASTNN_CUDA="0").stdout.splitlines()[-1] == "True False"


# Builds a one-file extension with the command that builds fastnn's.
ONE_FILE = """
setuptools.setup = lambda **options: None
found = setup()
Build = found["BuildFastnn"]
Build.run.__globals__["BUILD_FOLDER"] = type(found["BUILD_FOLDER"])("build")
os.chdir({folder!r})
Build.build_simd_kernels = lambda self, compiler: []
Build.write_build_info = lambda self, folder: print("built by", found["compiler_version"]())
includes = [os.path.abspath("csrc/headers")]
extension = found["CppExtension"]("one", ["csrc/one.cpp"], include_dirs=includes)
setup_again = __import__("distutils.core", fromlist=["setup"]).setup
sys.argv = ["setup.py", "--quiet", "build_ext", "--inplace"]
setup_again(name="one", ext_modules=[extension], cmdclass={{"build_ext": Build}})
import one
print("imported", one.__name__)
"""

SOURCE = """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "one"};
PyMODINIT_FUNC PyInit_one() { return PyModule_Create(&definition); }
"""


@pytest.mark.parametrize("folder", ["plain", "my nets"])
@pytest.mark.parametrize("command", ["g++", "g++ -pipe", "env 'A=a b' g++ -pipe"])
def test_compilers_of_one_word_and_of_several(tmp_path, folder, command):
    """The build prints one line for each file that it compiles."""
    folder = tmp_path / folder
    (folder / "csrc/headers").mkdir(parents=True)
    (folder / "csrc/one.cpp").write_text('#include "one.h"')
    (folder / "csrc/headers/one.h").write_text(SOURCE)
    script = ONE_FILE.format(folder=str(folder))
    process = run(script, folder, FASTNN_CUDA="0", CXX=command, PYTHONPATH=str(folder))
    assert process.returncode == 0, process.stdout + process.stderr
    lines = process.stdout.splitlines()
    assert lines[0] == "[1/1] csrc/one.cpp"
    assert lines[-1] == "imported one"

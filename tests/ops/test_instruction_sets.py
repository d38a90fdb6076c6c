"""Every instruction set that the library was built for gives the same results, on any CPU that it
starts on.

The kernels have tests of their own in ``tests/kernels``, which need no torch.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastnn
from fastnn import _extension
from repository import REPOSITORY
from support.marks import needs_extension

pytestmark = [needs_extension, pytest.mark.cpu_only("CPU instruction sets")]

ON_X86 = platform.machine().lower() in ("x86_64", "amd64")

SETS = ["default", "avx2", "avx512"]  # in ascending order


def run_python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(Path(fastnn.__file__).parents[1]), **variables},
        capture_output=True,
        text=True,
        check=False,
    )


# --- the choice -----------------------------------------------------------------------------------


def chosen_set(variable: str) -> str:
    script = "from fastnn import _extension; print(_extension.extension.cpu_capability())"
    process = run_python("-c", script, FASTNN_CPU_CAPABILITY=variable)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


@pytest.fixture(scope="module")
def best_set() -> str:
    """The machine's best set, even if the variable restricts these tests."""
    return chosen_set("")


@pytest.mark.parametrize("name", SETS)
def test_the_variable_goes_down_from_the_best_set(name, best_set):
    assert chosen_set(name) == min(name, best_set, key=SETS.index)


@pytest.mark.parametrize("name", ["garbage", "AVX2"])
def test_any_other_name_raises_and_says_what_there_is(name):
    call = "import torch, fastnn; fastnn.functional.log_softmax(torch.ones(2), 0)"
    process = run_python("-c", call, FASTNN_CPU_CAPABILITY=name)
    message = f"FASTNN_CPU_CAPABILITY must be default, avx2 or avx512, got {name}"
    assert process.returncode != 0
    assert f"ValueError: {message}" in process.stderr


# --- results on the lower sets (the other tests run on the best) ----------------------------------

REPRESENTATIVE = (
    "functional and (test_value_and_gradients or test_special_values or test_same_bits_again)"
)


@pytest.mark.parametrize("name", SETS[:-1])
def test_operators_on_a_lower_set(name, best_set):
    if SETS.index(name) >= SETS.index(best_set):
        pytest.skip(f"{best_set} is the best set of this CPU: the other tests run on it")
    arguments = ["tests/ops/test_operators.py", "-k", REPRESENTATIVE, "-p", "no:cacheprovider"]
    process = run_python("-m", "pytest", *arguments, FASTNN_CPU_CAPABILITY=name)
    assert process.returncode == 0, process.stdout[-5000:] + process.stderr
    passed = re.search(r"(\d+) passed", process.stdout)
    assert int(passed[1]) > 1000, "the choice of tests has lost most of them"


# --- no instructions that the CPU may not have ----------------------------------------------------

SYMBOL = re.compile(r"^[0-9a-f]+ <(\S+)>:$")
# The prefixes of AVX (VEX) and AVX-512 (EVEX), possibly after segment or address-size prefixes. A
# line without a mnemonic continues the instruction above.
AVX_CODE = re.compile(r"^ +[0-9a-f]+:\t(?:(?:26|2e|36|3e|64|65|67) )*(?:62|c4|c5) [0-9a-f ]+\t")
AVX_NAMESPACE = re.compile(r"_ZZ?NK?6fastnn4simd(4avx2|6avx512)")


def output_of(*command: str) -> Iterator[str]:
    """Yields the lines that a program prints as they arrive."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield from process.stdout
    assert process.returncode == 0


def functions_with_avx(binary: str | Path) -> set[str]:
    """The mangled names of all functions, local ones too, with AVX or AVX-512 instructions."""
    function = ""
    found = set()
    for line in output_of("objdump", "-d", str(binary)):
        if symbol := SYMBOL.match(line):
            function = symbol[1]
        elif AVX_CODE.match(line):
            found.add(function)
    return found


def outside_avx_namespaces(names: set[str]) -> set[str]:
    return {name for name in names if not AVX_NAMESPACE.match(name)}


needs_x86 = pytest.mark.skipif(not ON_X86, reason="AVX is x86-64's")
needs_binutils = pytest.mark.skipif(
    shutil.which("objdump") is None, reason="objdump isn't installed (Debian: apt install binutils)"
)


@pytest.fixture(scope="module")
def avx_functions() -> set[str]:
    return functions_with_avx(_extension.extension.__file__)


@needs_x86
@needs_binutils
def test_avx_code_is_in_its_namespaces_alone(avx_functions):
    """The linker keeps one copy of an inline function that several objects define. If it kept one
    compiled for AVX, the library would crash on a CPU without it."""
    assert outside_avx_namespaces(avx_functions) == set()


@needs_x86
@needs_binutils
@pytest.mark.parametrize("name", ["avx2", "avx512"])
def test_avx_code_is_found(avx_functions, name):
    """The test above would also pass with a disassembly that finds nothing."""
    found = {AVX_NAMESPACE.match(function)[1] for function in avx_functions}
    assert any(namespace.endswith(name) for namespace in found)


@needs_x86
@needs_binutils
def test_avx_code_elsewhere_is_found(tmp_path):
    """A function of the standard library in a kernel's object must be found, too."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / "stray.cpp"
    source.write_text(
        "#include <algorithm>\n"
        "namespace fastnn::simd::avx2 {\n"
        "float larger(const float* x) { return std::max(x[0], x[1]); }\n"
        "}\n"
    )
    binary = tmp_path / "stray.o"
    subprocess.run([compiler, "-O0", "-mavx2", "-c", source, "-o", binary], check=True)
    assert outside_avx_namespaces(functions_with_avx(binary)) == {"_ZSt3maxIfERKT_S2_S2_"}


# The objects of the last build in this folder, if any.
OBJECTS = sorted((REPOSITORY / "build/simd").glob("kernels_avx*.o"))


@needs_x86
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm isn't installed (apt install binutils)")
@pytest.mark.skipif(not OBJECTS, reason="the library wasn't built in this folder")
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.stem)
def test_objects_for_avx_share_no_symbol(path):
    """Which copy of a shared symbol the linker keeps depends on the order of its arguments."""
    symbols = [line.split() for line in output_of("nm", "--defined-only", str(path))]
    shared = {name for _, kind, name in symbols if kind.isupper() or kind in "uvw"}
    assert shared, "nothing is defined"
    assert outside_avx_namespaces(shared) == set()

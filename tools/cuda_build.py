"""Builds the CUDA part without a GPU and checks what the compiler made: see ``make cuda-check``.

Then it runs the operators' tests on the kernels' PTX, which tools/cuda_emulation/ptx executes on
the CPU, and all tests on the CPU's own kernels.

It builds in a copy of the repository in build/cuda_check, so that the extension that is built in
the repository itself stays unchanged.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from repository import REPOSITORY, copy_to

COPY = REPOSITORY / "build/cuda_check"
# No kernel may spill registers for any of them. The instructions are inspected for INSPECTED, whose
# PTX is executed too.
ARCHITECTURES = "7.5;8.0+PTX;8.6;9.0;10.0;12.0"
INSPECTED = "sm_80"

# The kernels with 128-bit loads or stores of global memory, by name and, if a kernel is compiled in
# several widths, template arguments. Each pattern must match some kernel. `strided_rows_kernel` and
# `nll_loss_kernel` (the targets' elements) access nothing that wide.
WIDTH = r"(\(int\))?[248]"  # some versions of c++filt name an argument's type
WHOLE_ROWS = r"(subwarp_rows|team_rows|split_finish)_kernel<.*::"
WIDE_LOADS = [
    rf"gemm_kernel<[^,]+, {WIDTH}, ",
    rf"relu_backward_kernel<.*, {WIDTH}>",
    r"sgd_step_kernel<",
    r"(subwarp_rows|team_rows|split_reduce)_kernel<.*::CrossEntropyForwardRows<",
    r"(subwarp_rows|team_rows|split_reduce)_kernel<.*::LogitLossRows<",
    rf"{WHOLE_ROWS}LogitGradientRows<",
    rf"{WHOLE_ROWS}CrossEntropyBackwardRows<",
    rf"{WHOLE_ROWS}LogSoftmaxRows<",
    rf"{WHOLE_ROWS}LogSoftmaxBackwardRows<",
    r"split_reduce_kernel<",
]
WIDE_STORES = [
    r"gemm_kernel<(float|double), ",  # four columns per store: those of two bytes take half of it
    rf"relu_backward_kernel<.*, {WIDTH}>",
    r"sgd_step_kernel<",
    rf"{WHOLE_ROWS}CrossEntropyBackwardRows<.*::CrossEntropyArgs<",
    rf"{WHOLE_ROWS}LogitGradientRows<(float, float|double, double),",  # not of half the operands
    rf"{WHOLE_ROWS}LogSoftmaxRows<",
    rf"{WHOLE_ROWS}LogSoftmaxBackwardRows<",
    rf"{WHOLE_ROWS}NLLLossBackwardRows<",
]

# The most instructions per 2-byte element in the loop over a row's vectors. With more, kernels
# might compute for longer than they read: an H200 has time for 14.
TWO_BYTES = r"<c10::(BFloat16|Half)\b"
A_BLOCK_TO_A_ROW = r"team_rows_kernel<.*::"
CLASS_INDICES = r"\(fastnn::cuda::TargetKind\)0(, \S+CrossEntropyArgs<\S+>)? ?>, false>"
MOST_INSTRUCTIONS = [
    (rf"{A_BLOCK_TO_A_ROW}CrossEntropyForwardRows{TWO_BYTES}.*{CLASS_INDICES}", 10),
    (rf"{A_BLOCK_TO_A_ROW}CrossEntropyCopyingRows{TWO_BYTES}.*{CLASS_INDICES}", 10),
    (rf"{A_BLOCK_TO_A_ROW}CrossEntropyBackwardRows{TWO_BYTES}.*{CLASS_INDICES}", 13),
]
ELEMENTS_OF_128_BITS = 8

# The fewest 128-bit loads before a store: two vectors of each tensor.
LOADS_AT_ONCE = [(r"sgd_step_kernel<.*, false, ", 4), (r"sgd_step_kernel<.*, true, ", 6)]
# Kernels whose vectors have four elements of two bytes, as many as float32's.
FOUR_NARROW = r"<fastnn::cuda::Widened<"
WIDE_LOAD = r"LDG\.E\.(\w+\.)*128\b"
WIDE_STORE = r"STG\.E\.(\w+\.)*128\b"


# The other tests test nothing that another form of the kernels could change.
PTX_TESTS = [
    "tests/ops/test_operators.py",
    "tests/ops/test_gradients.py",
    "tests/ops/test_accuracy.py",
    "tests/ops/test_autocast.py",
    "tests/ops/test_linear_cross_entropy.py",
    "tests/optim",
    "tests/programs/test_training.py",
    "tests/cuda/test_cuda_emulation.py",
    "tests/cuda/test_cuda_plans.py",
]
# Storages made in Python, as by copy.deepcopy and pickle, come from an allocator that can't be
# watched: the checks of each access don't know their memory.
UNWATCHED_MEMORY = [
    "tests/optim/test_sgd_between_steps.py::test_nothing_stale_is_kept_between_steps[reload_own_state]",
    "tests/optim/test_sgd_saving.py::test_copies_train_on_their_own",
    "tests/optim/test_sgd_float32_momentum.py::test_copies_have_their_momentum_in_float32_too",
    "tests/optim/test_sgd_from_torch.py::test_from_torch_under_a_scheduler[True]",
]


@dataclass(frozen=True)
class ResourceUsage:
    """What an architecture's code of a kernel needs."""

    architecture: str
    symbol: str
    local_bytes: int  # which spilled registers take, as the kernels have no arrays there


@dataclass
class Kernel:
    """What the disassembly shows of one kernel."""

    name: str
    instructions: list[str] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)

    def has(self, pattern: str) -> bool:
        return self.count(pattern) > 0

    def count(self, pattern: str, places: slice = slice(None)) -> int:
        return sum(bool(re.match(pattern, text)) for text in self.instructions[places])

    def loops(self) -> list[slice]:
        """The instructions of each loop: from a backward branch's target up to that branch."""
        loops = []
        for end, text in enumerate(self.instructions):
            if match := re.match(r"BRA\b.*?\b0x(\w+)", text):
                start = self.addresses.index(int(match[1], 16))
                if start < end:
                    loops.append(slice(start, end + 1))
        return loops

    def instructions_for_an_element(self) -> float:
        """In the longest innermost loop with the most 128-bit loads.

        Instructions that it seldom executes count too, if they lie in between.
        """
        wide = [loop for loop in self.loops() if self.count(WIDE_LOAD, loop) > 0]
        sizes = [
            (self.count(WIDE_LOAD, loop), loop.stop - loop.start)
            for loop in wide
            if not any(is_around(loop, other) for other in wide)
        ]
        loads, instructions = max(sizes, default=(0, 0))
        return instructions / (loads * ELEMENTS_OF_128_BITS) if loads else math.inf

    def loads_at_once(self) -> int:
        """The most 128-bit loads with no store of as many between them."""
        most = loads = 0
        for text in self.instructions:
            if re.match(WIDE_STORE, text):
                loads = 0
            loads += bool(re.match(WIDE_LOAD, text))
            most = max(most, loads)
        return most


def is_around(outer: slice, inner: slice) -> bool:
    return outer != inner and outer.start <= inner.start and inner.stop <= outer.stop


def main() -> None:
    copy_to(COPY)
    build()
    library = next((COPY / "fastnn").glob("_C*.so"))
    check_import()
    check_spills(list(resource_usages(library)))
    check_kernels(list(disassemble(library)))
    extract_ptx(library)
    execute_ptx()
    print("--- all tests, on the CPU", flush=True)
    run([sys.executable, "-m", "pytest", *sys.argv[1:]])


def build() -> None:
    print(f"--- building for {ARCHITECTURES} (ten minutes on two cores)", flush=True)
    variables = {"FASTNN_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ARCHITECTURES}
    run(
        [sys.executable, "-W", "ignore", "setup.py", "--quiet", "build_ext", "--inplace"], variables
    )
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation"]
    run([*pip, "--editable", ".[test]"], variables)


IMPORT = """
import torch, fastnn
assert fastnn.is_available(), fastnn._extension.unavailable_reason
names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastnn::")]
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
on_cpu = {name for name in names if has_kernel(name, "CPU")}
on_cuda = {name for name in names if has_kernel(name, "CUDA")}
missing = on_cpu - on_cuda - {"fastnn::mlp_backward"}  # made of other operators
assert on_cpu and not missing, f"not registered for CUDA: {sorted(missing)}"
print(f"{len(on_cuda)} operators registered for CUDA")
"""


def check_import() -> None:
    """Checks that it loads without a GPU; LD_BIND_NOW looks up every symbol, called or not."""
    run([sys.executable, "-c", IMPORT], {"LD_BIND_NOW": "1"})


def check_spills(usages: list[ResourceUsage]) -> None:
    problems = [
        f"{demangled(usage.symbol)} spills registers for {usage.architecture}: "
        f"{usage.local_bytes} bytes of local memory"
        for usage in usages
        if usage.local_bytes > 0
    ]
    for architecture, count in Counter(usage.architecture for usage in usages).items():
        print(f"{count:3d} kernels for {architecture}")
    if problems or not usages:
        sys.exit("\n".join(["cuda_build.py:", *(problems or ["there is no kernel"])]))
    print("none of which spills registers")


def check_kernels(kernels: list[Kernel]) -> None:
    problems: list[str] = []
    for patterns, access, instruction in [
        (WIDE_LOADS, "loads", WIDE_LOAD),
        (WIDE_STORES, "stores", WIDE_STORE),
    ]:
        for pattern in patterns:
            meant = named(pattern, kernels, problems)
            problems += [
                f"{kernel.name} has no 128-bit {access}"
                for kernel in meant
                if not kernel.has(instruction) and not re.search(FOUR_NARROW, kernel.name)
            ]
            print(f"{len(meant):3d} kernels {pattern} with 128-bit {access}")
    for pattern, most in MOST_INSTRUCTIONS:
        meant = named(pattern, kernels, problems)
        counts = [kernel.instructions_for_an_element() for kernel in meant]
        problems += [
            f"{kernel.name} takes {count:.1f} instructions per element, more than {most}"
            for kernel, count in zip(meant, counts, strict=True)
            if count > most
        ]
        shown = ", ".join(f"{count:.1f}" for count in counts)
        print(f"{len(meant):3d} kernels {pattern} take {shown} instructions per element")
    for pattern, fewest in LOADS_AT_ONCE:
        meant = named(pattern, kernels, problems)
        problems += [
            f"{kernel.name} has {kernel.loads_at_once()} loads before a store, not {fewest}"
            for kernel in meant
            if kernel.loads_at_once() < fewest
        ]
        print(f"{len(meant):3d} kernels {pattern} with {fewest} loads or more before a store")
    if problems:
        sys.exit("\n".join(["cuda_build.py:", *problems]))


def named(pattern: str, kernels: list[Kernel], problems: list[str]) -> list[Kernel]:
    meant = [kernel for kernel in kernels if re.search(pattern, kernel.name)]
    if not meant:
        problems.append(f"there is no kernel {pattern}")
    return meant


def resource_usages(library: Path) -> Iterator[ResourceUsage]:
    command = [tool("cuobjdump"), "--dump-resource-usage", str(library)]
    return read_resource_usages(run(command, capture_output=True).stdout)


def read_resource_usages(text: str) -> Iterator[ResourceUsage]:
    architecture = symbol = ""
    for line in text.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            symbol = match[1]
        elif match := re.search(r"\bSTACK:(\d+) .*\bLOCAL:(\d+)", line):
            yield ResourceUsage(architecture, symbol, int(match[1]) + int(match[2]))


def disassemble(library: Path) -> Iterator[Kernel]:
    command = [tool("cuobjdump"), "--dump-sass", "--gpu-architecture", INSPECTED, str(library)]
    tools = str(Path(tool("nvdisasm")).parent)  # which cuobjdump calls
    process = run(command, {"PATH": f"{tools}:{os.environ['PATH']}"}, capture_output=True)
    return read_sass(process.stdout)


def read_sass(text: str) -> Iterator[Kernel]:
    kernel = None
    for line in text.splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            if kernel is not None:
                yield kernel
            kernel = Kernel(demangled(match.group(1)))
        elif kernel is not None and (
            match := re.match(r"\s*/\*(\w+)\*/\s+(@!?U?P\w+\s+)?(.*?);", line)
        ):
            kernel.addresses.append(int(match.group(1), 16))
            kernel.instructions.append(match.group(3))
    if kernel is not None:
        yield kernel


def extract_ptx(library: Path) -> None:
    """Puts the PTX where tools/cuda_emulation/build.py looks for it."""
    folder = COPY / "build/cuda_emulation/ptx"
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob("*.ptx"):
        earlier.unlink()
    run([tool("cuobjdump"), "--extract-ptx", "all", str(library)], folder=folder)
    print(f"{len(list(folder.glob('*.ptx')))} modules of PTX extracted")


def execute_ptx() -> None:
    """Runs the tests, which must launch each kernel at least once."""
    print("--- the tests of the operators, over the kernels' PTX", flush=True)
    report = COPY / "build/never_launched.txt"
    pytest = [sys.executable, "-m", "pytest", f"--never-launched={report}"]
    pytest += [f"--deselect={test}" for test in UNWATCHED_MEMORY]
    run([*pytest, *PTX_TESTS], {"FASTNN_TEST_CUDA_EMULATION": "ptx"})
    if names := report.read_text():
        sys.exit(f"cuda_build.py: no test has launched\n{names}")


def demangled(symbol: str) -> str:
    process = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True)
    return process.stdout.strip()


def tool(name: str) -> str:
    """A program of the CUDA toolkit, from its Python packages or the toolkit itself."""
    for folder in map(Path, sys.path):
        for candidate in sorted(folder.glob(f"nvidia/**/bin/{name}")):
            return str(candidate)
    found = shutil.which(name)
    if found is None:
        sys.exit(f"cuda_build.py: {name} is missing; run make cuda-check, which installs it.")
    return found


def run(
    command: list[str],
    variables: dict[str, str] | None = None,
    folder: Path = COPY,
    **options: object,
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **(variables or {})}
    process = subprocess.run(
        command, cwd=folder, env=environment, check=False, text=True, **options
    )
    if process.returncode != 0:
        output = f"\n{process.stdout}{process.stderr}" if options else ""
        sys.exit(f"cuda_build.py: this ended with {process.returncode}: {command}{output}")
    return process


if __name__ == "__main__":
    main()

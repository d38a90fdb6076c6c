"""Builds and runs the kernels' own tests, which need no torch: see ``make sanitize``, ``emulate``.

``python tests/kernels/run.py sanitize|emulate|plain``; CXX names the compiler.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import emulated_pc

from build_support import instruction_sets
from native import ADDRESS_UNDEFINED, CXX, NATIVE, PLAIN, THREAD, Way, build, run
from repository import REPOSITORY

TESTS = Path("tests/kernels")

# For a CPU without AVX-512: vectors as wide, which the compiler splits into AVX2's. That takes
# several times as long as any other set, and many times at -O2.
SPLIT = "avx512_split"


def has_avx512() -> bool:
    """Whether this CPU has AVX-512, according to Linux."""
    facts = Path("/proc/cpuinfo")
    return facts.exists() and " avx512bw " in facts.read_text()


@dataclass(frozen=True)
class Program:
    """The tests, built in one way."""

    way: Way
    compiler: list[str] = field(default_factory=lambda: CXX)
    machine: str = NATIVE
    link_flags: tuple[str, ...] = ()
    splits: bool = False  # whether AVX-512's vectors are tested on AVX2 too

    @property
    def folder(self) -> Path:
        return Path("build/kernel_tests") / self.way.name

    @property
    def path(self) -> Path:
        return self.folder / "tests"

    def commands(self) -> Iterator[tuple[list[str], Path]]:
        """The compiler's commands, each with its object, in the order to link in.

        If several objects hold an inline function, the linker takes the first, which must be one
        for every CPU.
        """
        targets = self.targets()
        # Debug information of lines, but not of variables, which takes GCC minutes more.
        common = [*self.compiler, *self.way.flags, "-g1", "-pthread"]
        flags = [*common, *instruction_sets.KERNEL_FLAGS, "-Icsrc"]
        if SPLIT in targets:
            flags.append("-DFASTNN_TESTS_SPLIT")
        for source in sorted(TESTS.glob("*.cpp")):
            yield self.command(flags, source, source.stem)
        for target, target_flags in targets.items():
            for source in [Path(instruction_sets.SOURCE), *sorted(TESTS.glob("per_target/*.cpp"))]:
                yield self.command([*common, *target_flags], source, f"{source.stem}_{target}")

    def targets(self) -> dict[str, list[str]]:
        """The machine's instruction sets, each with its flags."""
        targets = instruction_sets.targets(self.machine)
        result = {target: instruction_sets.target_flags(self.machine, target) for target in targets}
        if self.splits and "avx512" in result and not has_avx512():
            name = ["-UFASTNN_SIMD_TARGET", f"-DFASTNN_SIMD_TARGET={SPLIT}"]
            result[SPLIT] = [*result["avx2"], *name, "-DFASTNN_VECTOR_BYTES=64", "-O1"]
        return result

    def command(self, flags: list[str], source: Path, stem: str) -> tuple[list[str], Path]:
        output = self.folder / f"{stem}.o"
        return [*flags, "-c", str(source), "-o", str(output)], output

    def build(self, jobs: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        commands, objects = zip(*self.commands(), strict=True)
        link = [*self.compiler, *self.way.flags, "-pthread", *self.link_flags]
        link += [*map(str, objects), "-o", str(self.path)]
        build(commands, link, jobs)

    def test(self, jobs: int) -> None:
        print(f"--- {self.way.name}", flush=True)
        self.build(jobs)
        run([*self.way.runner, str(self.path)], self.way.variables)


def sanitize(jobs: int) -> None:
    """Memory, undefined behaviour and leaks; then data races."""
    Program(ADDRESS_UNDEFINED, splits=True).test(jobs)
    Program(THREAD).test(jobs)


def present(what: str, packages: dict[str, str]) -> bool:
    """Whether these Debian packages are installed, known by a command or file; prints if not."""
    absent = [
        package
        for package, file in packages.items()
        if shutil.which(file) is None and not Path(file).exists()
    ]
    if absent:
        print(f"--- {what}: skipped (Debian: apt install {' '.join(absent)})", flush=True)
    return not absent


# So that an emulator needs no libraries of the machine that it emulates.
STATIC = ("-static",)

# An x86-64 CPU of the time before AVX.
NO_AVX = ("qemu-x86_64", "-cpu", "Nehalem")

# In the emulated process itself: a process that it started would not be emulated.
TEST_LIBRARY = """
import sys, pytest
from fastnn import _extension
assert _extension.extension.cpu_capability() == "default"
choice = "functional and test_value_and_gradients and float32"
sys.exit(pytest.main(["tests/ops/test_operators.py", "-p", "no:cacheprovider", "-k", choice]))
"""


def emulate(jobs: int) -> None:
    """A CPU without AVX, for these tests and for the library; one with AVX-512; and aarch64."""
    if NATIVE == "x86_64":
        emulate_x86_64(jobs)
    packages = {"g++-aarch64-linux-gnu": "aarch64-linux-gnu-g++", "qemu-user": "qemu-aarch64"}
    if present("aarch64", packages):
        Program(
            Way("aarch64", runner=("qemu-aarch64",)),
            compiler=["aarch64-linux-gnu-g++"],
            machine="aarch64",
            link_flags=STATIC,
        ).test(jobs)


def emulate_x86_64(jobs: int) -> None:
    """One program for both CPUs."""
    qemu = present("x86-64 without AVX", {"qemu-user": NO_AVX[0]})
    bochs = present("x86-64 with AVX-512", emulated_pc.PACKAGES)
    program = Program(Way("x86_64"), link_flags=STATIC)
    if qemu or bochs:
        program.build(jobs)
    if qemu:
        print("--- x86-64 without AVX", flush=True)
        run([*NO_AVX, str(program.path)])
        print("--- the library without AVX (two minutes or more)", flush=True)
        run([*NO_AVX, sys.executable, "-c", TEST_LIBRARY])
    if bochs:
        print("--- x86-64 with AVX-512 (about ten minutes)", flush=True)
        run([sys.executable, emulated_pc.__file__, str(program.path), "avx512"])


def plain(jobs: int) -> None:
    """Without sanitizers: the fastest."""
    Program(PLAIN, splits=True).test(jobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ways = {way.__name__: way for way in (sanitize, emulate, plain)}
    parser.add_argument("way", choices=ways)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at once")
    arguments = parser.parse_args()
    os.chdir(REPOSITORY)
    ways[arguments.way](arguments.jobs)


if __name__ == "__main__":
    main()

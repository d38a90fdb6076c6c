"""Builds and runs the emulation's tests that need neither CUDA nor torch's libraries.

These are its own, the PTX machine's and the CUDA kernels', without the compiler's sanitizers or
(except for PTX) under them: ``python tools/cuda_emulation/run.py plain|sanitize [--only NAME]``.
CXX names the compiler. They use torch's headers of c10::Half and c10::BFloat16.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cuda_emulation.ptx.translate import COMPILER_FLAGS, translate
from native import ADDRESS_UNDEFINED, CXX, THREAD, Way, build, run
from repository import REPOSITORY

EMULATION = Path("tools/cuda_emulation")
# `#pragma unroll` is nvcc's. If an operator over rows is made with designated initializers, GCC
# misses the base of defaults, which has none.
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-missing-field-initializers"]
FLAGS = [
    "-std=c++20",
    "-g1",
    "-pthread",
    *WARNINGS,
    f"-I{EMULATION / 'include'}",
    "-Icsrc",
    "-Itests",
    "-Itools",
]

# Not -O2: GCC 12's vectorizer then assumes a load that is aligned in one branch aligned in both.
PLAIN = Way("plain", flags=("-O1",))

# Faults that are planted in a kernel, and what a sanitizer reports for each.
OVERFLOW = "heap-buffer-overflow"
FAULTS = {
    ADDRESS_UNDEFINED: {
        "global_overflow": OVERFLOW,
        "shared_overflow": "out of bounds",
        "dynamic_overflow": OVERFLOW,
        "local_overflow": "out of bounds",
        "misaligned_load": "misaligned address",
    },
    THREAD: {
        "missing_barrier": "data race",
        "missing_second_barrier": "data race",
        "race_of_threads": "data race",
        "race_of_blocks": "data race",
    },
}


def torch_includes() -> list[str]:
    """The flags for torch's headers, without the time that importing torch takes."""
    torch = importlib.util.find_spec("torch")
    if torch is None:
        sys.exit(
            "run.py: the kernels' tests need torch's headers (`make` runs this where they are)"
        )
    return ["-isystem", str(Path(torch.origin).parent / "include")]


@dataclass(frozen=True)
class Program:
    """A program of C++ tests, built in one way."""

    name: str
    way: Way
    link_flags = ("-pthread",)

    @property
    def folder(self) -> Path:
        return Path("build/cuda_emulation") / self.name / self.way.name

    @property
    def path(self) -> Path:
        return self.folder / "tests"

    def commands(self) -> list[list[str]]:
        sources = sorted((EMULATION / self.name).glob("*.cpp"))
        includes = [] if self.name == "self_tests" else torch_includes()
        commands = [self.command(source, [*self.way.flags, *includes]) for source in sources]
        for name in ("runtime", "block", "fiber"):
            commands.append(self.command(EMULATION / f"{name}.cpp", self.runtime_flags()))
        return commands

    def runtime_flags(self) -> list[str]:
        """The thread sanitizer must not check the runtime's own memory: see sanitizers.h."""
        if self.way is THREAD:
            return ["-O2", "-DFASTNN_EMULATION_TSAN"]
        return list(self.way.flags)

    def command(self, source: Path, flags: list[str]) -> list[str]:
        return [
            *CXX,
            *FLAGS,
            *flags,
            "-c",
            str(source),
            "-o",
            str(self.folder / f"{source.stem}.o"),
        ]

    def build(self, jobs: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        commands = self.commands()
        objects = [command[command.index("-o") + 1] for command in commands]
        link = [*CXX, *self.way.flags, *self.link_flags, *objects, "-o", str(self.path)]
        build(commands, link, jobs)

    def test(self, jobs: int) -> None:
        print(f"--- {self.name} of the CUDA emulation, {self.way.name}", flush=True)
        self.build(jobs)
        run([*self.way.runner, str(self.path)], self.way.variables)
        if self.name == "self_tests":
            self.expect_reports()

    def expect_reports(self) -> None:
        faults = FAULTS.get(self.way, {})
        for fault, words in faults.items():
            self.expect_report(fault, words)
        if faults:
            print(f"{len(faults)} planted faults reported")

    def expect_report(self, fault: str, words: str) -> None:
        """Checks that the sanitizer ends the program with the words if the fault is planted."""
        process = subprocess.run(
            [*self.way.runner, str(self.path), fault],
            env={**os.environ, **self.way.variables},
            capture_output=True,
            text=True,
            check=False,
        )
        if process.returncode == 0 or words not in process.stderr:
            sys.exit(f"run.py: {self.way.name} has not reported {fault}:\n{process.stderr}")


class PTXTests(Program):
    """The tests of the PTX machine, with kernels that are written in PTX."""

    link_flags = ("-pthread", "-rdynamic")  # the kernels are found by their names

    def commands(self) -> list[list[str]]:
        flags = ["-DFASTNN_EMULATION_PTX", f"-I{EMULATION}"]
        of_torch = [*self.way.flags, *torch_includes()]
        commands = super().commands()
        for name in ("kernels", "memory"):
            commands.append(self.command(EMULATION / f"ptx/{name}.cpp", of_torch))
        commands.append(self.command(self.translation(), [*of_torch, *COMPILER_FLAGS]))
        return [[*command, *flags] for command in commands]

    def translation(self) -> Path:
        path = self.folder / "translated.cpp"
        (text,) = translate(EMULATION / self.name / "kernels.ptx")
        path.write_text(text)
        return path


WAYS = {"plain": [PLAIN], "sanitize": [ADDRESS_UNDEFINED, THREAD]}
PROGRAMS = {
    "plain": ["self_tests", "kernels", "ptx_tests"],
    # PTX is executed with checks of its own.
    "sanitize": ["self_tests", "kernels"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--only", choices=PROGRAMS["plain"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at once")
    arguments = parser.parse_args()
    os.chdir(REPOSITORY)
    for way in WAYS[arguments.way]:
        for name in [arguments.only] if arguments.only else PROGRAMS[arguments.way]:
            (PTXTests if name == "ptx_tests" else Program)(name, way).test(arguments.jobs)


if __name__ == "__main__":
    main()

"""Plants faults in the CUDA kernels, one at a time, and counts those that the kernels' tests catch.

``python tools/cuda_emulation/mutants.py [WORD]``: all, or those whose description has the word.
Each fault goes into a copy of csrc/cuda; the tests named beside it are built on the copy and run. A
fault is caught if they fail, end in a fault of the emulation's, or take too long.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from planted import MUTANTS, Mutant
from run import CXX, FLAGS, PLAIN, REPOSITORY, Program, torch_includes

FOLDER = Path("build/cuda_emulation/mutants")
SECONDS = 300  # many times what the tests take


def objects_without_tests() -> list[str]:
    """What each mutant's program is linked with: the runtime and main()."""
    program = Program("kernels", PLAIN)
    program.folder.mkdir(parents=True, exist_ok=True)
    common = [c for c in program.commands() if Path(c[-1]).stem in COMMON]
    for command in common:
        subprocess.run(command, check=True)
    return [command[-1] for command in common]


COMMON = ("main", "runtime", "block", "fiber")


def plant(mutant: Mutant, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree("csrc/cuda", folder / "cuda")
    path = folder / "cuda" / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        sys.exit(f"mutants.py: {mutant.file} doesn't have exactly one place to plant: {mutant}")
    path.write_text(text.replace(mutant.old, mutant.new))


def build_tests(name: str, folder: Path, objects: list[str]) -> Path:
    """Builds the tests of one file; the folder's sources take precedence over those in csrc."""
    source = Path("tools/cuda_emulation/kernels") / f"{name}.cpp"
    output = folder / f"{name}.o"
    flags = [*PLAIN.flags, "-w", f"-I{folder}", *FLAGS, *torch_includes()]
    subprocess.run([*CXX, *flags, "-c", str(source), "-o", str(output)], check=True)
    program = folder / "tests"
    subprocess.run([*CXX, "-pthread", str(output), *objects, "-o", str(program)], check=True)
    return program


def outcome(program: Path) -> str:
    """The first line of the tests' failure; empty if they pass."""
    try:
        process = subprocess.run(
            [program], capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not done after {SECONDS} s"
    if process.returncode == 0:
        return ""
    return (process.stderr.splitlines() or [f"status {process.returncode}"])[0]


def try_mutant(number: int, mutant: Mutant, objects: list[str]) -> bool:
    folder = FOLDER / str(number)
    plant(mutant, folder)
    message = outcome(build_tests(mutant.tests, folder, objects))
    print(f"{'caught' if message else 'MISSED'}  {mutant}\n        {message[:150]}", flush=True)
    return bool(message)


def check_unchanged(names: set[str], objects: list[str]) -> None:
    """Tests that fail without a fault would seem to catch any."""
    for name in sorted(names):
        folder = FOLDER / f"unchanged_{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if message := outcome(build_tests(name, folder, objects)):
            sys.exit(f"mutants.py: the tests of {name} fail without a planted fault: {message}")


def main() -> None:
    os.chdir(REPOSITORY)
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    mutants = [mutant for mutant in MUTANTS if word in str(mutant)]
    if not mutants:
        sys.exit(f"mutants.py: no planted fault is named {word!r}")
    for number, mutant in enumerate(mutants):
        plant(mutant, FOLDER / str(number))  # all of them first: a stale one is found at once
    objects = objects_without_tests()
    check_unchanged({mutant.tests for mutant in mutants}, objects)
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        numbers = range(len(mutants))
        caught = sum(pool.map(lambda i: try_mutant(i, mutants[i], objects), numbers))
    print(f"{caught} of {len(mutants)} planted faults caught")
    sys.exit(caught != len(mutants))


if __name__ == "__main__":
    main()

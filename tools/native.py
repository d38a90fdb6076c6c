"""The compiler and the ways to build a program, for the runners of tests written in C++."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

NATIVE = platform.machine()
CXX = shlex.split(os.environ.get("CXX", "")) or ["g++"]


@dataclass(frozen=True, eq=False)
class Way:
    """How a program is built and run."""

    name: str
    flags: tuple[str, ...] = ("-O2",)
    runner: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)


def without_random_addresses() -> tuple[str, ...]:
    """GCC 12's thread sanitizer can't start if the kernel spreads addresses too widely."""
    command = ("setarch", NATIVE, "--addr-no-randomize")
    if shutil.which(command[0]) is None:
        return ()
    usable = subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
    return command if usable else ()


PLAIN = Way("plain")
ADDRESS_UNDEFINED = Way(
    "address_undefined",
    flags=(
        "-O1",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
    ),
    variables={"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"},
)
THREAD = Way(
    "thread",
    flags=("-O1", "-fsanitize=thread"),
    runner=without_random_addresses(),
    variables={"TSAN_OPTIONS": "halt_on_error=1"},
)


def run(command: list[str], variables: dict[str, str] | None = None) -> None:
    """Runs a command; if it fails, ends this program and names the command."""
    process = subprocess.run(command, env={**os.environ, **(variables or {})}, check=False)
    if process.returncode != 0:
        name = Path(sys.argv[0]).name
        sys.exit(f"{name}: this ended with status {process.returncode}: {' '.join(command)}")


def build(compile_commands: Sequence[list[str]], link_command: list[str], jobs: int) -> None:
    """Compiles, several files at once, and links."""
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, compile_commands))
    run(link_command)

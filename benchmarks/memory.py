"""Peak memory: how far a call raises the process's resident memory above what it finds.

Each contender runs in a process of its own, since an allocator keeps what it once had:

    python -m benchmarks.memory "KEY OF THE CASE" CONTENDER     prints the bytes of each call
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.case import Case
from benchmarks.timing import Summary, summarise

CALLS = 3
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def supported() -> bool:
    """Whether the system tells a process its peak and lets it start over; Linux does."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def peak_memory(case: Case, contender: str) -> Summary:
    """Measures one contender in a fresh process."""
    answer = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", case.key, contender],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return summarise(json.loads(answer.stdout.splitlines()[-1]))


def growth(case: Case, contender_name: str) -> list[int]:
    """The growth of this process's peak during each of some calls, in bytes."""
    inputs = case.inputs(torch.Generator().manual_seed(0))
    contender = next(one for one in case.contenders() if one.name == contender_name)
    with torch.set_grad_enabled(case.records_graph):
        call = contender.bind(inputs)
        call()  # libraries load and compilers run now, and state that stays is made
        return [_growth_of(call) for _ in range(CALLS)]


def _growth_of(call) -> int:
    gc.collect()
    _return_free_memory()
    before = _status("VmRSS")
    CLEAR_REFS.write_text("5")  # sets the peak back to the present
    call()
    return max(0, _status("VmHWM") - before)


def _return_free_memory() -> None:
    """Gives the allocator's free blocks back, or the next call would find its memory there."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(name: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no {name}")


def main(key: str, contender: str) -> None:
    """Prints the bytes of each call as JSON."""
    from benchmarks.cases import all_cases

    case = next(case for case in all_cases() if case.key == key)
    print(json.dumps(growth(case, contender)))


if __name__ == "__main__":
    main(*sys.argv[1:])

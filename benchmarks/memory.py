"""Peak memory: how far a call raises the memory in use above the level before it.

If an allocator keeps memory once it has it, each contender runs in a process of its own:

    python -m benchmarks.memory "KEY OF THE CASE" CONTENDER DEVICE     prints each call's bytes
"""

from __future__ import annotations

import json
import subprocess
import sys

import torch

from benchmarks.case import Case, Unavailable, tf32
from benchmarks.device import DEVICES, Device, one_line
from benchmarks.timing import Summary, summarise

CALLS = 3


def peak_memory(case: Case, contender: str, device: Device) -> Summary:
    """Measures one contender; raises Unavailable if it can't run."""
    if not device.isolates_memory:
        return summarise(_growth_or_unavailable(case, contender, device))
    answer = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", case.key, contender, device.name],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    growths = json.loads(answer.stdout.splitlines()[-1])
    if isinstance(growths, str):
        raise Unavailable(growths)
    return summarise(growths)


def growth(case: Case, contender_name: str, device: Device) -> list[int]:
    """The growth of the memory in use during each of some calls, in bytes."""
    inputs = case.inputs(device.generator(0))
    contender = next(one for one in case.contenders() if one.name == contender_name)
    with torch.set_grad_enabled(case.records_graph), tf32(case.tf32):
        call = contender.bind(inputs)
        call()  # libraries load, compilers run and persistent state is created now
        return [device.peak_growth(call) for _ in range(CALLS)]


def _growth_or_unavailable(case: Case, contender: str, device: Device) -> list[int]:
    try:
        return growth(case, contender, device)
    except Exception as problem:  # as in the check before the timing: any peer may fail
        raise Unavailable(one_line(problem)) from None


def main(key: str, contender: str, name: str) -> None:
    """Prints the bytes of each call as JSON, or the reason that there are none."""
    from benchmarks.cases import all_cases

    device = DEVICES[name]
    case = next(case for case in all_cases(device) if case.key == key)
    try:
        answer = _growth_or_unavailable(case, contender, device)
    except Unavailable as problem:
        answer = str(problem)
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])

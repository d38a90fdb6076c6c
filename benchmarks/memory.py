"""Peak memory: how far a call raises the memory in use above what it finds.

Each contender runs in a process of its own, since an allocator keeps what it once had:

    python -m benchmarks.memory "KEY OF THE CASE" CONTENDER DEVICE     prints each call's bytes
"""

from __future__ import annotations

import json
import subprocess
import sys

import torch

from benchmarks.case import Case, Unavailable
from benchmarks.device import DEVICES, Device
from benchmarks.timing import Summary, summarise

CALLS = 3


def peak_memory(case: Case, contender: str, device: Device) -> Summary:
    """Measures one contender in a fresh process; raises Unavailable where it can't run there."""
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
    inputs = case.inputs(torch.Generator().manual_seed(0)).on(device)
    contender = next(one for one in case.contenders() if one.name == contender_name)
    with torch.set_grad_enabled(case.records_graph):
        call = contender.bind(inputs)
        call()  # libraries load and compilers run now, and state that stays is made
        return [device.peak_growth(call) for _ in range(CALLS)]


def main(key: str, contender: str, device: str) -> None:
    """Prints the bytes of each call as JSON, or why there are none."""
    from benchmarks.cases import all_cases

    case = next(case for case in all_cases() if case.key == key)
    try:
        answer = growth(case, contender, DEVICES[device])
    except Exception as problem:  # as in the check before the timing: any peer may refuse
        answer = str(problem) or type(problem).__name__
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Compiles everything the cases need in many processes, so that a run finds it in the caches.

    python -m benchmarks --device cuda --warm

TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR set the caches; the run needs the same ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.case import Case, Contender, tf32
from benchmarks.cases import all_cases
from benchmarks.device import DEVICES, Device, one_line

ROOT = Path(__file__).resolve().parents[1]
# Each holds a GPU context and the largest case's tensors.
MOST_PROCESSES = 10


def warm(device: Device, keys: list[str], limit: float | None) -> int:
    """Compiles the contenders of these cases; returns 0 if all succeeded, otherwise 1."""
    wanted = [case.key for case in all_cases(device) if case.key in keys and _jits(case, device)]
    count = max(1, min(MOST_PROCESSES, os.cpu_count() or 1, len(wanted)))
    end = None if limit is None else time.monotonic() + limit
    # One thread each, as there are many processes already.
    environment = device.worker_environment(threads=1)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.warm", device.name, *wanted[first::count]],
            cwd=ROOT,
            env=environment,
        )
        for first in range(count)
    ]
    try:
        codes = [_wait(process, end) for process in processes]
        return int(any(codes))
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen, end: float | None) -> int:
    try:
        return process.wait(None if end is None else max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return 1


def _jits(case: Case, device: Device) -> list[Contender]:
    """The case's contenders that compile anything."""
    return [
        one
        for one in case.contenders()
        if device.name in one.devices and (one.jit or (one.compiled and case.compiles))
    ]


def warm_case(case: Case, device: Device) -> list[str]:
    """Calls each contender that compiles; returns the failures."""
    torch._dynamo.reset()
    complaints = []
    with torch.set_grad_enabled(case.records_graph), tf32(case.tf32):
        inputs = case.inputs(device.generator(0))
        for contender in _jits(case, device):
            try:
                contender.check(inputs)
            except Exception as problem:  # the run will meet it again, and carry on
                complaints.append(f"{contender.name}: {one_line(problem)}")
            contender.close()
    return complaints


def main(name: str, *keys: str) -> None:
    """Compiles for some cases, one after the other."""
    device = DEVICES[name]
    device.prepare_compiler()
    for case in all_cases(device):
        if case.key in keys:
            start = time.monotonic()
            complaints = warm_case(case, device)
            said = ", ".join([f"{time.monotonic() - start:.1f} s", *complaints])
            print(f"{case.key}: {said}", flush=True)
            device.available_bytes()  # releases torch's cached memory to the other processes


if __name__ == "__main__":
    main(*sys.argv[1:])

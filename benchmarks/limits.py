"""What the machine can do: the rates that results are compared with.

GEMM-bound work is compared with the best large matrix product, memory-bound work with a copy that
moves about as many bytes (read plus written), so that what fits a cache is held against that cache.
A call too small for any of this is compared with the smallest copy and just comes out low.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.case import Work

MIB = 2**20
COPY_BYTES = (MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)
GEMM_SIZES = (1024, 2048)


def measure_limits(seconds: float) -> dict:
    """This machine's rates at the current thread count: flops and bytes per second.

    Args:
        seconds: how long to try each.
    """
    sgemm = max(_gemm_rate(size, torch.float32, seconds) for size in GEMM_SIZES)
    return {
        "gemm": {
            "float32": sgemm,
            # Where bfloat16 has no instructions of its own, converting to float32 is the better
            # way, and the small size says so without taking minutes.
            "bfloat16": max(sgemm, _gemm_rate(GEMM_SIZES[0] // 2, torch.bfloat16, seconds)),
        },
        "copy": {str(size): _copy_rate(size, seconds) for size in COPY_BYTES},
    }


def best_of(first: dict, second: dict) -> dict:
    """The better of two measurements of each rate: a limit that was reached once is one."""
    return {
        kind: {name: max(rate, second[kind][name]) for name, rate in rates.items()}
        for kind, rates in first.items()
    }


def limit_for(work: Work, dtype: str, limits: dict) -> float | None:
    """The rate that this work is compared with; None where it is neither kind."""
    if work.flops:
        return limits["gemm"][dtype]
    if work.bytes:
        sizes = sorted(int(size) for size in limits["copy"])
        size = next((size for size in sizes if size >= work.bytes), sizes[-1])
        return limits["copy"][str(size)]
    return None


def _gemm_rate(size: int, dtype: torch.dtype, seconds: float) -> float:
    left, right = torch.randn(2, size, size).to(dtype)
    product = torch.empty(size, size, dtype=dtype)
    return 2 * size**3 / _shortest(lambda: torch.mm(left, right, out=product), seconds)


def _copy_rate(moved: int, seconds: float) -> float:
    source = torch.ones(moved // 8)
    target = torch.empty_like(source)
    return moved / _shortest(lambda: target.copy_(source), seconds)


def _shortest(call: Callable[[], object], seconds: float) -> float:
    """The shortest of the calls' times, after a first one that touches the memory."""
    call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) * 1e-9)
    return min(times)

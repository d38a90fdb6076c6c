"""The machine's limits: the rates that results are compared with.

GEMM-bound work is compared with the best large matrix product, memory-bound work with a copy that
moves about as many bytes (read plus written), so that work that fits a cache is compared with that
cache. Calls too small for either are compared with the smallest copy and simply come out low.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from benchmarks.case import Work, tf32
from benchmarks.device import Device

# Upper bound on repetitions: on a GPU each one waits for a sleep of about a millisecond.
MOST_TIMES = 1000


def measure_limits(seconds: float, device: Device) -> dict:
    """The device's rates at the current thread count: flops, bytes and launches per second.

    Args:
        seconds: how long to measure each rate.
        device: the device to measure.
    """
    sgemm, bfloat16 = (
        _best_gemm_rate(device.gemm_sizes[dtype], dtype, seconds, device)
        for dtype in (torch.float32, torch.bfloat16)
    )
    # bfloat16 can be multiplied in float32, and must be where it has no instructions of its own.
    limits = {
        "gemm": {"float32": sgemm, "bfloat16": max(sgemm, bfloat16)},
        "copy": {str(size): _copy_rate(size, seconds, device) for size in device.copy_bytes},
    }
    if device.tf32_gemm_sizes:
        with tf32(True):
            rate = _best_gemm_rate(device.tf32_gemm_sizes, torch.float32, seconds, device)
        limits["gemm"]["tf32"] = rate
    launches = device.launch_rate()
    return limits if launches is None else limits | {"launch": {"kernels": launches}}


def best_of(first: dict, second: dict) -> dict:
    """The better of two measurements of each rate: a rate reached once is possible."""
    return {
        kind: {name: max(rate, second[kind][name]) for name, rate in rates.items()}
        for kind, rates in first.items()
    }


def limit_for(work: Work, dtype: str, limits: dict) -> float | None:
    """The rate that this work is compared with; None if it has neither flops nor bytes."""
    if work.flops:
        return limits["gemm"][dtype]
    if work.bytes:
        sizes = sorted(int(size) for size in limits["copy"])
        size = next((size for size in sizes if size >= work.bytes), sizes[-1])
        return limits["copy"][str(size)]
    return None


def _best_gemm_rate(
    sizes: Sequence[int], dtype: torch.dtype, seconds: float, device: Device
) -> float:
    return max(_gemm_rate(size, dtype, seconds, device) for size in sizes)


def _gemm_rate(size: int, dtype: torch.dtype, seconds: float, device: Device) -> float:
    left, right = torch.randn(2, size, size, device=device.name).to(dtype)
    products = device.products(left, right)
    return 2 * size**3 / min(_shortest(product, seconds, device) for product in products)


def _copy_rate(moved: int, seconds: float, device: Device) -> float:
    source = torch.ones(moved // 8, device=device.name)
    target = torch.empty_like(source)
    return moved / _shortest(lambda: target.copy_(source), seconds, device)


def _shortest(call: Callable[[], object], seconds: float, device: Device) -> float:
    """The shortest time of a call, after a first one that touches the memory."""
    timer = device.timer()
    call()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < MOST_TIMES):
        times.append(timer(call, 1))
    return min(times)

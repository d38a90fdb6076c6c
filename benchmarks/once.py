"""Runs the kernels of some cases once each, for a profiler.

    ncu --profile-from-start off ... python -m benchmarks.once --device cuda

Each call is made twice and profiled the second time; the first one loads and prepares everything.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from benchmarks.case import Case
from benchmarks.cases import all_cases
from benchmarks.device import CUDA, DEVICES, Device, one_line

KEYS = (
    "cross_entropy 8192 x 32000 bfloat16 forward_backward",
    "cross_entropy 65536 x 10 float32 forward_backward",
    "cross_entropy 32 x 128256 bfloat16 forward_backward",
    "cross_entropy 8 x 21 x 512 x 512 float32 forward_backward",
    "log_softmax 8192 x 32000 bfloat16 forward_backward",
    "nll_loss 8192 x 32000 bfloat16 forward_backward",
    "linear_relu 64, 128->64 float32 forward_backward",
    "linear_relu 8192, 4096->4096 bfloat16 forward_backward",
    "linear_relu products 8, 4096->32 float32 forward",
    "SGD momentum resnet50, 161 tensors float32 step",
    "SGD momentum resnet50, float32 momentum bfloat16 step",
    "SGD momentum 200 tensors of 100 float32 step",
)


def once(case: Case, device: Device) -> None:
    """Calls fastnn twice, the second time under the profiler."""
    ours, *_ = case.contenders()
    with torch.set_grad_enabled(case.records_graph):
        call = ours.bind(case.inputs(device.generator(0)))
        call()
        device.synchronize()
        with _profiled(device):
            call()
            device.synchronize()
    ours.close()


@contextmanager
def _profiled(device: Device) -> Iterator[None]:
    if device.name != CUDA.name:
        yield
        return
    torch.cuda.profiler.start()
    try:
        yield
    finally:
        torch.cuda.profiler.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the cases of the list that the device has."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.once")
    parser.add_argument("--device", choices=DEVICES, default=CUDA.name)
    device = DEVICES[parser.parse_args(arguments).device]
    complaint = device.complaint()
    if complaint is not None:
        print(f"benchmarks.once: error: {complaint}", file=sys.stderr)
        return 2
    failures = 0
    for case in (case for case in all_cases(device) if case.key in KEYS):
        try:
            once(case, device)
            print(case.key, flush=True)
        except Exception as problem:
            failures += 1
            print(f"{case.key}: {one_line(problem)}", file=sys.stderr, flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())

"""The cases, one file per operator: what is worth measuring on the CPU and on a GPU."""

from __future__ import annotations

from benchmarks.case import Case
from benchmarks.cases import (
    cross_entropy,
    linear,
    linear_cross_entropy,
    linear_relu,
    log_softmax,
    mlp,
    nll_loss,
    overhead,
    sgd,
    train_step,
)
from benchmarks.device import CPU, CUDA, Device

_FILES = (
    linear_relu,
    linear,
    mlp,
    cross_entropy,
    linear_cross_entropy,
    log_softmax,
    nll_loss,
    sgd,
    train_step,
)


def all_cases(device: Device = CPU) -> list[Case]:
    """All cases of a device in the order they are measured, important ones first."""
    if device.name == CUDA.name:
        timed = [case for file in _FILES for case in file.cuda_cases()]
    else:
        timed = [case for file in (*_FILES, overhead) for case in file.cases()]
    everything = timed + [case.in_memory_mode() for case in timed if case.large]
    return sorted(everything, key=lambda case: case.priority)

"""The cases, one file per operator."""

from __future__ import annotations

from benchmarks.case import Case
from benchmarks.cases import (
    cross_entropy,
    linear_relu,
    log_softmax,
    mlp,
    nll_loss,
    overhead,
    sgd,
)

_FILES = (linear_relu, cross_entropy, log_softmax, nll_loss, sgd, mlp, overhead)


def all_cases() -> list[Case]:
    """Every case, in the order of the table; those of peak memory last."""
    timed = [case for file in _FILES for case in file.cases()]
    return timed + [case.in_memory_mode() for case in timed if case.large]

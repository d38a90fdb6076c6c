"""Negative log likelihood loss of log-probabilities."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

import fastnn
from benchmarks.case import Case, Compiled, Contender, Function, Inputs, Work, classes, normal
from benchmarks.cases.classifiers import (
    CUDA_SIZES,
    DTYPES,
    MODES,
    SHAPES,
    label,
    on_cuda,
    size_facts,
)


def cases() -> list[Case]:
    return [_case(*shape, dtype, mode) for shape in SHAPES for dtype in DTYPES for mode in MODES]


def cuda_cases() -> list[Case]:
    return [
        on_cuda(_case(*size, mode), priority, compiles=False)
        for *size, priority in CUDA_SIZES
        for mode in MODES
    ]


def _case(rows: int, columns: int, dtype: torch.dtype, mode: str) -> Case:
    gradients = mode == "forward_backward"
    # Per row one element and the target are read; the gradient is written, zeros included.
    moved = rows * (dtype.itemsize + torch.int64.itemsize)
    if gradients:
        moved += rows * columns * dtype.itemsize
    return Case(
        op="nll_loss",
        label=label(rows, columns),
        dtype=dtype,
        mode=mode,
        inputs=partial(_inputs, rows=rows, columns=columns, dtype=dtype, gradients=gradients),
        contenders=_contenders,
        reference=Function("reference", F.nll_loss),
        work=Work(bytes=moved),
        **size_facts(rows, columns, mode),
    )


def _inputs(
    generator: torch.Generator, rows: int, columns: int, dtype: torch.dtype, gradients: bool
) -> Inputs:
    logits = normal(generator, rows, columns, dtype=torch.float32)
    log_probs = logits.log_softmax(1).to(dtype).requires_grad_(gradients)
    return Inputs((log_probs, classes(generator, columns, rows)))


def _contenders() -> list[Contender]:
    return [
        Function("fastnn", fastnn.functional.nll_loss),
        Function("F.nll_loss", F.nll_loss),
        Compiled("torch.compile", F.nll_loss),
    ]

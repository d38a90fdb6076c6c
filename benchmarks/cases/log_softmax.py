"""Log-softmax along the last dimension."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import fastnn
from benchmarks.case import Case, Compiled, Contender, Function, Inputs, Work, normal
from benchmarks.cases.classifiers import CUDA_SIZES, DTYPES, MODES, SHAPES, label, size_facts


def cases() -> list[Case]:
    return [_case(*shape, dtype, mode) for shape in SHAPES for dtype in DTYPES for mode in MODES]


def cuda_cases() -> list[Case]:
    return [
        replace(_case(*size, mode), large=False, priority=priority)
        for *size, priority in CUDA_SIZES
        for mode in MODES
    ]


def _case(rows: int, columns: int, dtype: torch.dtype, mode: str) -> Case:
    gradients = mode == "forward_backward"
    # Forward: reads input, writes output. Backward: reads output and its gradient, writes input's.
    passes = 5 if gradients else 2
    return Case(
        op="log_softmax",
        label=label(rows, columns),
        dtype=dtype,
        mode=mode,
        inputs=partial(_inputs, rows=rows, columns=columns, dtype=dtype, gradients=gradients),
        contenders=_contenders,
        reference=Function("reference", _eager),
        work=Work(bytes=passes * rows * columns * dtype.itemsize),
        **size_facts(rows, columns, mode),
    )


def _inputs(
    generator: torch.Generator, rows: int, columns: int, dtype: torch.dtype, gradients: bool
) -> Inputs:
    logits = normal(generator, rows, columns, dtype=dtype).requires_grad_(gradients)
    return Inputs((logits,), normal(generator, rows, columns, dtype=dtype) if gradients else None)


def _eager(logits: Tensor) -> Tensor:
    return F.log_softmax(logits, 1)


def _fused(logits: Tensor) -> Tensor:
    return fastnn.functional.log_softmax(logits, 1)


def _contenders() -> list[Contender]:
    return [
        Function("fastnn", _fused),
        Function("F.log_softmax", _eager),
        Compiled("torch.compile", _eager),
    ]

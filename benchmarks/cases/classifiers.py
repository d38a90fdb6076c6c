"""What the losses' cases share: shapes, and the inputs of a classifier's last operators."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.case import Case, Inputs, MeanOverRows, classes, normal

# Rows and classes: MNIST's batch; very many short rows; the classes of CIFAR and ImageNet; a
# language model's vocabulary, which fits in no cache.
SHAPES = ((64, 10), (65536, 10), (4096, 100), (512, 1000), (2048, 32000))
DTYPES = (torch.float32, torch.bfloat16)
MODES = ("forward", "forward_backward")
# On a GPU, for the operators that cross_entropy consists of: rows, classes, dtype, priority.
CUDA_SIZES = ((8192, 32000, torch.bfloat16, 2), (65536, 10, torch.float32, 2))

LARGE = 2**24  # elements above which peak memory is worth measuring
# The float64 reference and its copies dominate: inputs, log-probabilities, gradients, 8 bytes each.
PEAK_BYTES_PER_ELEMENT = 60
# On a GPU the reference copies only a block of rows at a time.
CUDA_PEAK_BYTES_PER_ELEMENT = 30


def label(rows: int, columns: int) -> str:
    return f"{rows} x {columns}"


def logits_and_targets(
    generator: torch.Generator, rows: int, columns: int, dtype: torch.dtype, gradients: bool
) -> Inputs:
    logits = normal(generator, rows, columns, dtype=dtype).requires_grad_(gradients)
    return Inputs((logits, classes(generator, columns, rows)))


def size_facts(rows: int, columns: int, mode: str) -> dict:
    """The fields of a case that depend only on its size."""
    large = rows * columns >= LARGE
    return {
        "large": large and mode == "forward_backward",
        "peak_bytes": PEAK_BYTES_PER_ELEMENT * rows * columns if large else 0,
    }


def on_cuda(case: Case, priority: int, large: bool = False, compiles: bool = True) -> Case:
    """The case as it is measured on a GPU, where the logits of a vocabulary have 2^30 elements.

    torch.compile takes seconds per case, so the less important forwards do without it.
    """
    elements = case.peak_bytes / PEAK_BYTES_PER_ELEMENT
    return replace(
        case,
        reference=MeanOverRows("reference", case.reference.function),
        peak_bytes=CUDA_PEAK_BYTES_PER_ELEMENT * elements,
        large=large,
        priority=priority,
        compiles=compiles and (priority == 1 or case.mode == "forward_backward"),
    )

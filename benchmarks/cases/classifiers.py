"""What the losses' cases share: shapes, and the inputs of a classifier's last operators."""

from __future__ import annotations

import torch

from benchmarks.case import Inputs, classes, normal

# Rows and classes: MNIST's batch; very many short rows; ImageNet's classes; a language model's
# vocabulary, which no cache holds.
SHAPES = ((64, 10), (65536, 10), (512, 1000), (2048, 32000))
DTYPES = (torch.float32, torch.bfloat16)
MODES = ("forward", "forward_backward")

LARGE = 2**24  # elements, from which peak memory is worth measuring
# The float64 reference and its copies dominate: inputs, log-probabilities, gradients, 8 bytes each.
PEAK_BYTES_PER_ELEMENT = 60


def label(rows: int, columns: int) -> str:
    return f"{rows} x {columns}"


def logits_and_targets(
    generator: torch.Generator, rows: int, columns: int, dtype: torch.dtype, gradients: bool
) -> Inputs:
    logits = normal(generator, rows, columns, dtype=dtype).requires_grad_(gradients)
    return Inputs((logits, classes(generator, rows, columns)))


def size_facts(rows: int, columns: int, mode: str) -> dict:
    """A case's fields that depend on its size alone."""
    large = rows * columns >= LARGE
    return {
        "large": large and mode == "forward_backward",
        "peak_bytes": PEAK_BYTES_PER_ELEMENT * rows * columns if large else 0,
    }

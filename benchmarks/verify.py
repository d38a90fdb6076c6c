"""The check before the timing: timing wrong results is worthless."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.case import Case, Contender, Inputs

# Elements: few enough to fit a CPU's cache, many enough to keep a GPU busy.
CPU_PIECE, GPU_PIECE = 2**18, 2**26


def check_inputs(case: Case, generator: torch.Generator) -> Inputs:
    """The inputs for checking the contenders."""
    return (case.check_inputs or case.inputs)(generator)


def expected(case: Case, inputs: Inputs) -> list[Tensor]:
    """The reference's results, computed in float64."""
    return list(_tensors(case.reference.exact(inputs)))


def error(contender: Contender, inputs: Inputs, reference: list[Tensor]) -> float:
    """The largest error over the results: sum of absolute errors over sum of absolute values."""
    results = list(_tensors(contender.check(inputs)))
    # A contender in another process may only return the first ones.
    pairs = list(zip(results, reference, strict=False))
    if not pairs or any(result.shape != want.shape for result, want in pairs):
        return float("inf")
    return max(_error(result, want) for result, want in pairs)


def _error(result: Tensor, reference: Tensor) -> float:
    """Works in pieces: temporaries as large as the result would take longer than the result."""
    pieces = zip(_pieces(result), _pieces(reference), strict=True)
    sums = [((got.double() - want).abs_().sum(), want.abs().sum()) for got, want in pieces]
    difference, size = (sum(column).item() for column in zip(*sums, strict=True))
    if difference == 0:
        return 0.0
    relative = difference / max(size, 1e-30)
    return relative if relative == relative else float("inf")  # NaN counts as infinitely wrong


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    piece = CPU_PIECE if tensor.device.type == "cpu" else GPU_PIECE
    return tensor.detach().flatten().split(piece)


def _tensors(results: object) -> Iterator[Tensor]:
    if isinstance(results, Tensor):
        yield results
    elif isinstance(results, (tuple, list)):
        for result in results:
            yield from _tensors(result)

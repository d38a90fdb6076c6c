"""Data for the tests that run over all operators: a record for each operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from support.sample_inputs import OPS
from support.small_cases import normal


class RowCall(NamedTuple):
    """The arguments of a call, in float64, in the operator's order.

    Args:
        by_row: tensors with a part for each row; the input comes first.
        shared: arguments that all rows share; they also fit a single row.
        first: how many of ``by_row`` come before ``shared`` (default: all).
    """

    by_row: tuple[Tensor, ...]
    shared: tuple[Any, ...]
    first: int | None = None

    def arguments(self, *by_row: Tensor) -> tuple[Any, ...]:
        """All arguments, with the tensors in ``by_row`` replaced."""
        by_row = by_row or self.by_row
        first = len(by_row) if self.first is None else self.first
        return (*by_row[:first], *self.shared, *by_row[first:])


class Cases(NamedTuple):
    """The cases of one operator; samples are names for ``sample_input``.

    Args:
        rows: makes a call with given numbers of rows, and of features or classes.
        every_tensor: a sample with every optional tensor.
        compiled: samples of each kind of call that a compiler treats differently.
        opcheck: samples of each option, in the layouts that the operator treats differently: the
            fake kernel must also return the real strides. The second one runs in all dtypes.
        several_dimensions: a sample whose output has more than one dimension.
        four_dimensions: a sample whose output has four dimensions, so it may be channels_last.
    """

    rows: Callable[[int, int], RowCall]
    every_tensor: str
    compiled: tuple[str, ...]
    opcheck: tuple[str, ...]
    several_dimensions: str
    four_dimensions: str


def _linear_rows(rows: int, features: int) -> RowCall:
    return RowCall((normal(rows, features),), (normal(2, features), normal(2)))


def _log_softmax_rows(rows: int, classes: int) -> RowCall:
    return RowCall((normal(rows, classes),), (-1,))


def _loss_rows(rows: int, classes: int) -> RowCall:
    return RowCall((normal(rows, classes), torch.arange(rows) % classes), ())


def _linear_cross_entropy_rows(rows: int, features: int) -> RowCall:
    target = torch.arange(rows) % 6
    return RowCall((normal(rows, features), target), (normal(6, features),), first=1)


_LOSS_OPCHECK = (
    *("5_mean", "7x5_none_weighted", "3x5x4_ignore3_none", "2x5x3x4_sum", "uint8_ignore255"),
    *("2x9x4x5_channels_last", "7x18_input_transposed", "0x5_empty_sum"),
)

_LINEAR = Cases(
    rows=_linear_rows,
    every_tensor="7x15_to_9",
    compiled=("7x15_to_9", "3d_input_no_bias"),
    opcheck=(
        *("7x15_to_9", "7x15_to_9_no_bias", "1d_input", "3d_input_reversed", "all_sliced"),
        *("0x3_to_2", "2x0_to_3", "2x3_to_0"),
    ),
    several_dimensions="7x15_to_9",
    four_dimensions="4d_input_channels_last",
)

CASES = {
    "linear": _LINEAR,
    "linear_relu": _LINEAR,
    "log_softmax": Cases(
        rows=_log_softmax_rows,
        every_tensor="rows_3x17",
        compiled=("rows_3x17",),
        opcheck=(
            *("0d_dim-1", "3d_dim1", "4d_channels_last_dim1", "transposed_dim0", "expanded_dim1"),
            "empty_(3,0)_dim1",
        ),
        several_dimensions="3d_transposed",
        four_dimensions="4d_dim1",
    ),
    "nll_loss": Cases(
        rows=_loss_rows,
        every_tensor="7x5_mean_weighted",
        compiled=("7x5_mean_weighted", "3x5x4_ignore3_none"),
        opcheck=_LOSS_OPCHECK,
        several_dimensions="3x5x4_none",
        four_dimensions="2x5x3x2x2_none",
    ),
    "cross_entropy": Cases(
        rows=_loss_rows,
        every_tensor="7x5_smooth0.1_mean_weighted",
        compiled=(
            *("7x5_mean", "7x5_smooth0.1_mean_weighted", "2x9x4x5_channels_last", "7x17_probs"),
        ),
        opcheck=(
            *_LOSS_OPCHECK,
            *("7x5_smooth0.1_mean_weighted", "3x5x4_smooth0.1_none", "channels_last_smooth"),
            *("7x17_probs", "3x5x4_probs_none_weighted_0.1", "channels_last_probs"),
            "0x5_probs_empty_none",
        ),
        several_dimensions="2x5x3x4_smooth0.1_none_weighted",
        four_dimensions="2x5x3x2x2_none",
    ),
    "linear_cross_entropy": Cases(
        rows=_linear_cross_entropy_rows,
        every_tensor="7x15_to_9_smooth0.1_mean_bias_weighted",
        compiled=(
            *("7x15_to_9_smooth0.1_mean_bias_weighted", "7x15_to_9_none", "7x15_to_9_probs"),
            "7x5_to_6x2x3_mean",
        ),
        opcheck=(
            *("7x15_to_9_mean", "7x15_to_9_smooth0.1_none_bias_weighted"),
            *("7x15_to_9_probs_none_weighted", "15_to_9_sum", "7x15_to_9_probs"),
            *("0x5_to_3_none", "7x0_to_3_sum", "all_transposed"),
        ),
        several_dimensions="7x5_to_6x2x3_none",
        four_dimensions="3x5_to_6x2x2x2_none",
    ),
}

COMPILE_SAMPLES = [(op, name) for op in OPS for name in CASES[op].compiled]

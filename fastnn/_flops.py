"""FLOP formulas of the operators that multiply matrices, for
:class:`torch.utils.flop_counter.FlopCounterMode`: those of torch's own matrix products."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import mm_flop, register_flop_formula


def _product_flops(input_shape: torch.Size, weight_shape: torch.Size) -> int:
    """Of (rows, in) times (in, out), or of one of its gradients, which take as many."""
    rows = prod(input_shape[:-1])
    return mm_flop((rows, weight_shape[1]), (weight_shape[1], weight_shape[0]))


@register_flop_formula(torch.ops.fastnn.linear_relu)
def _linear_relu(
    input_shape: torch.Size, weight_shape: torch.Size, *args: Any, **kwargs: Any
) -> int:
    return _product_flops(input_shape, weight_shape)


@register_flop_formula(torch.ops.fastnn.linear_relu_backward)
def _linear_relu_backward(
    grad_output_shape: torch.Size,
    input_shape: torch.Size,
    weight_shape: torch.Size,
    output_shape: torch.Size,
    output_mask: list[bool],
    **kwargs: Any,
) -> int:
    return (output_mask[0] + output_mask[1]) * _product_flops(input_shape, weight_shape)

"""FLOP formulas of the operators that multiply matrices, for
:class:`torch.utils.flop_counter.FlopCounterMode`: those of torch's own matrix products.
"""

from __future__ import annotations

from math import prod
from types import ModuleType
from typing import Any

import torch

from fastnn._when_imported import when_imported


def _linear_relu(
    input_shape: torch.Size, weight_shape: torch.Size, *args: Any, **kwargs: Any
) -> int:
    return 2 * prod(input_shape) * weight_shape[0]


def _linear_relu_backward(
    grad_output_shape: torch.Size,
    input_shape: torch.Size | None,
    weight_shape: torch.Size | None,
    output_shape: torch.Size,
    output_mask: list[bool],
    **kwargs: Any,
) -> int:
    """Each gradient of a factor takes as many as the product itself."""
    flops = 2 * prod(output_shape)
    wants_input, wants_weight, _ = output_mask
    for_input = flops * weight_shape[1] if wants_input and weight_shape is not None else 0
    for_weight = flops * input_shape[-1] if wants_weight and input_shape is not None else 0
    return for_input + for_weight


def _register(counter: ModuleType) -> None:
    counter.register_flop_formula(torch.ops.fastnn.linear_relu)(_linear_relu)
    counter.register_flop_formula(torch.ops.fastnn.linear_relu_backward)(_linear_relu_backward)


when_imported("torch.utils.flop_counter", _register)

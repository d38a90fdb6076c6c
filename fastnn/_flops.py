"""FLOP formulas of the operators that multiply matrices, for
:class:`torch.utils.flop_counter.FlopCounterMode`: those of torch's own matrix products.

They are registered when somebody imports the counter. To import it here would make every import of
fastnn wait for what it imports: with a CUDA build of torch that is triton, half a second.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from math import prod
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"


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


class _WhenImported(MetaPathFinder):
    """Finds the counter as it would be found without this, once, and registers the formulas."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _COUNTER in sys.modules:
    _register(sys.modules[_COUNTER])
else:
    sys.meta_path.insert(0, _WhenImported())

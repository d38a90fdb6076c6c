"""Linear followed by ReLU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import fastnn
from benchmarks.case import Case, Compiled, Contender, Function, Inputs, Work, normal
from benchmarks.device import CPU

# Rows, input features, output features: the MNIST MLP's two layers, the first at a larger batch, a
# middle and a large square one.
SHAPES = (
    (64, 784, 128),
    (256, 784, 128),
    (64, 128, 64),
    (128, 512, 512),
    (1024, 1024, 1024),
)
# What counts as close to zero: a hundred times float32's rounding error in a sum of 1024 terms.
NEAR_ZERO = 1e-3


def cases() -> list[Case]:
    return [
        _case(shape, dtype, mode)
        for shape in SHAPES
        for dtype in (torch.float32, torch.bfloat16)
        for mode in ("forward", "forward_backward")
    ]


def _case(shape: tuple[int, int, int], dtype: torch.dtype, mode: str) -> Case:
    rows, ins, outs = shape
    gemms = 1 if mode == "forward" else 3
    arguments = {"shape": shape, "dtype": dtype, "gradients": mode == "forward_backward"}
    return Case(
        op="linear_relu",
        label=f"{rows}, {ins}->{outs}",
        dtype=dtype,
        mode=mode,
        inputs=partial(_inputs, **arguments),
        check_inputs=partial(_check_inputs, **arguments),
        contenders=_forward_contenders if mode == "forward" else _contenders,
        reference=Function("reference", _eager),
        work=Work(flops=gemms * 2.0 * rows * ins * outs),
    )


def _inputs(
    generator: torch.Generator, shape: tuple[int, int, int], dtype: torch.dtype, gradients: bool
) -> Inputs:
    rows, ins, outs = shape
    input = normal(generator, rows, ins, dtype=dtype)
    weight = normal(generator, outs, ins, dtype=dtype, scale=ins**-0.5)
    bias = normal(generator, outs, dtype=dtype)
    if not gradients:
        return Inputs((input, weight, bias))
    leaves = tuple(leaf.requires_grad_() for leaf in (input, weight, bias))
    return Inputs(leaves, normal(generator, rows, outs, dtype=dtype))


def _check_inputs(generator: torch.Generator, **arguments) -> Inputs:
    """Units within rounding of zero get no gradient: which side they are on is nobody's error."""
    inputs = _inputs(generator, **arguments)
    if inputs.grad is not None:
        with torch.no_grad():
            unclamped = F.linear(*inputs.double().args)
            inputs.grad.masked_fill_(unclamped.abs() < NEAR_ZERO, 0)
    return inputs


def _contenders() -> list[Contender]:
    return [
        Function("fastnn", fastnn.functional.linear_relu),
        Function("F.relu(F.linear)", _eager),
        Compiled("torch.compile", _eager),
    ]


def _forward_contenders() -> list[Contender]:
    return [
        *_contenders(),
        Function("mkldnn", _mkldnn, trainable=False, devices=(CPU.name,)),
        Prepacked("mkldnn packed", _mkldnn, _pack_mkldnn, trainable=False, devices=(CPU.name,)),
        Function("_addmm_activation", _addmm_activation, trainable=False),
    ]


def _eager(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.linear(input, weight, bias))


def _mkldnn(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "relu", [], "")


def _pack_mkldnn(input: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return input, torch.ops.mkldnn._reorder_linear_weight(weight, input.shape[0]), bias


def _addmm_activation(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch._addmm_activation(bias, input, weight.t())


@dataclass
class Prepacked(Function):
    """A function whose arguments are brought into its own layout once, outside the timed call."""

    pack: Callable[..., tuple]

    def bind(self, inputs: Inputs) -> Callable[[], object]:
        return partial(self.function, *self.pack(*inputs.args))

"""Linear followed by ReLU."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import fastnn
from benchmarks.case import Case, Compiled, Contender, Function, Inputs, Work, normal
from benchmarks.device import CPU

# Rows, input features, output features: the MNIST MLP's two layers, the first at a larger batch
# size, a medium layer and a large square one.
SHAPES = (
    (64, 784, 128),
    (256, 784, 128),
    (64, 128, 64),
    (128, 512, 512),
    (1024, 1024, 1024),
)
MODES = ("forward", "forward_backward")
# In float32 only: a wide layer with few rows, as in inference and fine-tuning; tall thin matrices;
# a long inner dimension.
MORE_SHAPES = (
    (1, 1000, 1000),
    (4, 1000, 4096),
    (16, 4096, 1000),
    (100000, 2, 2),
    (65536, 16, 4),
    (512, 2048, 512),
)
# The backward's products one by one, each with the ReLU's mask applied.
BACKWARD_SHAPES = (*SHAPES, (512, 2048, 512))
# On a GPU, with priorities: MNIST's two layers, a single image, a medium layer, a language model.
CUDA_SHAPES = (
    ((64, 784, 128), 1),
    ((8192, 4096, 4096), 1),
    ((1024, 1024, 1024), 2),
    ((1, 784, 128), 2),
    ((64, 128, 64), 3),
)
# torch.compile uses the same library for products: it can only gain by fusing the ReLU.
CUDA_COMPILED = ((64, 784, 128), (8192, 4096, 4096))
# Our product against the library's: around the size at which fastnn switches to the library, and
# with few rows or a long inner dimension.
PRODUCT_SHAPES = (
    (1, 784, 128),
    (1, 4096, 4096),
    (8, 4096, 32),
    (16, 4096, 4096),
    (64, 128, 64),
    (64, 256, 64),
    (64, 784, 128),
    (64, 4096, 64),
    (128, 128, 128),
    (256, 256, 256),
    (512, 64, 512),
    (4096, 16, 64),
)
PRODUCT_VARIABLE = "FASTNN_CUDA_GEMM"
# TF32 rounds factors to 2^-11, and hence a sum of products with random signs by about as much.
TF32_TOLERANCE = 5e-3
# Close to zero: a hundred times float32's rounding error in a sum of 1024 terms.
NEAR_ZERO = 1e-3


def cases() -> list[Case]:
    whole = [
        _case(shape, dtype, mode)
        for shape in SHAPES
        for dtype in (torch.float32, torch.bfloat16)
        for mode in MODES
    ]
    more = [_case(shape, torch.float32, mode) for shape in MORE_SHAPES for mode in MODES]
    parts = [_part_case(shape, part) for shape in BACKWARD_SHAPES for part in PARTS]
    return whole + more + parts


def cuda_cases() -> list[Case]:
    plain = [
        replace(_case(shape, dtype, mode), priority=priority, compiles=shape in CUDA_COMPILED)
        for shape, priority in CUDA_SHAPES
        for dtype in (torch.float32, torch.bfloat16)
        for mode in MODES
    ]
    with_tf32 = [
        replace(case, tf32=True, tolerance=TF32_TOLERANCE)
        for case in plain
        if case.dtype == torch.float32
    ]
    products = [
        _product_case(shape, dtype)
        for shape in PRODUCT_SHAPES
        for dtype in (torch.float32, torch.bfloat16)
    ]
    return plain + with_tf32 + products


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
    """Units within rounding of zero get no gradient, since rounding may put them on either side."""
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


# ---- the backward's parts ------------------------------------------------------------------------


def _grad_input(grad: Tensor, input: Tensor, weight: Tensor, output: Tensor) -> Tensor:
    wanted = [True, False, False]
    return torch.ops.fastnn.linear_relu_backward(grad, None, weight, output, wanted)[0]


def _eager_grad_input(grad: Tensor, input: Tensor, weight: Tensor, output: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(grad, output, 0) @ weight


def _grad_weight(grad: Tensor, input: Tensor, weight: Tensor, output: Tensor) -> Tensor:
    wanted = [False, True, False]
    return torch.ops.fastnn.linear_relu_backward(grad, input, None, output, wanted)[1]


def _eager_grad_weight(grad: Tensor, input: Tensor, weight: Tensor, output: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(grad, output, 0).t() @ input


PARTS = {
    "input": (_grad_input, _eager_grad_input),
    "weight": (_grad_weight, _eager_grad_weight),
}


def _part_case(shape: tuple[int, int, int], part: str) -> Case:
    rows, ins, outs = shape
    ours, torchs = PARTS[part]
    inputs = partial(_part_inputs, shape=shape)
    return Case(
        op=f"linear_relu gradient of {part}",
        label=f"{rows}, {ins}->{outs}",
        dtype=torch.float32,
        mode="forward",
        inputs=inputs,
        contenders=lambda: [
            Function("fastnn", ours),
            Function("threshold_backward, mm", torchs),
            Compiled("torch.compile", torchs),
        ],
        reference=Function("reference", torchs),
        work=Work(flops=2.0 * rows * ins * outs),
    )


def _part_inputs(generator: torch.Generator, shape: tuple[int, int, int]) -> Inputs:
    rows, ins, outs = shape
    grad = normal(generator, rows, outs, dtype=torch.float32)
    input = normal(generator, rows, ins, dtype=torch.float32)
    weight = normal(generator, outs, ins, dtype=torch.float32, scale=ins**-0.5)
    return Inputs((grad, input, weight, normal(generator, rows, outs, dtype=torch.float32).relu()))


# ---- our product against the library's -----------------------------------------------------------


def _product_case(shape: tuple[int, int, int], dtype: torch.dtype) -> Case:
    return replace(
        _case(shape, dtype, "forward"),
        op="linear_relu products",
        contenders=lambda: [
            Function("fastnn", fastnn.functional.linear_relu),
            *(Function(f"fastnn {name}", _by_product(name)) for name in ("tiled", "library")),
            Function("F.relu(F.linear)", _eager),
        ],
        compiles=False,
        priority=2,
    )


def _by_product(name: str) -> Callable[..., Tensor]:
    """linear_relu with one of its two products, chosen by an environment variable at the call."""

    def linear_relu(*args: Tensor) -> Tensor:
        before = os.environ.get(PRODUCT_VARIABLE, "")
        os.environ[PRODUCT_VARIABLE] = name
        try:
            return fastnn.functional.linear_relu(*args)
        finally:
            os.environ[PRODUCT_VARIABLE] = before

    return linear_relu


@dataclass
class Prepacked(Function):
    """A function whose arguments are converted to its own layout once, outside the timed call."""

    pack: Callable[..., tuple]

    def bind(self, inputs: Inputs) -> Callable[[], object]:
        return partial(self.function, *self.pack(*inputs.args))

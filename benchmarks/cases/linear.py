"""Linear layers without a ReLU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import fastnn
from benchmarks.case import Case, Compiled, Contender, Function
from benchmarks.cases import linear_relu
from benchmarks.device import CPU

# The MNIST MLP's last layer at two batch sizes; a medium and a large layer.
SHAPES = ((64, 64, 10), (256, 64, 10), (128, 512, 256), (1024, 1024, 1024))
CUDA_SHAPES = ((64, 64, 10), (1024, 1024, 1024))


def cases() -> list[Case]:
    return [
        _case(shape, dtype, mode)
        for shape in SHAPES
        for dtype in (torch.float32, torch.bfloat16)
        for mode in linear_relu.MODES
    ]


def cuda_cases() -> list[Case]:
    """Only a few: the library computes the product, and linear_relu's cases cover our part."""
    return [
        replace(_case(shape, dtype, mode), priority=3, compiles=False)
        for shape in CUDA_SHAPES
        for dtype in (torch.float32, torch.bfloat16)
        for mode in linear_relu.MODES
    ]


def _case(shape: tuple[int, int, int], dtype: torch.dtype, mode: str) -> Case:
    """Shares linear_relu's inputs; without a ReLU there is no kink to avoid."""
    inputs = partial(
        linear_relu._inputs, shape=shape, dtype=dtype, gradients=mode == "forward_backward"
    )
    return replace(
        linear_relu._case(shape, dtype, mode),
        op="linear",
        check_inputs=inputs,
        contenders=_forward_contenders if mode == "forward" else _contenders,
        reference=Function("reference", F.linear),
    )


def _contenders() -> list[Contender]:
    return [
        Function("fastnn", fastnn.functional.linear),
        Function("F.linear", F.linear),
        Compiled("torch.compile", F.linear),
    ]


def _forward_contenders() -> list[Contender]:
    packed = linear_relu.Prepacked(
        "mkldnn packed",
        _mkldnn,
        linear_relu._pack_mkldnn,
        trainable=False,
        devices=(CPU.name,),
    )
    return [
        *_contenders(),
        Function("mkldnn", _mkldnn, trainable=False, devices=(CPU.name,)),
        packed,
    ]


def _mkldnn(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")

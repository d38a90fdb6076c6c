"""Linear layers in a row with ReLUs between them: mlp, against the layers one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

import fastnn
from benchmarks.case import Case, Compiled, Contender, Function, Inputs, Work, normal

# Rows, and the sizes of the layers: the MNIST MLP at two batch sizes, and a wider one.
CHAINS = (
    (64, (784, 128, 64, 10)),
    (256, (784, 128, 64, 10)),
    (128, (784, 512, 256, 10)),
)
MODES = ("forward", "forward_backward")


def cases() -> list[Case]:
    return [
        _case(rows, sizes, dtype, mode)
        for rows, sizes in CHAINS
        for dtype in (torch.float32, torch.bfloat16)
        for mode in MODES
    ]


def cuda_cases() -> list[Case]:
    """On a GPU mlp runs layer by layer."""
    return [
        replace(_case(*CHAINS[0], dtype, mode), priority=3, compiles=False)
        for dtype in (torch.float32, torch.bfloat16)
        for mode in MODES
    ]


def _case(rows: int, sizes: Sequence[int], dtype: torch.dtype, mode: str) -> Case:
    products = [2.0 * rows * ins * outs for ins, outs in pairwise(sizes)]
    # Training needs no gradient of the input.
    flops = sum(products) if mode == "forward" else 3 * sum(products) - products[0]
    arguments = {"rows": rows, "sizes": sizes, "dtype": dtype, "gradients": mode != "forward"}
    return Case(
        op="mlp",
        label=f"{rows}, {'->'.join(map(str, sizes))}",
        dtype=dtype,
        mode=mode,
        inputs=partial(_inputs, **arguments),
        check_inputs=partial(_check_inputs, **arguments),
        contenders=_contenders,
        reference=Function("reference", _eager),
        work=Work(flops=flops),
    )


def _inputs(
    generator: torch.Generator,
    rows: int,
    sizes: Sequence[int],
    dtype: torch.dtype,
    gradients: bool,
) -> Inputs:
    input = normal(generator, rows, sizes[0], dtype=dtype)
    parameters = []
    for ins, outs in pairwise(sizes):
        parameters.append(normal(generator, outs, ins, dtype=dtype, scale=ins**-0.5))
        parameters.append(normal(generator, outs, dtype=dtype))
    if not gradients:
        return Inputs((input, *parameters))
    leaves = [parameter.requires_grad_() for parameter in parameters]
    return Inputs((input, *leaves), normal(generator, rows, sizes[-1], dtype=dtype))


def _check_inputs(generator: torch.Generator, **arguments) -> Inputs:
    """Biases that keep the ReLUs' inputs from zero, where rounding could flip their sign."""
    inputs = _inputs(generator, **arguments)
    input, *parameters = inputs.args
    with torch.no_grad():
        x = input.double()
        for weight, bias in list(zip(parameters[::2], parameters[1::2], strict=True))[:-1]:
            # Put each unit on the same side in all rows, so that rounding can't flip it.
            before = F.linear(x, weight.double())
            sides = torch.sign(bias).double()
            bias.copy_(sides * (before.abs().amax(0) + 1))
            x = F.relu(before + bias.double())
    return inputs


def _contenders() -> list[Contender]:
    return [
        Function("fastnn", _mlp),
        Function("fastnn layer by layer", _layers),
        Function("torch", _eager),
        Compiled("torch.compile", _eager),
    ]


def _mlp(input: Tensor, *parameters: Tensor) -> Tensor:
    return fastnn.functional.mlp(input, parameters[::2], parameters[1::2])


def _layers(input: Tensor, *parameters: Tensor) -> Tensor:
    *hidden, last = zip(parameters[::2], parameters[1::2], strict=True)
    for weight, bias in hidden:
        input = fastnn.functional.linear_relu(input, weight, bias)
    return fastnn.functional.linear(input, *last)


def _eager(input: Tensor, *parameters: Tensor) -> Tensor:
    *hidden, last = zip(parameters[::2], parameters[1::2], strict=True)
    for weight, bias in hidden:
        input = F.relu(F.linear(input, weight, bias))
    return F.linear(input, *last)

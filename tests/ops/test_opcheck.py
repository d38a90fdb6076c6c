"""torch.library.opcheck of every operator, and the dtypes of its fake outputs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._pytree import tree_map_only

from support.marks import needs_extension
from support.operator_cases import CASES
from support.operators import leaves_of, ours, random_grad_like
from support.sample_inputs import DTYPES, OPS, Sample, on_device, sample_input

OPCHECK_CASES = [
    pytest.param(op, name, id=f"{op}-{name}") for op in OPS for name in CASES[op].opcheck
]

# The operators' own argument lists lack the deprecated pair and dtype=.
LOSS_DEFAULTS = {"weight": None, "ignore_index": -100, "reduction": "mean"}


@needs_extension
@pytest.mark.parametrize(("op", "name"), OPCHECK_CASES)
@pytest.mark.capability("compile", "`torch.library.opcheck`")
def test_opcheck_for_users(op, name):
    sample = sample_input(op, torch.float32, name)
    leaves = leaves_of(op, sample)
    arguments = (*leaves, *sample.args[len(leaves) :])
    opcheck(getattr(torch.ops.fastnn, op).default, arguments, sample.kwargs)


# An operator and its arguments.
Call = tuple[str, tuple]


def linear_calls(sample: Sample, output: Tensor, grad: Tensor) -> Iterator[Call]:
    input, weight, *bias = sample.args
    wants_bias = len(bias) > 0
    yield "linear_backward", (grad, input, weight, [True, True, wants_bias])
    yield "linear_backward", (grad, None, weight, [True, False, wants_bias])
    yield "linear_backward", (grad, input, None, [False, True, False])
    yield "linear_backward", (grad, None, None, [False, False, True])


def linear_relu_calls(sample: Sample, output: Tensor, grad: Tensor) -> Iterator[Call]:
    input, weight, *bias = sample.args
    wants_bias = len(bias) > 0
    yield "linear_relu_backward", (grad, input, weight, output, [True, True, wants_bias])
    yield "linear_relu_backward", (grad, None, weight, output, [True, False, wants_bias])
    yield "linear_relu_backward", (grad, input, None, output, [False, True, False])
    yield "linear_relu_backward", (grad, None, None, output, [False, False, True])


def log_softmax_calls(sample: Sample, output: Tensor, grad: Tensor) -> Iterator[Call]:
    dim = sample.args[1]
    yield "log_softmax_backward", (grad, output, dim)
    if grad.dtype.itemsize == 2:
        yield "log_softmax", (*sample.args, torch.float32)
        yield "log_softmax_backward", (grad.float(), output.float(), dim, grad.dtype)


def nll_loss_calls(sample: Sample, output: Tensor, grad: Tensor) -> Iterator[Call]:
    weight, *options = {**LOSS_DEFAULTS, **sample.kwargs}.values()
    forward = (*sample.args, weight, *options)
    yield "nll_loss_forward", forward
    _loss, total_weight = torch.ops.fastnn.nll_loss_forward(*forward)
    yield "nll_loss_backward", (grad, *sample.args, weight, total_weight, *options)
    if grad.dtype.itemsize == 2 and weight is None:
        yield "nll_loss_forward", (*forward, torch.float32)
        yield (
            "nll_loss_backward",
            (grad.float(), *sample.args, weight, total_weight, *options),
        )


def cross_entropy_calls(sample: Sample, output: Tensor, grad: Tensor) -> Iterator[Call]:
    options = {**LOSS_DEFAULTS, "label_smoothing": 0.0, **sample.kwargs}
    weight, *options = options.values()
    forward = (*sample.args, weight, *options)
    for keep in (False, True):
        yield "cross_entropy_forward", (*forward, keep)
    _loss, kept, *saved = torch.ops.fastnn.cross_entropy_forward(*forward, True)
    for backward in ("cross_entropy_backward", "cross_entropy_backward_"):
        yield backward, (grad, kept, sample.args[1], weight, *saved, *options)
    if kept.dtype.itemsize == 2 and weight is None:
        yield "cross_entropy_forward", (*forward, True, torch.float32)
        yield (
            "cross_entropy_backward",
            (grad.float(), kept, sample.args[1], weight, *saved, *options),
        )


def linear_cross_entropy_calls(sample: Sample, output: Tensor, grad: Tensor) -> Iterator[Call]:
    options = {"linear_bias": None, **LOSS_DEFAULTS, "label_smoothing": 0.0, **sample.kwargs}
    bias, weight = options["linear_bias"], options["weight"]
    numbers = options["ignore_index"], options["label_smoothing"], None, 1.0, 0.0
    tensors = *sample.args, bias, weight
    wanted = [True, True, bias is not None]
    mean = "mean" if sample.args[0].numel() else "sum"  # no rows: NaN
    for reduction, mask in ((mean, wanted), ("sum", [False, True, False]), ("none", [False] * 3)):
        normalizer = torch.tensor(3.0) if reduction == "sum" else None
        forward = *tensors, reduction, *numbers, normalizer, None, mask
        yield "linear_cross_entropy_forward", forward
    losses, *_, lse = torch.ops.fastnn.linear_cross_entropy_forward(*forward)
    backward = torch.randn_like(losses), *tensors, lse, *numbers, None, wanted
    yield "linear_cross_entropy_backward", backward


CALLS = {
    "linear": linear_calls,
    "linear_relu": linear_relu_calls,
    "log_softmax": log_softmax_calls,
    "nll_loss": nll_loss_calls,
    "cross_entropy": cross_entropy_calls,
    "linear_cross_entropy": linear_cross_entropy_calls,
}


def forward_and_backward_calls(op: str, sample: Sample) -> Iterator[Call]:
    """The operators that the public one consists of, with arguments as it passes them."""
    output = ours(op)(*sample.args, **sample.kwargs)
    return CALLS[op](sample, output, random_grad_like(op, sample, output))


@needs_extension
@pytest.mark.parametrize(("op", "name"), OPCHECK_CASES)
def test_opcheck_forwards_and_backwards(op, name):
    sample = sample_input(op, torch.float32, name)
    for operator, arguments in forward_and_backward_calls(op, sample):
        opcheck(getattr(torch.ops.fastnn, operator).default, arguments)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_fake_outputs_have_the_real_dtypes(op, dtype):
    """The dtype of sums is not the input's."""
    name = CASES[op].opcheck[1]
    for operator, arguments in forward_and_backward_calls(op, sample_input(op, dtype, name)):
        operator = getattr(torch.ops.fastnn, operator).default
        opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@needs_extension
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "is_first_step": True},
        {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01, "maximize": True},
        {"momentum": 0.9, "nesterov": True},
        {"grad_scale": torch.tensor(8.0), "found_inf": torch.tensor(0.0)},
        {"grad_scale": torch.tensor(8.0), "found_inf": torch.tensor(1.0)},
    ],
    ids=["plain", "first", "momentum", "nesterov", "scaled", "skipped"],
)
@pytest.mark.capability("compile", "`torch.library.opcheck`", operators=["SGD"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_sgd_step(dtype, options):
    def tensors(dtype: torch.dtype) -> list[Tensor]:
        shapes = [torch.randn(3, 5), torch.randn(4, 2).t(), torch.randn(())]
        return [tensor.to(dtype) for tensor in shapes]

    buffers = tensors(torch.float32) if options.get("momentum") else []
    arguments = (tensors(dtype), tensors(dtype), buffers)
    options = tree_map_only(Tensor, on_device, options)
    opcheck(torch.ops.fastnn.sgd_step_.default, arguments, {"lr": 0.1, **options})

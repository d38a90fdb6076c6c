"""torch.library.opcheck of every operator, and the dtypes of its fake outputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._pytree import tree_map_only

from support.marks import needs_extension
from support.operators import leaves_of, ours, random_grad_like
from support.sample_inputs import DTYPES, OPS, Sample, on_device, sample_input

# Each option once, in the layouts that an operator treats in different ways: the fake kernel must
# give the real one's strides too.
OPCHECK_SAMPLES = {
    "linear_relu": (
        *("7x15_to_9", "7x15_to_9_no_bias", "1d_input", "3d_input_reversed", "all_sliced"),
        *("0x3_to_2", "2x0_to_3", "2x3_to_0"),
    ),
    "log_softmax": (
        *("0d_dim-1", "3d_dim1", "4d_channels_last_dim1", "transposed_dim0", "expanded_dim1"),
        "empty_(3,0)_dim1",
    ),
    "nll_loss": (
        *("5_mean", "7x5_none_weighted", "3x5x4_ignore3_none", "2x5x3x4_sum", "uint8_ignore255"),
        *("2x9x4x5_channels_last", "7x18_input_transposed", "0x5_empty_sum"),
    ),
    "cross_entropy": (
        *("5_mean", "7x5_none_weighted", "3x5x4_ignore3_none", "2x5x3x4_sum", "uint8_ignore255"),
        *("2x9x4x5_channels_last", "7x18_input_transposed", "0x5_empty_sum"),
        *("7x5_smooth0.1_mean_weighted", "3x5x4_smooth0.1_none", "channels_last_smooth"),
        *("7x17_probs", "3x5x4_probs_none_weighted_0.1", "channels_last_probs"),
        "0x5_probs_empty_none",
    ),
}
OPCHECK_CASES = [
    pytest.param(op, name, id=f"{op}-{name}")
    for op, names in OPCHECK_SAMPLES.items()
    for name in names
]

# The operators' own argument lists have neither the deprecated pair nor dtype=.
LOSS_DEFAULTS = {"weight": None, "ignore_index": -100, "reduction": "mean"}


def loss_options(op: str, sample: Sample) -> dict[str, Any]:
    smoothing = {"label_smoothing": 0.0} if op == "cross_entropy" else {}
    return {**LOSS_DEFAULTS, **smoothing, **sample.kwargs}


@needs_extension
@pytest.mark.parametrize(("op", "name"), OPCHECK_CASES)
@pytest.mark.capability("compile", "`torch.library.opcheck`")
def test_opcheck_for_users(op, name):
    sample = sample_input(op, torch.float32, name)
    leaves = leaves_of(op, sample)
    arguments = (*leaves, *sample.args[len(leaves) :])
    opcheck(getattr(torch.ops.fastnn, op).default, arguments, sample.kwargs)


def forward_and_backward_calls(op: str, sample: Sample) -> Iterator[tuple[str, tuple]]:
    """The operators that the one for users is made of, and arguments as it gives them."""
    operators = torch.ops.fastnn
    args = sample.args
    output = ours(op)(*args, **sample.kwargs)
    grad = random_grad_like(op, sample, output)
    if op == "linear_relu":
        bias = len(args) > 2
        yield "linear_relu_backward", (grad, *args[:2], output, [True, True, bias])
        yield "linear_relu_backward", (grad, None, args[1], output, [True, False, bias])
        yield "linear_relu_backward", (grad, args[0], None, output, [False, True, False])
        yield "linear_relu_backward", (grad, None, None, output, [False, False, True])
    elif op == "log_softmax":
        yield "log_softmax_backward", (grad, output, args[1])
    elif op == "nll_loss":
        weight, *options = loss_options(op, sample).values()
        yield "nll_loss_forward", (*args, weight, *options)
        _loss, total_weight = operators.nll_loss_forward(*args, weight, *options)
        yield "nll_loss_backward", (grad, *args, weight, total_weight, *options)
    else:
        weight, *options = loss_options(op, sample).values()
        for keep in (False, True):
            yield "cross_entropy_forward", (*args, weight, *options, keep)
        _loss, kept, *saved = operators.cross_entropy_forward(*args, weight, *options, True)
        for backward in ("cross_entropy_backward", "cross_entropy_backward_"):
            yield backward, (grad, kept, args[1], weight, *saved, *options)


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
    """The sums' dtype is not the input's."""
    name = OPCHECK_SAMPLES[op][1]
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

"""PyTorch's own test inputs (``torch.testing._internal``: OpInfo, OptimizerInfo) through fastnn.

Values and gradients agree with torch's to its own tolerances. Where they don't, in low precision,
fastnn's must be as close to the float64 result as torch's, or one rounding away.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch.testing._comparison import default_tolerances
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db
from torch.utils._pytree import tree_map

import fastnn
from support.operators import TORCH
from support.oracles import logit_gradient_roundoff
from support.sample_inputs import DTYPES, Draws

# For each operator, the OpInfo that provides its samples.
OPINFOS = {
    "linear": "nn.functional.linear",
    "linear_relu": "nn.functional.linear",
    "log_softmax": "log_softmax",
    "nll_loss": "nn.functional.nll_loss",
    "cross_entropy": "nn.functional.cross_entropy",
    "linear_cross_entropy": "nn.functional.linear_cross_entropy",
}
# Some have several variants, each with its own samples.
CASES = [
    pytest.param(name, op, id=f"{name}-{op.formatted_name}")
    for name, opinfo in OPINFOS.items()
    for op in op_db
    if op.name == opinfo
]


def copied(sample, dtype: torch.dtype | None = None):
    """The sample's (args, kwargs), copied; floating tensors and dtypes converted to `dtype`."""

    def copy(value):
        if isinstance(value, torch.dtype):
            return dtype or value
        if not isinstance(value, torch.Tensor):
            return value
        to = dtype if value.is_floating_point() else None
        return value.detach().to(to, copy=True).requires_grad_(value.requires_grad)

    return tree_map(copy, (sample.input, *sample.args)), tree_map(copy, sample.kwargs)


def result_and_gradients(function: Callable, args: tuple, kwargs: dict) -> list:
    """The function's result, then the gradient of each argument that wants one."""
    result = function(*args, **kwargs)
    leaves = [
        value
        for value in (*args, *kwargs.values())
        if isinstance(value, torch.Tensor) and value.requires_grad
    ]
    if not leaves or not result.requires_grad:
        return [result]
    ones = torch.ones_like(result)
    return [result, *torch.autograd.grad(result, leaves, ones, allow_unused=True)]


def error_of(value: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest difference; equal infinities, or NaN on both sides, count as none."""
    difference = (value.double() - exact).abs()
    same = (value.double() == exact) | (value.isnan() & exact.isnan())
    return difference.masked_fill(same, 0).max().item() if value.numel() else 0.0


def assert_agrees(
    ours: list, theirs: list, exact: Callable[[], list], roundings: float = 1.01
) -> None:
    """Allows `roundings` of the largest value where dtypes are narrow."""
    assert len(ours) == len(theirs)
    for i, (actual, expected) in enumerate(zip(ours, theirs, strict=True)):
        if expected is None:
            assert actual is None
            continue
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        if torch.allclose(actual, expected, *default_tolerances(expected.dtype), equal_nan=True):
            continue
        assert expected.dtype in (torch.bfloat16, torch.float16)
        reference = exact()[i].detach()
        # One rounding of the largest value is always allowed.
        rounding = torch.finfo(expected.dtype).eps / 2 * reference[reference.isfinite()].abs().max()
        allowed = max(error_of(expected.detach(), reference), roundings * rounding.item())
        assert error_of(actual.detach(), reference) <= allowed


@pytest.mark.filterwarnings("ignore:linear_cross_entropy. ..options")  # torch's own
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "op"), CASES)
@pytest.mark.capability("inputs", "OpInfo's samples, float64 to float16: values, gradients")
def test_op_agrees_on_torchs_samples(name, op, dtype, record_agreement) -> None:
    ours, theirs = getattr(fastnn.functional, name), TORCH[name]
    device = torch.get_default_device()
    samples = list(op.sample_inputs(device, dtype, requires_grad=True))
    assert samples
    # Where the gradient of the logits is rounded for its products, so is each term of their sums.
    # torch's rounds it on GPUs alone.
    rounded_terms = name == "linear_cross_entropy" and logit_gradient_roundoff(dtype) > 0
    roundings = 4 if rounded_terms else 1.01
    for sample in samples:

        def run(function, to=None, sample=sample):
            args, kwargs = copied(sample, to)
            if to is not None:
                kwargs.pop("options", None)  # how torch computes it in the narrow dtype
            return result_and_gradients(function, args, kwargs)

        try:
            expected = run(theirs)
        except Exception as error:  # a sample that torch itself rejects
            with pytest.raises(type(error)):
                run(ours)
        else:
            assert_agrees(
                run(ours), expected, lambda run=run: run(theirs, torch.float64), roundings
            )
        record_agreement(name)


(SGD,) = [info for info in optim_db if info.optim_cls is torch.optim.SGD]
SGD_INPUTS = SGD.optim_inputs_func(device="cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("optimizer_input", SGD_INPUTS, ids=lambda x: x.desc.replace(" ", "-"))
@pytest.mark.capability("inputs", "OptimizerInfo's options", operators=["SGD"])
def test_sgd_agrees_on_torchs_options(optimizer_input, dtype, record_agreement) -> None:
    def train(optimizer_class) -> list[torch.Tensor]:
        draw = Draws(0)
        shapes = [(10, 5), (10,), (3, 4, 5), (), (0, 4)]
        params = [draw.normal(*shape).to(dtype).requires_grad_() for shape in shapes]
        optimizer = optimizer_class(params, **optimizer_input.kwargs)
        for _ in range(4):
            for param in params:
                param.grad = draw.normal(*param.shape).to(dtype)
            optimizer.step()
        return [param.detach() for param in params]

    # torch's plain loop rounds each operation to the dtype; ours and its fused step round once.
    rounding = 4 * 4 * torch.finfo(dtype).eps
    for actual, expected in zip(train(fastnn.optim.SGD), train(torch.optim.SGD), strict=True):
        torch.testing.assert_close(actual, expected, rtol=rounding, atol=rounding)
    record_agreement("optim.SGD")


@pytest.mark.capability("inputs", "errors that torch raises", operators=["SGD"])
def test_sgd_refuses_what_torch_refuses(record_agreement) -> None:
    errors = SGD.optim_error_inputs_func(device="cpu", dtype=torch.float32)
    assert errors
    for error in errors:
        assert error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
        params = error.optimizer_error_input.params
        if params is None:
            params = [torch.nn.Parameter(torch.randn(1, 1))]
        with warnings.catch_warnings(), pytest.raises(error.error_type, match=error.error_regex):
            warnings.simplefilter("error")
            fastnn.optim.SGD(params, **error.optimizer_error_input.kwargs)
        record_agreement("optim.SGD, errors")

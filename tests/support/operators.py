"""Our operators and torch's counterparts: calls, values and gradients of both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastnn
from fastnn._operators import OPERATORS
from support.oracles import DIFFERENTIABLE, Expected, assert_within, away_from_kink, expected
from support.sample_inputs import DTYPES, Sample, laid_out

NARROW = (torch.bfloat16, torch.float16)
DTYPE_IDS = [str(dtype).removeprefix("torch.") for dtype in DTYPES]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)

TORCH: dict[str, Callable[..., Tensor]] = {operator.name: operator.stock for operator in OPERATORS}

# They share everything but the ReLU.
LINEARS = ("linear", "linear_relu")

# The Functions of fastnn.autograd.
FUNCTIONS = {
    "linear": fastnn.autograd.Linear,
    "linear_relu": fastnn.autograd.LinearReLU,
    "log_softmax": fastnn.autograd.LogSoftmax,
    "nll_loss": fastnn.autograd.NLLLoss,
    "cross_entropy": fastnn.autograd.CrossEntropy,
    "linear_cross_entropy": fastnn.autograd.LinearCrossEntropy,
}


def ours(op: str) -> Callable[..., Tensor]:
    return getattr(fastnn.functional, op)


def leaves_of(op: str, sample: Sample) -> list[Tensor]:
    """The arguments to differentiate by, as leaves over the same memory with the same strides."""
    if not sample.args[0].is_floating_point():
        return []
    return [arg.detach().requires_grad_() for arg in sample.args[: DIFFERENTIABLE[op]]]


def run(
    function: Callable[..., Tensor], op: str, sample: Sample, grad_output: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The value, and the gradients if the input has any."""
    leaves = leaves_of(op, sample)
    output = function(*leaves, *sample.args[len(leaves) :], **sample.kwargs)
    grads = torch.autograd.grad(output, leaves, grad_output) if leaves else []
    return output.detach(), list(grads)


def random_grad_like(op: str, sample: Sample, output: Tensor | None = None) -> Tensor:
    """A random incoming gradient of order one for the operator's output."""
    output = ours(op)(*sample.args, **sample.kwargs) if output is None else output
    grad = torch.randn(output.shape).to(output.dtype)
    return away_from_kink(sample, grad) if op == "linear_relu" else grad


def torch_sample(op: str, sample: Sample) -> Sample:
    """The sample in a form that torch accepts and computes exactly enough.

    Narrow dtypes become float32: in them torch rounds each intermediate, and sums thousands of
    losses in bfloat16; we promise its float32 result, rounded once. Arguments that torch's own
    backward rejects (channels_last logits, a target (1) for logits (C)) or its forward (bytes in
    several dimensions) become ones that it accepts.
    """
    args = list(sample.args)
    kwargs = dict(sample.kwargs)
    if "dtype" in kwargs:
        args[0] = args[0].to(kwargs.pop("dtype"))
    if op in ("nll_loss", "cross_entropy") and args[0].dim() == 1 and args[1].dtype == torch.long:
        args[1] = args[1].reshape(())
    return Sample(
        sample.name,
        tuple(_as_torch_takes(arg) for arg in args),
        {key: _as_torch_takes(value) for key, value in kwargs.items()},
    )


def _as_torch_takes(value: object) -> object:
    if not isinstance(value, Tensor):
        return value
    if value.dtype == torch.uint8:
        value = value.long()
    return (value.float() if value.dtype in NARROW else value).contiguous()


def memory_of(value: object) -> Tensor | None:
    """All bytes behind a tensor, including those between and around its elements."""
    if not isinstance(value, Tensor):
        return None
    none = torch.empty(0, dtype=torch.uint8, device=value.device)
    return none.set_(value.untyped_storage()).clone()


def check_value_and_gradients(op: str, sample: Sample) -> None:
    """Compares with the oracle and with torch; the arguments must not change."""
    output = ours(op)(*sample.args, **sample.kwargs)
    grad_output = laid_out(random_grad_like(op, sample, output).reshape(-1), "offset")
    grad_output = grad_output.view(output.shape)

    arguments = [*sample.args, *sample.kwargs.values(), grad_output]
    before = [memory_of(argument) for argument in arguments]
    value, grads = run(ours(op), op, sample, grad_output)
    for argument, bytes_before in zip(arguments, before, strict=True):
        assert bytes_before is None or torch.equal(memory_of(argument), bytes_before)

    exact = expected(op, sample, grad_output)
    assert_within("value", value, exact.value, exact.value_error)
    assert_grads_within(grads, exact)

    theirs = torch_sample(op, sample)
    torch_value, torch_grads = run(TORCH[op], op, theirs, grad_output.to(theirs.args[0].dtype))
    # Both are within one error of the exact value, so within two of each other; the third allows
    # for rounding torch's value to its dtype, which is less than growth(1) roundings.
    assert_within("value, to torch's", value, torch_value, exact.value_error, slack=3)
    for grad, torch_grad, error in zip(grads, torch_grads, exact.grad_errors, strict=bool(grads)):
        assert_within("gradient, to torch's", grad, torch_grad, error, slack=3)


def assert_grads_within(grads: list[Tensor], exact: Expected) -> None:
    __tracebackhide__ = True
    for i, (grad, exact_grad, error) in enumerate(
        zip(grads, exact.grads, exact.grad_errors, strict=True)
    ):
        assert_within(f"gradient of argument {i}", grad, exact_grad, error)


def value_and_gradients(function: Callable[..., Tensor], op: str, sample: Sample) -> list[Tensor]:
    leaves = leaves_of(op, sample)
    output = function(*leaves, *sample.args[len(leaves) :], **sample.kwargs)
    return [output, *torch.autograd.grad(output.square().sum(), leaves)]

"""Bad arguments of the backward operators, called directly."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from support.bad_calls import as_kernels_raise, exception_of, floats, has_memory, target_with
from support.marks import needs_extension, trips_device_assert
from support.operators import memory_of


def loss_backward_arguments(
    op: str, reduction: str = "mean", dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Valid arguments of the operator's backward, by name."""
    input, target, weight = floats(7, 5).to(dtype), torch.arange(7) % 5, floats(5).abs().to(dtype)
    options = {"weight": weight, "ignore_index": -100, "reduction": reduction}
    if op == "nll_loss":
        loss, total_weight = torch.ops.fastnn.nll_loss_forward(input, target, **options)
        saved = {"input": input, "total_weight": total_weight}
    else:
        options["label_smoothing"] = 0.1
        forward = torch.ops.fastnn.cross_entropy_forward(input, target, **options, keep=True)
        loss, *saved = forward
        saved = dict(zip(("kept", "lse", "total_weight"), saved, strict=True))
    return {"grad_output": torch.ones_like(loss), "target": target, **options, **saved}


def named(name: str) -> str:
    """A pattern for the exact name: output must not match in grad_output."""
    return rf"\b{name}\b"


def raises_and_changes_nothing(
    op: str, arguments: dict[str, Any], error: type[Exception], *says: str
) -> None:
    __tracebackhide__ = True
    tensors = [value for value in arguments.values() if has_memory(value)]
    before = [memory_of(tensor) for tensor in tensors]
    raised = exception_of(getattr(torch.ops.fastnn, op), **arguments)
    error, says = as_kernels_raise(error, says)
    assert type(raised) is error, repr(raised)
    for pattern in says:
        assert re.search(pattern, str(raised)), f"{pattern!r} is not in {str(raised)!r}"
    for tensor, bytes_before in zip(tensors, before, strict=True):
        assert torch.equal(memory_of(tensor), bytes_before)


@needs_extension
@trips_device_assert
@pytest.mark.parametrize("bad", [5, -1, 10**12])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("op", ["nll_loss", "cross_entropy"])
def test_backward_of_a_target_out_of_range(op, reduction, bad):
    """A backward that writes at the targets must check them itself, although the forward did."""
    # In wider dtypes cross_entropy's backward only scales what the forward wrote there.
    dtype = torch.bfloat16 if op == "cross_entropy" else torch.float32
    arguments = loss_backward_arguments(op, reduction, dtype)
    arguments["target"] = target_with(bad, (7, 5))
    says = (f"Target {bad} is out of bounds", r"\b5 classes")
    raises_and_changes_nothing(f"{op}_backward", arguments, IndexError, *says)


WRONG_FOR_A_LOSS_BACKWARD = {
    "grad_output of a row too many": ("grad_output", lambda: floats(8)),
    "grad_output per row": ("grad_output", lambda: floats(7)),
    "grad_output of another dtype": ("grad_output", lambda: floats(dtype=torch.float64)),
    "target of a row less": ("target", lambda: torch.zeros(6, dtype=torch.long)),
    "target of 2 dimensions": ("target", lambda: torch.zeros(7, 1, dtype=torch.long)),
    "target of another dtype": ("target", lambda: torch.zeros(7, dtype=torch.int32)),
    "weight too short": ("weight", lambda: floats(4)),
    "weight of another dtype": ("weight", lambda: floats(5, dtype=torch.float64)),
    "total_weight of two": ("total_weight", lambda: floats(2)),
    "total_weight of another dtype": ("total_weight", lambda: floats(dtype=torch.float64)),
    "input of a class less": ("input", lambda: floats(7, 4)),
    "input of a row less": ("input", lambda: floats(6, 5)),
    "input of another dtype": ("input", lambda: floats(7, 5, dtype=torch.float64)),
}


@needs_extension
@pytest.mark.parametrize("wrong", WRONG_FOR_A_LOSS_BACKWARD)
@pytest.mark.parametrize("op", ["nll_loss", "cross_entropy"])
def test_backward_of_a_loss_with_a_wrong_tensor(op, wrong):
    name, make = WRONG_FOR_A_LOSS_BACKWARD[wrong]
    value = make()
    if op == "cross_entropy" and name == "input":
        name = "kept"
    arguments = {**loss_backward_arguments(op), name: value}
    batch_differs = wrong in ("target of a row less", "input of a row less")
    error = ValueError if batch_differs else RuntimeError
    says = (
        () if name in ("input", "kept") else (named(name),)
    )  # if the input is wrong, the others look wrong
    raises_and_changes_nothing(f"{op}_backward", arguments, error, *says)


@needs_extension
@pytest.mark.parametrize("shape", [(), (7,), (8,), (7, 1)])
@pytest.mark.parametrize("op", ["nll_loss", "cross_entropy"])
def test_backward_takes_one_gradient_or_one_for_each_row(op, shape):
    grad_output = torch.ones(shape)
    for reduction, right in (("none", (7,)), ("mean", ()), ("sum", ())):
        arguments = {**loss_backward_arguments(op, reduction), "grad_output": grad_output}
        if shape == right:
            assert getattr(torch.ops.fastnn, f"{op}_backward")(**arguments).shape == (7, 5)
        else:
            raises_and_changes_nothing(
                f"{op}_backward", arguments, RuntimeError, named("grad_output")
            )


@needs_extension
@pytest.mark.parametrize(
    "make",
    [
        lambda: floats(2, 7, dtype=torch.float64),
        lambda: floats(2, 6),
        lambda: floats(7),
        lambda: floats(7, 2),
        lambda: None,
    ],
    ids=["another dtype", "a row less", "the maxima alone", "transposed", "none"],
)
def test_cross_entropy_backward_with_a_wrong_lse(make):
    arguments = loss_backward_arguments("cross_entropy", dtype=torch.bfloat16)
    arguments["lse"] = make()
    raises_and_changes_nothing("cross_entropy_backward", arguments, RuntimeError, named("lse"))


@needs_extension
@pytest.mark.parametrize("op", ["nll_loss", "cross_entropy"])
def test_backward_with_a_bad_reduction(op):
    arguments = {**loss_backward_arguments(op), "reduction": "batchmean"}
    says = "batchmean is not a valid value for reduction"
    raises_and_changes_nothing(f"{op}_backward", arguments, ValueError, says)


@needs_extension
def test_cross_entropy_backward_with_bad_label_smoothing():
    for bad in (1.5, -0.1, math.nan):
        arguments = {**loss_backward_arguments("cross_entropy"), "label_smoothing": bad}
        says = "label_smoothing must be between"
        raises_and_changes_nothing("cross_entropy_backward", arguments, RuntimeError, says)


# By the wrong argument, which comes first: the name in the error message, and the argument. If two
# tensors don't match, the error names one of them.
WRONG_FOR_LINEAR_BACKWARD = {
    "grad_output of a row less": ("grad_output", lambda: floats(1, 4)),
    "grad_output of a column less": ("grad_output", lambda: floats(2, 3)),
    "grad_output without batch": ("grad_output", lambda: floats(4)),
    "grad_output of another dtype": ("grad_output", lambda: floats(2, 4, dtype=torch.float64)),
    "output of a row less": ("grad_output", lambda: floats(1, 4)),
    "output of a column less": ("grad_output", lambda: floats(2, 3)),
    "output of another dtype": ("output", lambda: floats(2, 4, dtype=torch.float64)),
    "weight of a column less": ("weight", lambda: floats(4, 2)),
    "weight of another dtype": ("weight", lambda: floats(4, 3, dtype=torch.float64)),
    "weight of 1 dimension": ("weight", lambda: floats(4)),
    "input of a column less": ("input", lambda: floats(2, 2)),
    "weight of a row less": ("weight", lambda: floats(3, 3)),
    "weight missing": ("weight for the gradient of input", lambda: None),
    "input of a row less": ("input", lambda: floats(1, 3)),
    "input of no dimension": ("input", lambda: floats()),
    "input missing": ("input for the gradient of weight", lambda: None),
    "output of no dimension": ("output", lambda: floats()),
}


def linear_backward_arguments(wrong: str, **output: Tensor) -> dict[str, Any]:
    _, make = WRONG_FOR_LINEAR_BACKWARD[wrong]
    tensors = {"grad_output": floats(2, 4), "input": floats(2, 3), "weight": floats(4, 3)}
    return {**tensors, **output, "output_mask": [True, True, True], wrong.split()[0]: make()}


@needs_extension
@pytest.mark.parametrize("wrong", WRONG_FOR_LINEAR_BACKWARD)
def test_linear_relu_backward_with_a_wrong_tensor(wrong):
    says, _ = WRONG_FOR_LINEAR_BACKWARD[wrong]
    arguments = linear_backward_arguments(wrong, output=floats(2, 4))
    raises_and_changes_nothing("linear_relu_backward", arguments, RuntimeError, named(says))


# Without an output, the argument that doesn't match the gradient is named.
NAMED_BESIDE_GRADIENT = {
    "grad_output of a row less": "input",
    "grad_output of a column less": "weight",
    "grad_output without batch": "input",
}


@needs_extension
@pytest.mark.parametrize("wrong", [w for w in WRONG_FOR_LINEAR_BACKWARD if w[:6] != "output"])
def test_linear_backward_with_a_wrong_tensor(wrong):
    says = NAMED_BESIDE_GRADIENT.get(wrong, WRONG_FOR_LINEAR_BACKWARD[wrong][0])
    arguments = linear_backward_arguments(wrong)
    raises_and_changes_nothing("linear_backward", arguments, RuntimeError, named(says))


@needs_extension
def test_linear_backward_with_a_gradient_of_no_dimension():
    arguments = {"grad_output": floats(), "input": None, "weight": None}
    arguments["output_mask"] = [False, False, True]
    raises_and_changes_nothing("linear_backward", arguments, RuntimeError, "grad_output")


@needs_extension
@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        ("grad_output", lambda: floats(3, 3), "grad_output"),
        ("grad_output", lambda: floats(2), "grad_output"),
        ("grad_output", lambda: floats(2, 3, dtype=torch.float64), "grad_output"),
        ("output", lambda: floats(3, 3), "grad_output"),  # compared with the output
        ("output", lambda: torch.ones(2, 3, dtype=torch.long), "output"),
    ],
)
def test_log_softmax_backward_with_a_wrong_tensor(name, make, says):
    arguments = {"grad_output": floats(2, 3), "output": floats(2, 3), "dim": 1, name: make()}
    raises_and_changes_nothing("log_softmax_backward", arguments, RuntimeError, named(says))


@needs_extension
@pytest.mark.parametrize("dim", [2, -3])
def test_log_softmax_backward_with_a_bad_dim(dim):
    arguments = {"grad_output": floats(2, 3), "output": floats(2, 3), "dim": dim}
    says = ("Dimension out of range", re.escape("[-2, 1]"))
    raises_and_changes_nothing("log_softmax_backward", arguments, IndexError, *says)

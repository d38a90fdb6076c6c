"""Bad arguments: the exception has torch's type, its message names the argument and what it may be,
and nothing is changed."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastnn
from support.bad_calls import (
    CASES,
    Case,
    as_kernels_raise,
    exception_of,
    floats,
    has_memory,
    indices,
    is_found_by_the_kernel,
    probabilities,
)
from support.marks import trips_device_assert
from support.operators import TORCH, memory_of, ours


def marks_of(case: Case) -> list[pytest.MarkDecorator]:
    return [trips_device_assert] if is_found_by_the_kernel(case.error, case.says) else []


@pytest.mark.parametrize(
    ("implementation", "case"),
    [
        pytest.param(implementation, case, id=f"{implementation}-{case}", marks=marks_of(case))
        for implementation in ("functional", "reference", "autograd")
        for case in CASES
        if case.reference_too or (implementation != "reference" and fastnn.is_available())
    ],
    indirect=["implementation"],
)
def test_bad_arguments(implementation, case):
    for wants_grad in (False, True):
        args = case.args()
        if wants_grad and can_want_grad(args[0]):
            args[0].requires_grad_()
        before = [memory_of(arg) if has_memory(arg) else None for arg in args]

        error = exception_of(ours(case.op), *args, **case.options)

        expected, says = case.error, case.says
        if implementation != "reference":
            expected, says = as_kernels_raise(expected, says)
        assert type(error) is expected, repr(error)
        if implementation == "functional" and fastnn.is_available():
            for pattern in says:
                assert re.search(pattern, str(error)), f"{pattern!r} is not in {str(error)!r}"
        for arg, bytes_before in zip(args, before, strict=True):
            assert bytes_before is None or torch.equal(memory_of(arg), bytes_before)


def can_want_grad(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@pytest.mark.not_on_a_gpu("torch's exceptions on the CPU, which are the model")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_exceptions_are_of_torch_s_types(case):
    """The cases state the types; they must be torch's, or the case must say why not."""
    error = exception_of(TORCH[case.op], *case.args(), **case.options)
    if case.unlike_torch is None:
        assert type(error) is case.error, repr(error)
    else:
        assert type(error) is not case.error, "now it raises the same: drop the exemption"


# --- where torch doesn't raise: what we take and what we refuse -----------------------------------


@trips_device_assert
def test_a_good_call_after_a_bad_one(implementation):
    """Nothing of the bad call remains, in this thread or in others."""
    logits = torch.randn(9000, 10)
    good = torch.full((9000,), 3)
    bad = good.index_fill(0, indices(17), 10)
    for _ in range(3):
        with pytest.raises((IndexError, RuntimeError), match=r"[Tt]arget .*is out of bounds"):
            fastnn.functional.cross_entropy(logits, bad)
        # A mean of 9000 float32 losses of about 3, each off by a few roundings of 1e-7.
        torch.testing.assert_close(
            fastnn.functional.cross_entropy(logits, good),
            F.cross_entropy(logits, good),
            rtol=1e-5,
            atol=0,
        )


@pytest.mark.parametrize("bad", [math.nan, -0.1, 1.5])
@pytest.mark.parametrize("wants", ["input", "target", "weight"])
def test_label_smoothing_is_checked_whatever_wants_a_gradient(implementation, wants, bad):
    """Some of these take torch's path, which accepts negative values."""
    arguments = {"input": floats(2, 5), "target": probabilities(2, 5), "weight": floats(5).abs()}
    arguments[wants].requires_grad_()
    with pytest.raises(RuntimeError, match="label_smoothing must be between"):
        fastnn.functional.cross_entropy(**arguments, label_smoothing=bad)


@pytest.mark.parametrize("bad", [math.nan, -0.1, 1.5])
def test_label_smoothing_is_checked_under_transforms(implementation, bad):
    def loss(input: Tensor) -> Tensor:
        return fastnn.functional.cross_entropy(input, indices(0, 4), label_smoothing=bad)

    with pytest.raises(RuntimeError, match="label_smoothing must be between"):
        torch.func.grad(loss)(floats(2, 5))

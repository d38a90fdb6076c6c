"""Bad arguments: the exception is of torch's type, its message names the argument and what it may
be, and nothing is changed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastnn
from cuda_emulation.chosen import EMULATES_CUDA
from support.marks import needs_extension, trips_device_assert
from support.operators import TORCH, memory_of, ours


@dataclass(frozen=True)
class Case:
    """A call that must raise ``error`` with a message that has all of ``says``."""

    op: str
    name: str
    args: Callable[[], tuple]
    error: type[Exception]
    says: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    # Why torch's exception isn't the model here: where it is of another type, or isn't raised.
    unlike_torch: str | None = None
    # The reference leaves it to torch's operators whether tensors on several devices go together.
    reference_too: bool = True

    def __str__(self) -> str:
        return f"{self.op}-{self.name}".replace(" ", "_")


DEVICE = r"\bcpu\b|\bcuda:\d"  # how messages name the one under test


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An input, a weight or a bias (of integers, where the dtype is no floating-point one)."""
    values = torch.randn(shape)
    return values.to(dtype) if dtype.is_floating_point or dtype.is_complex else values.int()


def indices(*classes: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """A target."""
    return torch.tensor(classes, dtype=dtype)


LINEAR_RELU_CASES = [
    Case(
        "linear_relu",
        f"{argument} is {value!r}",
        lambda argument=argument, value=value: tuple(
            value if argument == name else tensor
            for name, tensor in (
                ("input", floats(2, 3)),
                ("weight", floats(4, 3)),
                ("bias", floats(4)),
            )
        ),
        TypeError,
        ("linear_relu", argument, "must be Tensor", type(value).__name__),
    )
    for argument, value in (
        *(("input", "abc"), ("input", None), ("input", [1.0, 2.0]), ("weight", None)),
        *(("weight", 3.0), ("bias", 1.0), ("bias", "abc")),
    )
] + [
    Case(
        "linear_relu",
        "weight of another dtype",
        lambda: (floats(2, 3), floats(4, 3, dtype=torch.float64), floats(4)),
        RuntimeError,
        ("linear_relu", "weight", "Float", "Double"),
    ),
    Case(
        "linear_relu",
        "bias of another dtype",
        lambda: (floats(2, 3), floats(4, 3), floats(4, dtype=torch.bfloat16)),
        RuntimeError,
        ("linear_relu", "bias", "Float", "BFloat16"),
    ),
    Case(
        "linear_relu",
        "weight on another device",
        lambda: (floats(2, 3), floats(4, 3).to("meta")),
        RuntimeError,
        ("linear_relu", "weight", DEVICE, "meta"),
        unlike_torch="without a bias torch returns uninitialised memory",
        reference_too=False,
    ),
    Case(
        "linear_relu",
        "bias on another device",
        lambda: (floats(2, 3), floats(4, 3), floats(4).to("meta")),
        RuntimeError,
        ("linear_relu", "bias", DEVICE, "meta"),
        reference_too=False,
    ),
    Case(
        "linear_relu",
        "input on another device",
        lambda: (floats(2, 3).to("meta"), floats(4, 3), floats(4)),
        RuntimeError,
        ("linear_relu", "weight", DEVICE, "meta"),
        reference_too=False,
    ),
    Case(
        "linear_relu",
        "in_features differ",
        lambda: (floats(2, 5), floats(4, 3), floats(4)),
        RuntimeError,
        ("input", "weight", r"[\[(]?2, ?5|2x5", "3"),
    ),
    Case(
        "linear_relu",
        "in_features differ in 3-D",
        lambda: (floats(2, 2, 5), floats(4, 3)),
        RuntimeError,
        ("input", "weight", "5", "3"),
    ),
    Case(
        "linear_relu",
        "in_features differ in 1-D",
        lambda: (floats(5), floats(4, 3)),
        RuntimeError,
        ("input", "weight", "5", "3"),
    ),
    Case(
        "linear_relu",
        "bias of another length",
        lambda: (floats(2, 3), floats(4, 3), floats(5)),
        RuntimeError,
        ("bias", "4", "5"),
    ),
    Case(
        "linear_relu",
        "0-d input",
        lambda: (floats(), floats(4, 3), floats(4)),
        RuntimeError,
        ("0", "linear"),
    ),
    Case(
        "linear_relu",
        "3-D weight",
        lambda: (floats(2, 3), floats(1, 4, 3), floats(4)),
        RuntimeError,
        ("3D|3-D|3 dim|weight",),
    ),
    Case(
        "linear_relu",
        "complex input",
        lambda: (floats(2, 3, dtype=torch.complex64), floats(4, 3, dtype=torch.complex64)),
        NotImplementedError,
        ("complex",),
    ),
]

LOG_SOFTMAX_CASES = [
    Case(
        "log_softmax",
        f"input is {value!r}",
        lambda value=value: (value, 0),
        TypeError,
        ("log_softmax", "input", "must be Tensor", type(value).__name__),
        unlike_torch="torch calls a method of whatever it gets: AttributeError",
    )
    for value in ("abc", [1.0], None, 2.0)
]
LOG_SOFTMAX_CASES += [
    Case(
        "log_softmax",
        f"dim {dim} of {len(shape)}",
        lambda shape=shape, dim=dim: (floats(*shape), dim),
        IndexError,
        ("Dimension out of range", re.escape(allowed), str(dim)),
    )
    for shape, dim, allowed in (
        ((2, 3), 2, "[-2, 1]"),
        ((2, 3), -3, "[-2, 1]"),
        ((), 1, "[-1, 0]"),
        ((), -2, "[-1, 0]"),
        ((0, 3), 2, "[-2, 1]"),
    )
]
LOG_SOFTMAX_CASES += [
    Case(
        "log_softmax",
        f"{dtype}",
        lambda dtype=dtype: (torch.ones(2, 3).to(dtype), 1),
        NotImplementedError,
        ("log_softmax|host_softmax", "not implemented for"),  # on a CPU, on a GPU
    )
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64)
]
LOG_SOFTMAX_CASES += [
    Case(
        "log_softmax",
        "dim is no number",
        lambda: (floats(2, 3), "a"),
        TypeError,
        ("dim|log_softmax",),
        # Named tensors, which torch 2.13 took out.
        unlike_torch="torch takes it for a name" if hasattr(Tensor, "names") else None,
    )
]


def shared_loss_cases(op: str) -> list[Case]:
    """What nll_loss and cross_entropy refuse alike."""

    def target() -> Tensor:
        return indices(0, 4)

    cases = [
        Case(
            op,
            f"{argument} is {value!r}",
            lambda argument=argument, value=value: tuple(
                value if argument == name else tensor
                for name, tensor in (
                    ("input", floats(2, 5)),
                    ("target", target()),
                    ("weight", floats(5)),
                )
            ),
            TypeError,
            (op, argument, "must be Tensor", type(value).__name__),
        )
        for argument, value in (
            *(("input", "abc"), ("input", None), ("target", [0, 1]), ("target", None)),
            *(("target", 3), ("weight", [1.0] * 5), ("weight", 2.0)),
        )
    ]
    cases += [
        Case(
            op,
            f"input of {dtype}",
            lambda dtype=dtype: (torch.ones(2, 5).to(dtype), target()),
            NotImplementedError,
            ("not implemented for", name),
        )
        for dtype, name in (
            (torch.int64, "Long"),
            (torch.int32, "Int"),
            (torch.bool, "Bool"),
            (torch.complex64, "ComplexFloat"),
        )
    ]
    cases += [
        Case(
            op,
            f"target of {dtype} for {len(shape)}-d input",
            lambda dtype=dtype, shape=shape: (
                floats(*shape),
                torch.zeros(shape[:1] + shape[2:] if len(shape) > 1 else (), dtype=dtype),
            ),
            RuntimeError,
            ("target", "Long or Byte|Long", name),
        )
        for dtype, name in (
            *((torch.int32, "Int"), (torch.int8, "Char"), (torch.bool, "Bool")),
            *((torch.float32, "Float"), (torch.float64, "Double")),
        )
        for shape in ((5,), (2, 5), (2, 5, 3))
    ]
    cases += [
        Case(
            op,
            f"target {bad} {reduction} {'x'.join(map(str, shape))}",
            lambda bad=bad, shape=shape: (floats(*shape), target_with(bad, shape)),
            IndexError,
            (f"Target {bad} is out of bounds", r"\b5 classes"),
            {"reduction": reduction},
        )
        for bad in (5, -1, -99, 10**12, -(2**40))
        for reduction in ("none", "mean", "sum")
        for shape in ((5,), (7, 5), (3, 5, 4), (2, 5, 3, 4), (2, 5, 3, 2, 2))
    ]
    cases += [
        Case(
            op,
            "target of -100 where another index is ignored",
            lambda: (floats(2, 5), indices(0, -100)),
            IndexError,
            ("Target -100 is out of bounds", r"\b5 classes", r"\b2\b"),
            {"ignore_index": 2},
        ),
        Case(
            op,
            "byte target out of range",
            lambda: (floats(2, 5), indices(0, 255, dtype=torch.uint8)),
            IndexError,
            ("Target 255 is out of bounds", r"\b5 classes"),
        ),
        Case(
            op,
            "no classes to choose from",
            lambda: (floats(2, 0), indices(0, 0)),
            IndexError,
            ("Target 0 is out of bounds", r"\b0 classes"),
        ),
        Case(
            op,
            "target out of range among many rows",  # found by a second thread
            lambda: (floats(9000, 10), torch.full((9000,), 3).index_fill(0, indices(8999), 10)),
            IndexError,
            ("Target 10 is out of bounds", r"\b10 classes"),
        ),
        Case(
            op,
            "two targets out of range",  # it names the first
            lambda: (floats(9000, 10), torch.full((9000,), 3).index_fill(0, indices(20, 8999), 77)),
            IndexError,
            ("Target 77 is out of bounds", r"\b10 classes"),
        ),
        Case(
            op,
            "another batch size",
            lambda: (floats(3, 5), indices(0, 1)),
            ValueError,
            (r"batch_size \(3\)", r"batch_size \(2\)"),
        ),
        Case(
            op,
            "another batch size in 3-D",
            lambda: (floats(3, 5, 2), torch.zeros(2, 2, dtype=torch.long)),
            ValueError,
            (r"batch_size \(3\)", r"batch_size \(2\)"),
        ),
        Case(
            op,
            "0-d target for a batch",
            lambda: (floats(3, 5), torch.tensor(1)),
            ValueError,
            (r"batch_size \(3\)", "target"),
        ),
        Case(
            op,
            "target of two for no batch",
            lambda: (floats(5), indices(0, 1)),
            ValueError,
            ("target", "2"),
        ),
        Case(
            op,
            "2-d target for 2-d input",
            lambda: (floats(3, 5), torch.zeros(3, 1, dtype=torch.long)),
            RuntimeError,
            ("target",),
        ),
        Case(
            op,
            "1-d target for 3-d input",
            lambda: (floats(3, 5, 2), indices(0, 1, 2)),
            RuntimeError,
            ("[Tt]arget", re.escape("[3, 2]"), re.escape("[3]")),
        ),
        Case(
            op,
            "another d1",
            lambda: (floats(3, 5, 2), torch.zeros(3, 4, dtype=torch.long)),
            RuntimeError,
            ("[Tt]arget", re.escape("[3, 2]"), re.escape("[3, 4]")),
        ),
        Case(
            op,
            "another d2",
            lambda: (floats(2, 5, 3, 4), torch.zeros(2, 3, 6, dtype=torch.long)),
            RuntimeError,
            ("[Tt]arget", re.escape("[2, 3, 4]"), re.escape("[2, 3, 6]")),
        ),
        Case(
            op,
            "another d3",
            lambda: (floats(2, 5, 3, 4, 2), torch.zeros(2, 3, 4, 1, dtype=torch.long)),
            RuntimeError,
            ("[Tt]arget", re.escape("[2, 3, 4, 2]"), re.escape("[2, 3, 4, 1]")),
        ),
        Case(
            op,
            "weight too short",
            lambda: (floats(2, 5), target(), floats(4)),
            RuntimeError,
            ("weight", "all 5 classes", re.escape("[4]")),
        ),
        Case(
            op,
            "weight too long",
            lambda: (floats(2, 5, 3), torch.zeros(2, 3, dtype=torch.long), floats(6)),
            RuntimeError,
            ("weight", "all 5 classes", re.escape("[6]")),
        ),
        Case(
            op,
            "2-d weight",
            lambda: (floats(2, 5), target(), floats(5, 1)),
            RuntimeError,
            ("weight", "all 5 classes", re.escape("[5, 1]")),
        ),
        Case(
            op,
            "0-d weight",
            lambda: (floats(2, 5), target(), floats()),
            RuntimeError,
            ("weight", "all 5 classes", re.escape("[]")),
        ),
        Case(
            op,
            "weight of another dtype",
            lambda: (floats(2, 5), target(), floats(5, dtype=torch.float64)),
            RuntimeError,
            ("Float", "Double"),
        ),
        Case(
            op,
            "weight of integers",
            lambda: (floats(2, 5), target(), torch.ones(5, dtype=torch.long)),
            RuntimeError,
            ("Float", "Long"),
        ),
        Case(
            op,
            "weight on another device",
            lambda: (floats(2, 5), target(), floats(5).to("meta")),
            RuntimeError,
            ("meta", DEVICE),
            reference_too=False,
        ),
        Case(
            op,
            "target on another device",
            lambda: (floats(2, 5), target().to("meta")),
            RuntimeError,
            ("meta", DEVICE),
            reference_too=False,
        ),
        Case(
            op,
            "input on another device",
            lambda: (floats(2, 5).to("meta"), target()),
            RuntimeError,
            ("meta", DEVICE),
            reference_too=False,
        ),
    ]
    cases += [
        Case(
            op,
            f"reduction {reduction!r}",
            lambda: (floats(2, 5), target()),
            ValueError,
            (f"{reduction} is not a valid value for reduction",),
            {"reduction": reduction},
        )
        for reduction in ("batchmean", "", "Mean", "avg", None, 3)
    ]
    cases += [
        Case(
            op,
            "ignore_index is no integer",
            lambda: (floats(2, 5), target()),
            TypeError,
            ("ignore_index",),
            {"ignore_index": 1.5},
        )
    ]
    return cases


def target_with(bad: int, shape: tuple[int, ...]) -> Tensor:
    """A target for (N, 5, ...) whose last row is out of range, and one before it ignored."""
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    target = torch.ones(rows, dtype=torch.long)
    flat = target.view(-1)
    flat[0] = -100
    flat[-1] = bad
    return target


NLL_LOSS_CASES = [
    *shared_loss_cases("nll_loss"),
    Case(
        "nll_loss",
        "0-d input",
        lambda: (floats(), indices(0)),
        ValueError,
        ("1 or more dimensions", "0"),
    ),
    Case(
        "nll_loss",
        "0-d input and target",
        lambda: (floats(), torch.tensor(0)),
        ValueError,
        ("1 or more dimensions", "0"),
    ),
]


def probabilities(*shape: int) -> Tensor:
    return torch.rand(shape).softmax(-1)


CROSS_ENTROPY_CASES = [
    *shared_loss_cases("cross_entropy"),
    *(
        Case(
            "cross_entropy",
            f"target {bad} with label_smoothing {smoothing}{' weighted' if weighted else ''}",
            lambda bad=bad, weighted=weighted: (
                (floats(7, 5), target_with(bad, (7, 5))) + ((floats(5).abs(),) if weighted else ())
            ),
            IndexError,
            (f"Target {bad} is out of bounds", r"\b5 classes"),
            {"label_smoothing": smoothing},
        )
        for bad in (5, -1)
        for smoothing in (0.1, 1.0)
        for weighted in (False, True)
    ),
    *(
        Case(
            "cross_entropy",
            f"label_smoothing {smoothing} of {kind}",
            lambda kind=kind: (
                floats(2, 5),
                indices(0, 4) if kind == "indices" else probabilities(2, 5),
            ),
            RuntimeError,
            (r"label_smoothing must be between 0\.0 and 1\.0", str(smoothing)),
            {"label_smoothing": smoothing},
            unlike_torch=None if smoothing > 1 else "torch takes it for no smoothing",
        )
        for smoothing in (1.5, -0.1, math.nan, math.inf, -math.inf)
        for kind in ("indices", "probabilities")
    ),
    Case(
        "cross_entropy",
        "label_smoothing is no number",
        lambda: (floats(2, 5), indices(0, 4)),
        TypeError,
        ("label_smoothing",),
        {"label_smoothing": "a"},
    ),
    Case(
        "cross_entropy",
        "probabilities with ignore_index",
        lambda: (floats(2, 5), probabilities(2, 5)),
        RuntimeError,
        ("ignore_index is not supported for floating point target",),
        {"ignore_index": 0},
    ),
    Case(
        "cross_entropy",
        "integers in the input's shape",
        lambda: (floats(2, 5), torch.ones(2, 5, dtype=torch.long)),
        RuntimeError,
        ("floating point type for target with class probabilities", "Long"),
    ),
    Case(
        "cross_entropy",
        "an integer in the shape of one logit",
        lambda: (floats(1), indices(0)),
        RuntimeError,
        ("floating point type for target with class probabilities", "Long"),
    ),
    Case(
        "cross_entropy",
        "complex probabilities",
        lambda: (floats(2, 5), probabilities(2, 5).to(torch.complex64)),
        RuntimeError,
        ("floating point type for target with class probabilities", "ComplexFloat"),
    ),
    Case(
        "cross_entropy",
        "probabilities of another shape",
        lambda: (floats(2, 5), probabilities(2, 4)),
        RuntimeError,
        ("target",),
    ),
    Case(
        "cross_entropy",
        "probabilities on another device",
        lambda: (floats(2, 5), probabilities(2, 5).to("meta")),
        RuntimeError,
        ("meta", DEVICE),
        reference_too=False,
    ),
    Case(
        "cross_entropy",
        "probabilities with a weight too short",
        lambda: (floats(2, 5), probabilities(2, 5), floats(4)),
        RuntimeError,
        ("weight", "all 5 classes", re.escape("[4]")),
    ),
    Case(
        "cross_entropy",
        "probabilities with a weight on another device",
        lambda: (floats(2, 5), probabilities(2, 5), floats(5).to("meta")),
        RuntimeError,
        ("meta", DEVICE),
        reference_too=False,
    ),
    Case(
        "cross_entropy",
        "0-d input",
        lambda: (floats(), indices(0)),
        IndexError,
        ("[Dd]imension",),
    ),
]

CASES = LINEAR_RELU_CASES + LOG_SOFTMAX_CASES + NLL_LOSS_CASES + CROSS_ENTROPY_CASES


def is_found_by_the_kernel(error: type[Exception], says: tuple[str, ...]) -> bool:
    return error is IndexError and says[0].startswith("Target ")


def as_kernels_raise(
    error: type[Exception], says: tuple[str, ...]
) -> tuple[type[Exception], tuple[str, ...]]:
    """What comes of a bad index that a CUDA kernel finds: an assert, which can't name the index."""
    if EMULATES_CUDA and is_found_by_the_kernel(error, says):
        return RuntimeError, ("device-side assert triggered", "Target is out of bounds")
    return error, says


def exception_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Exception | None:
    try:
        function(*args, **kwargs)
    except Exception as error:
        return error
    return None


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


def has_memory(value: object) -> bool:
    return isinstance(value, Tensor) and not value.is_meta


@pytest.mark.not_on_a_gpu("torch's exceptions on the CPU, which are the model")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_exceptions_are_of_torch_s_types(case):
    """The table above says the types; this says that they are torch's, or why not."""
    error = exception_of(TORCH[case.op], *case.args(), **case.options)
    if case.unlike_torch is None:
        assert type(error) is case.error, repr(error)
    else:
        assert type(error) is not case.error, "now it raises the same: drop the exemption"


# --- where torch doesn't raise: what we take and what we refuse -----------------------------------


@trips_device_assert
def test_a_good_call_after_a_bad_one(implementation):
    """Nothing of the bad one is left behind, in this thread or in others."""
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
    """Some of these take torch's path, which takes what is below zero."""
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


# --- the backward operators, called on their own --------------------------------------------------


def loss_backward_arguments(
    op: str, reduction: str = "mean", dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Good arguments of the operator's backward, by name."""
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
    """The forward checks targets; a backward that writes at them must not take its word."""
    # Of wider dtypes cross_entropy's backward scales what the forward has written there.
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
        () if name in ("input", "kept") else (name,)
    )  # where the input is wrong, the others look so
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
            raises_and_changes_nothing(f"{op}_backward", arguments, RuntimeError, "grad_output")


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
    raises_and_changes_nothing("cross_entropy_backward", arguments, RuntimeError, "lse")


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


WRONG_FOR_LINEAR_RELU_BACKWARD = {
    "grad_output of a row less": ("grad_output", lambda: floats(1, 4)),
    "grad_output of a column less": ("grad_output", lambda: floats(2, 3)),
    "grad_output without batch": ("grad_output", lambda: floats(4)),
    "grad_output of another dtype": ("grad_output", lambda: floats(2, 4, dtype=torch.float64)),
    "output of a row less": ("output", lambda: floats(1, 4)),
    "output of a column less": ("output", lambda: floats(2, 3)),
    "output of another dtype": ("output", lambda: floats(2, 4, dtype=torch.float64)),
    "weight of a column less": ("weight", lambda: floats(4, 2)),
    "weight of another dtype": ("weight", lambda: floats(4, 3, dtype=torch.float64)),
    "weight of 1 dimension": ("weight", lambda: floats(4)),
    "input of a column less": ("input", lambda: floats(2, 2)),
    "weight of a row less": ("weight", lambda: floats(3, 3)),
    "no weight": ("weight for the gradient of input", lambda: None),
    "input of a row less": ("input", lambda: floats(1, 3)),
    "input of no dimension": ("input", lambda: floats()),
    "no input": ("input for the gradient of weight", lambda: None),
    "output of no dimension": ("output", lambda: floats()),
}


@needs_extension
@pytest.mark.parametrize("wrong", WRONG_FOR_LINEAR_RELU_BACKWARD)
def test_linear_relu_backward_with_a_wrong_tensor(wrong):
    arguments = {
        "grad_output": floats(2, 4),
        "input": floats(2, 3),
        "weight": floats(4, 3),
        "output": floats(2, 4),
        "output_mask": [True, True, True],
    }
    says, make = WRONG_FOR_LINEAR_RELU_BACKWARD[wrong]
    arguments[says.split()[0]] = make()
    raises_and_changes_nothing("linear_relu_backward", arguments, RuntimeError, says)


@needs_extension
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("grad_output", lambda: floats(3, 3)),
        ("grad_output", lambda: floats(2)),
        ("grad_output", lambda: floats(2, 3, dtype=torch.float64)),
        ("output", lambda: floats(3, 3)),
        ("output", lambda: torch.ones(2, 3, dtype=torch.long)),
    ],
)
def test_log_softmax_backward_with_a_wrong_tensor(name, make):
    arguments = {"grad_output": floats(2, 3), "output": floats(2, 3), "dim": 1, name: make()}
    raises_and_changes_nothing("log_softmax_backward", arguments, RuntimeError, "output")


@needs_extension
@pytest.mark.parametrize("dim", [2, -3])
def test_log_softmax_backward_with_a_bad_dim(dim):
    arguments = {"grad_output": floats(2, 3), "output": floats(2, 3), "dim": dim}
    says = ("Dimension out of range", re.escape("[-2, 1]"))
    raises_and_changes_nothing("log_softmax_backward", arguments, IndexError, *says)


# --- the optimizer's step -------------------------------------------------------------------------

WRONG_FOR_SGD_STEP = {
    "a gradient less": ({"grads": lambda: [floats(3)]}, "grads"),
    "a gradient of another shape": ({"grads": lambda: [floats(3), floats(2, 1)]}, r"grads\[1\]"),
    "a gradient of another dtype": (
        {"grads": lambda: [floats(3, dtype=torch.float64), floats(2, 2)]},
        r"grads\[0\]",
    ),
    "no momentum buffers": ({"momentum_buffers": list}, "momentum_buffers"),
    "a buffer of another shape": (
        {"momentum_buffers": lambda: [floats(3), floats(4)]},
        r"momentum_buffers\[1\]",
    ),
    "a buffer of another dtype": (
        {"momentum_buffers": lambda: [floats(3, dtype=torch.bfloat16), floats(2, 2)]},
        r"momentum_buffers\[0\]",
    ),
    "parameters of integers": (
        {
            name: lambda: [torch.ones(3, dtype=torch.long), torch.ones(2, 2, dtype=torch.long)]
            for name in ("params", "grads", "momentum_buffers")
        },
        "params",
    ),
}


@needs_extension
@pytest.mark.parametrize("wrong", WRONG_FOR_SGD_STEP)
def test_sgd_step_with_wrong_tensors(wrong):
    """Also the tensors that come before the wrong one are left as they were."""
    replaced, says = WRONG_FOR_SGD_STEP[wrong]
    names = ("params", "grads", "momentum_buffers")
    lists = {name: [floats(3), floats(2, 2)] for name in names}
    lists.update({name: make() for name, make in replaced.items()})
    given = [tensor for tensors in lists.values() for tensor in tensors]
    before = [memory_of(tensor) for tensor in given]
    with pytest.raises(RuntimeError, match=says):
        torch.ops.fastnn.sgd_step_(**lists, lr=0.1, momentum=0.9)
    for tensor, bytes_before in zip(given, before, strict=True):
        assert torch.equal(memory_of(tensor), bytes_before)

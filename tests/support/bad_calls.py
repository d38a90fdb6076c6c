"""Calls that must raise, the messages they must give, and their arguments."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cuda_emulation.chosen import EMULATES_CUDA


@dataclass(frozen=True)
class Case:
    """A call that must raise ``error`` with a message that matches all of ``says``."""

    op: str
    name: str
    args: Callable[[], tuple]
    error: type[Exception]
    says: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    # Why torch's exception doesn't apply here: it has another type, or isn't raised.
    unlike_torch: str | None = None
    # The reference lets torch's operators check that all tensors are on one device.
    reference_too: bool = True

    def __str__(self) -> str:
        return f"{self.op}-{self.name}".replace(" ", "_")


DEVICE = r"\bcpu\b|\bcuda:\d"  # how messages name the device under test


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An input, weight or bias (with integers if the dtype isn't floating-point)."""
    values = torch.randn(shape)
    return values.to(dtype) if dtype.is_floating_point or dtype.is_complex else values.int()


def indices(*classes: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """A target."""
    return torch.tensor(classes, dtype=dtype)


def linear_cases(op: str) -> list[Case]:
    """Calls that linear and linear_relu both reject."""
    return [
        Case(
            op,
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
            (op, argument, "must be Tensor", type(value).__name__),
        )
        for argument, value in (
            *(("input", "abc"), ("input", None), ("input", [1.0, 2.0]), ("weight", None)),
            *(("weight", 3.0), ("bias", 1.0), ("bias", "abc")),
        )
    ] + [
        Case(
            op,
            "weight of another dtype",
            lambda: (floats(2, 3), floats(4, 3, dtype=torch.float64), floats(4)),
            RuntimeError,
            (op, "weight", "Float", "Double"),
        ),
        Case(
            op,
            "bias of another dtype",
            lambda: (floats(2, 3), floats(4, 3), floats(4, dtype=torch.bfloat16)),
            RuntimeError,
            (op, "bias", "Float", "BFloat16"),
        ),
        Case(
            op,
            "weight on another device",
            lambda: (floats(2, 3), floats(4, 3).to("meta")),
            RuntimeError,
            (op, "weight", DEVICE, "meta"),
            unlike_torch="without a bias torch returns uninitialised memory",
            reference_too=False,
        ),
        Case(
            op,
            "bias on another device",
            lambda: (floats(2, 3), floats(4, 3), floats(4).to("meta")),
            RuntimeError,
            (op, "bias", DEVICE, "meta"),
            reference_too=False,
        ),
        Case(
            op,
            "input on another device",
            lambda: (floats(2, 3).to("meta"), floats(4, 3), floats(4)),
            RuntimeError,
            (op, "weight", DEVICE, "meta"),
            reference_too=False,
        ),
        Case(
            op,
            "in_features differ",
            lambda: (floats(2, 5), floats(4, 3), floats(4)),
            RuntimeError,
            ("input", "weight", r"[\[(]?2, ?5|2x5", "3"),
        ),
        Case(
            op,
            "in_features differ in 3-D",
            lambda: (floats(2, 2, 5), floats(4, 3)),
            RuntimeError,
            ("input", "weight", "5", "3"),
        ),
        Case(
            op,
            "in_features differ in 1-D",
            lambda: (floats(5), floats(4, 3)),
            RuntimeError,
            ("input", "weight", "5", "3"),
        ),
        Case(
            op,
            "bias of another length",
            lambda: (floats(2, 3), floats(4, 3), floats(5)),
            RuntimeError,
            ("bias", "4", "5"),
        ),
        Case(
            op,
            "0-d input",
            lambda: (floats(), floats(4, 3), floats(4)),
            RuntimeError,
            ("0", "linear"),
        ),
        Case(
            op,
            "3-D weight",
            lambda: (floats(2, 3), floats(1, 4, 3), floats(4)),
            RuntimeError,
            ("3D|3-D|3 dim|weight",),
        ),
    ]


LINEAR_CASES = linear_cases("linear")
LINEAR_RELU_CASES = [
    *linear_cases("linear_relu"),
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
        # Named tensors, which torch 2.13 removed.
        unlike_torch="torch takes it for a name" if hasattr(Tensor, "names") else None,
    )
]


def shared_loss_cases(op: str) -> list[Case]:
    """Calls that nll_loss and cross_entropy both reject."""

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
            "target out of range among many rows",  # a second thread finds it
            lambda: (floats(9000, 10), torch.full((9000,), 3).index_fill(0, indices(8999), 10)),
            IndexError,
            ("Target 10 is out of bounds", r"\b10 classes"),
        ),
        Case(
            op,
            "two targets out of range",  # the message names the first
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
    """A target for (N, 5, ...) whose last row is out of range, and an earlier row ignored."""
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

CASES = LINEAR_CASES + LINEAR_RELU_CASES + LOG_SOFTMAX_CASES + NLL_LOSS_CASES + CROSS_ENTROPY_CASES


def is_found_by_the_kernel(error: type[Exception], says: tuple[str, ...]) -> bool:
    return error is IndexError and says[0].startswith("Target ")


def as_kernels_raise(
    error: type[Exception], says: tuple[str, ...]
) -> tuple[type[Exception], tuple[str, ...]]:
    """The error for a bad index that a CUDA kernel finds: an assert, which can't name the index."""
    if EMULATES_CUDA and is_found_by_the_kernel(error, says):
        return RuntimeError, ("device-side assert triggered", "Target is out of bounds")
    return error, says


def exception_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Exception | None:
    try:
        function(*args, **kwargs)
    except Exception as error:
        return error
    return None


def has_memory(value: object) -> bool:
    return isinstance(value, Tensor) and not value.is_meta

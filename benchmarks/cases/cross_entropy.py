"""Cross entropy and its options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import fastnn
from benchmarks.case import (
    Case,
    Compiled,
    Contender,
    Function,
    Inputs,
    Unavailable,
    Work,
    classes,
    normal,
)
from benchmarks.cases.classifiers import (
    DTYPES,
    MODES,
    SHAPES,
    label,
    logits_and_targets,
    on_cuda,
    size_facts,
)
from benchmarks.device import CUDA

OPTIONS_SHAPE = (512, 1000)
SMOOTHING = 0.1
AUTOCAST_SHAPES = ((512, 1000), (2048, 32000))


def cases() -> list[Case]:
    plain = [_case(*shape, dtype, mode) for shape in SHAPES for dtype in DTYPES for mode in MODES]
    smoothed = [_smoothed_case(*OPTIONS_SHAPE, mode) for mode in MODES]
    probabilities = [_probabilities_case(*OPTIONS_SHAPE, mode) for mode in MODES]
    autocast = [_autocast_case(*shape) for shape in AUTOCAST_SHAPES]
    return plain + smoothed + probabilities + autocast


# Rows, classes, dtypes, priority on a GPU: batches of a language model's tokens; MNIST's batch and
# many such rows; ImageNet's classes; few very long rows.
CUDA_SIZES = (
    (8192, 32000, DTYPES, 1),
    (8192, 128256, (torch.bfloat16,), 1),
    (65536, 10, DTYPES, 1),
    (64, 10, (torch.float32,), 1),
    (512, 1000, DTYPES, 2),
    (8192, 1000, (torch.bfloat16,), 2),
    (32, 128256, (torch.bfloat16,), 2),
)
LANGUAGE_MODEL = (8192, 32000)
SEGMENTATION = (8, 21, 512, 512)


def cuda_cases() -> list[Case]:
    plain = [
        on_cuda(
            _case(rows, columns, dtype, mode),
            priority,
            large=(rows, columns, dtype) == (*LANGUAGE_MODEL, torch.bfloat16)
            and mode == "forward_backward",
        )
        for rows, columns, dtypes, priority in CUDA_SIZES
        for dtype in dtypes
        for mode in MODES
    ]
    rows, columns = LANGUAGE_MODEL
    autocast = [on_cuda(_autocast_case(n, columns), 1) for n in (64, rows)]
    smoothed = [on_cuda(_smoothed_case(*LANGUAGE_MODEL, mode, torch.bfloat16), 2) for mode in MODES]
    segmentation = [
        on_cuda(_segmentation_case(dtype, mode), 2) for dtype in DTYPES for mode in MODES
    ]
    return plain + autocast + smoothed + segmentation


def _case(rows: int, columns: int, dtype: torch.dtype, mode: str) -> Case:
    gradients = mode == "forward_backward"
    return Case(
        op="cross_entropy",
        label=label(rows, columns),
        dtype=dtype,
        mode=mode,
        inputs=partial(
            logits_and_targets, rows=rows, columns=columns, dtype=dtype, gradients=gradients
        ),
        contenders=_contenders,
        reference=Function("reference", F.cross_entropy),
        # The logits are read once and their gradient is written once.
        work=Work(bytes=_bytes(rows, columns, dtype, 2 if gradients else 1)),
        **size_facts(rows, columns, mode),
    )


def _bytes(rows: int, columns: int, dtype: torch.dtype, passes: int) -> float:
    return passes * rows * columns * dtype.itemsize + rows * torch.int64.itemsize


def _contenders() -> list[Contender]:
    return [
        Function("fastnn", fastnn.functional.cross_entropy),
        Function("F.cross_entropy", F.cross_entropy),
        Function("LogSoftmax+NLLLoss", _two_operators),
        Compiled("torch.compile", F.cross_entropy),
        Destructive("Liger", _liger, jit=True, devices=(CUDA.name,)),
        Function("Apex", _apex, devices=(CUDA.name,)),
    ]


def _two_operators(logits: Tensor, target: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(logits, 1), target)


# ---- other libraries' kernels --------------------------------------------------------------------


def _liger(logits: Tensor, target: Tensor, **options) -> Tensor:
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy
    except ImportError:
        raise Unavailable("liger_kernel is not installed") from None
    return liger_cross_entropy(logits, target, **options)


def _apex(logits: Tensor, target: Tensor) -> Tensor:
    try:
        from apex.contrib.xentropy import SoftmaxCrossEntropyLoss
    except ImportError:
        raise Unavailable("apex with its xentropy extension is not installed") from None
    # No smoothing; -100 because it ignores class 0 by default.
    return SoftmaxCrossEntropyLoss.apply(logits, target, 0.0, -100).mean()


@dataclass
class Destructive(Function):
    """A function that, like Liger's, overwrites its first argument with the gradient.

    It gets its own copy, so that the other contenders keep the inputs of the check. The copy is
    made outside the timed calls, because a training loop can afford to lose its logits. Only the
    first call sees the logits; later ones see the previous gradient, finite numbers that take the
    kernel as long.
    """

    overwrites: bool = field(default=True, kw_only=True)

    def bind(self, inputs: Inputs) -> Callable[[], object]:
        logits, *others = inputs.args
        own = logits.detach().clone().requires_grad_(logits.requires_grad)
        return super().bind(replace(inputs, args=(own, *others)))


# ---- options -------------------------------------------------------------------------------------


def _smoothed_case(rows: int, columns: int, mode: str, dtype: torch.dtype = torch.float32) -> Case:
    return replace(
        _case(rows, columns, dtype, mode),
        label=f"{label(rows, columns)}, smoothing",
        contenders=partial(_option_contenders, SMOOTHING),
        reference=Function("reference", _with_smoothing(F.cross_entropy, SMOOTHING)),
    )


def _probabilities_case(rows: int, columns: int, mode: str) -> Case:
    gradients = mode == "forward_backward"
    elements = rows * columns
    return Case(
        op="cross_entropy",
        label=f"{label(rows, columns)}, probabilities",
        dtype=torch.float32,
        mode=mode,
        inputs=partial(_logits_and_probabilities, rows=rows, columns=columns, gradients=gradients),
        contenders=partial(_option_contenders, 0.0),
        reference=Function("reference", F.cross_entropy),
        # Logits and probabilities are read, the gradient is written.
        work=Work(bytes=(3 if gradients else 2) * elements * torch.float32.itemsize),
    )


def _logits_and_probabilities(
    generator: torch.Generator, rows: int, columns: int, gradients: bool
) -> Inputs:
    logits = normal(generator, rows, columns, dtype=torch.float32).requires_grad_(gradients)
    return Inputs((logits, normal(generator, rows, columns, dtype=torch.float32).softmax(1)))


def _with_smoothing(function: Callable[..., Tensor], smoothing: float) -> Callable[..., Tensor]:
    def smoothed(logits: Tensor, target: Tensor) -> Tensor:
        return function(logits, target, label_smoothing=smoothing)

    return smoothed


def _option_contenders(smoothing: float) -> list[Contender]:
    stock = _with_smoothing(F.cross_entropy, smoothing)
    contenders = [
        Function("fastnn", _with_smoothing(fastnn.functional.cross_entropy, smoothing)),
        Function("F.cross_entropy", stock),
        Compiled("torch.compile", stock),
    ]
    if smoothing:
        liger = _with_smoothing(_liger, smoothing)
        contenders.append(Destructive("Liger", liger, jit=True, devices=(CUDA.name,)))
    return contenders


# ---- under autocast, and for images --------------------------------------------------------------


def _autocast_case(rows: int, columns: int) -> Case:
    """Mixed precision: autocast asks for float32, and the logits are narrower."""
    return replace(
        _case(rows, columns, torch.bfloat16, "forward_backward"),
        label=f"{label(rows, columns)}, autocast",
        contenders=lambda: [
            Function("fastnn", _under_autocast(fastnn.functional.cross_entropy)),
            Function("F.cross_entropy", _under_autocast(F.cross_entropy)),
            Compiled("torch.compile", _under_autocast(F.cross_entropy)),
        ],
    )


def _under_autocast(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def autocast_loss(logits: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(logits.device.type, dtype=torch.bfloat16):
            return loss(logits, target)

    return autocast_loss


def _segmentation_case(dtype: torch.dtype, mode: str) -> Case:
    pictures, count, height, width = SEGMENTATION
    gradients = mode == "forward_backward"
    return replace(
        _case(pictures * height * width, count, dtype, mode),
        label=" x ".join(map(str, SEGMENTATION)),
        inputs=partial(_pictures, dtype=dtype, gradients=gradients),
        contenders=lambda: [
            Function("fastnn", fastnn.functional.cross_entropy),
            Function("F.cross_entropy", F.cross_entropy),
            Compiled("torch.compile", F.cross_entropy),
        ],
    )


def _pictures(generator: torch.Generator, dtype: torch.dtype, gradients: bool) -> Inputs:
    pictures, count, *size = SEGMENTATION
    logits = normal(generator, *SEGMENTATION, dtype=dtype).requires_grad_(gradients)
    return Inputs((logits, classes(generator, count, pictures, *size)))

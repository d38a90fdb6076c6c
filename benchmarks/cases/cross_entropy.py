"""Cross entropy, with its options, and behind the linear layer of a large vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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
# Rows, features, vocabulary.
VOCABULARY_SHAPE = (256, 256, 32000)
# Of torch's fusion: all rows at once are fastest here, fewer save memory, and its own choice takes
# ten times as long.
CHUNK_ROWS = (64, 256)


def cases() -> list[Case]:
    plain = [_case(*shape, dtype, mode) for shape in SHAPES for dtype in DTYPES for mode in MODES]
    smoothed = [_smoothed_case(*OPTIONS_SHAPE, mode) for mode in MODES]
    probabilities = [_probabilities_case(*OPTIONS_SHAPE, mode) for mode in MODES]
    return plain + smoothed + probabilities + [_vocabulary_case(mode) for mode in MODES]


# Rows, classes, dtypes, priority on a GPU: batches of a language model's tokens; MNIST's batch and
# many of its rows; ImageNet's classes; few very long rows.
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
    autocast = [on_cuda(_autocast_case(rows), 1) for rows in (64, LANGUAGE_MODEL[0])]
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
        # The logits are read and their gradient is written, once each.
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
    # No smoothing; the class that it ignores is 0 where it is told no other.
    return SoftmaxCrossEntropyLoss.apply(logits, target, 0.0, -100).mean()


@dataclass
class Destructive(Function):
    """A function that overwrites its first argument, as Liger's does, with the gradient.

    It gets a copy of its own, or its neighbours would find other inputs than the check has seen.
    The copy is made outside of the timed calls, for in a training loop the logits may be lost and
    need none. Only the first call finds the logits there, the later ones what the one before has
    left: finite numbers too, over which the kernel takes as long.
    """

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
        # The logits and the probabilities are read, the gradient is written.
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


# ---- under autocast, and of pictures -------------------------------------------------------------


def _autocast_case(rows: int) -> Case:
    """As in mixed precision: autocast asks for float32, and the logits are narrower."""
    columns = LANGUAGE_MODEL[1]
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


# ---- behind a linear layer -----------------------------------------------------------------------


def _vocabulary_case(mode: str) -> Case:
    rows, features, vocabulary = VOCABULARY_SHAPE
    gradients = mode == "forward_backward"
    return Case(
        op="linear + cross_entropy",
        label=f"{rows}, {features}->{vocabulary}",
        dtype=torch.float32,
        mode=mode,
        inputs=partial(_features_weight_targets, gradients=gradients),
        contenders=_vocabulary_contenders,
        reference=Function("reference", _linear_then(F.cross_entropy)),
        work=Work(flops=(3 if gradients else 1) * 2.0 * rows * features * vocabulary),
        large=gradients,
    )


def _features_weight_targets(generator: torch.Generator, gradients: bool) -> Inputs:
    rows, features, vocabulary = VOCABULARY_SHAPE
    hidden = normal(generator, rows, features, dtype=torch.float32)
    weight = normal(generator, vocabulary, features, dtype=torch.float32, scale=features**-0.5)
    return Inputs(
        (
            hidden.requires_grad_(gradients),
            weight.requires_grad_(gradients),
            classes(generator, vocabulary, rows),
        )
    )


def _linear_then(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def linear_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return loss(F.linear(hidden, weight), target)

    return linear_loss


def _vocabulary_contenders() -> list[Contender]:
    stock = _linear_then(F.cross_entropy)
    contenders = [
        Function("fastnn", _linear_then(fastnn.functional.cross_entropy)),
        Function("F.linear, F.cross_entropy", stock),
        Compiled("torch.compile", stock),
    ]
    if hasattr(F, "linear_cross_entropy"):
        contenders += [
            Function(f"F.linear_cross_entropy, {rows} rows", _chunked(rows), same_algorithm=False)
            for rows in CHUNK_ROWS
        ]
    return contenders


def _chunked(rows: int) -> Callable[..., Tensor]:
    """Torch's own fusion of both, in chunks; it has the gradients ready after the forward."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)

    def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden, weight, target, options=options)

    return linear_cross_entropy

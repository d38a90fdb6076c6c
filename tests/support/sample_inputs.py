"""The inputs for testing the operators; the entry point is ``sample_inputs(op, dtype)``.

Each sample has a name and its own random numbers, which depend only on the seed and that name: it
can be built by itself, and the same seed builds the same sample whatever else runs. Each run has a
fresh seed unless ``FASTNN_TEST_SEED`` sets it; failures print it (see conftest.py).
"""

from __future__ import annotations

import os
import secrets
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fastnn._operators import OPERATORS

SEED = int(os.environ.get("FASTNN_TEST_SEED") or secrets.randbelow(2**31))

OPS = tuple(operator.name for operator in OPERATORS)

# The dtypes of the operators; the two narrow ones are summed in float32 and rounded once.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# 255 is the usual "no label" of uint8 image masks, and a signed byte would misread it.
UINT8_IGNORE = 255


@dataclass(frozen=True)
class Sample:
    """One call: ``torch.nn.functional.<op>(*args, **kwargs)``."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


def on_device(values: Tensor) -> Tensor:
    """Moves values to the device under test: the default device, see conftest.py."""
    return values.to(torch.get_default_device())


class Draws:
    """Random tensors from a seed, on the device under test; always the CPU's numbers, because other
    devices draw different ones."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=dtype, device="cpu")
        return on_device(values)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        values = torch.rand(shape, generator=self.generator, dtype=dtype, device="cpu")
        return on_device(values)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        values = torch.randint(low, high, shape, generator=self.generator, device="cpu")
        return on_device(values)


class Maker:
    """Draws the tensors of a sample."""

    def __init__(self, name: str, dtype: torch.dtype, seed: int) -> None:
        self.dtype = dtype
        self.draw = Draws(zlib.crc32(f"{seed}/{name}".encode()))

    def normal(self, *shape: int, scale: float = 1.0, layout: str = "contiguous") -> Tensor:
        values = self.draw.normal(*shape, dtype=torch.float64) * scale
        return laid_out(values.to(self.dtype), layout)

    def log_probs(self, *shape: int, layout: str = "contiguous") -> Tensor:
        """A realistic input of nll_loss: log_softmax over the classes, rounded."""
        logits = self.draw.normal(*shape, dtype=torch.float64)
        class_dim = 0 if len(shape) == 1 else 1
        return laid_out(logits.log_softmax(class_dim).to(self.dtype), layout)

    def probabilities(self, *shape: int, layout: str = "contiguous") -> Tensor:
        """Class probabilities; they sum to one before rounding, like a teacher's."""
        return laid_out(self.log_probs(*shape).exp(), layout)

    def integers(self, low: int, high: int, *shape: int, layout: str = "contiguous") -> Tensor:
        return laid_out(self.draw.integers(low, high, *shape), layout)

    def class_weights(self, classes: int, layout: str = "contiguous") -> Tensor:
        """Class weights in [0.25, 2), one of them zero if there are at least three classes: classes
        are often switched off, and dividing by such a weight would fail."""
        values = self.draw.uniform(classes, dtype=torch.float64) * 1.75 + 0.25
        if classes > 2:
            values[classes // 2] = 0
        return laid_out(values.to(self.dtype), layout)


def _filler(values: Tensor) -> float:
    """The value between and around a view's elements: it spoils any result it gets into (NaN; for
    integers a class index out of range)."""
    return float("nan") if values.is_floating_point() else 10**6 if values.itemsize > 1 else 200


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout ('expanded' repeats the first of dimension 0)."""
    if layout == "contiguous":
        return values.contiguous()
    if layout == "transposed":  # rows are strided, columns contiguous
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "reversed":  # every dimension reversed in memory
        order = list(range(values.dim()))[::-1]
        return values.permute(order).contiguous().permute(order)
    if layout == "sliced":  # no stride is 1, and neighbours must not be read
        wide = values.new_full((*values.shape[:-1], 2 * values.shape[-1]), _filler(values))
        view = wide[..., ::2]
        view.copy_(values)
        return view
    if layout == "offset":  # contiguous, but only aligned to elements, amid other data
        buffer = values.new_full((values.numel() + 65,), _filler(values))
        view = buffer[1 : 1 + values.numel()].view(values.shape)
        view.copy_(values)
        return view
    if layout == "expanded":  # stride 0: rows share their memory
        return values[:1].expand_as(values)
    if layout == "channels_last":  # as from convolutions: classes are contiguous
        memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}[values.dim()]
        return values.contiguous(memory_format=memory_format)
    raise ValueError(layout)


Build = Callable[[Maker], tuple[tuple[Any, ...], dict[str, Any]]]

# A vector has 4, 8 or 16 lanes (float64 to float32 with AVX2 and AVX-512; narrow dtypes are loaded
# 8, 16 or 32 at a time): each size full, one short and one over. 1 to 3 only have a tail. Rows of
# up to four vectors (16, 32, 64) are short and processed several at once; 63 to 81 are around that
# limit for the widest, and a vector longer with a tail one short and one over.
VECTOR_SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 79, 81)


def _linear_specs() -> Iterator[tuple[str, Build]]:
    def spec(input_shape, outputs, bias=True, layouts=("contiguous",) * 3, shift=0.0):
        def build(make: Maker):
            features = input_shape[-1]
            # Scaled like initial weights: outputs stay of order one.
            scale = max(features, 1) ** -0.5
            args = [
                make.normal(*input_shape, layout=layouts[0]),
                make.normal(outputs, features, scale=scale, layout=layouts[1]),
            ]
            if bias:
                bias_values = make.normal(outputs) + shift
                args.append(laid_out(bias_values, layouts[2]))
            return tuple(args), {}

        return build

    sizes = (
        (0, 3, 2),  # an empty batch
        (2, 0, 3),  # no features: only the bias
        (2, 3, 0),  # no outputs
        (1, 1, 1),  # the smallest
        (1, 9, 7),  # one row: libraries may use a matrix-vector product
        (9, 7, 1),  # one output: the same, the other way round
        (3, 4, 5),  # around 4 lanes
        (5, 8, 7),  # around 8
        (7, 15, 9),
        (8, 17, 16),  # around 16
        (16, 16, 17),
        (17, 33, 31),  # around 32, the usual tile
        (33, 31, 32),
        (64, 64, 64),  # whole tiles only
        (65, 63, 65),  # tiles and tails in each direction
        (300, 129, 257),  # odd, many tiles, enough work for two threads
        (40, 1000, 24),  # a long sum for each output
        (400, 300, 256),  # sums over rows, and below over features, that vectors split unevenly
        (9, 400, 400),
        (600, 8, 40),  # enough rows for two threads, with little work each; long bias sums
    )
    for rows, features, outputs in sizes:
        for bias in (True, False):
            name = f"{rows}x{features}_to_{outputs}{'' if bias else '_no_bias'}"
            yield name, spec((rows, features), outputs, bias)

    yield "1d_input", spec((9,), 5)  # a single example without a batch
    yield "1d_input_no_bias", spec((9,), 5, bias=False)
    yield "3d_input", spec((2, 3, 9), 5)  # a sequence
    yield "3d_input_no_bias", spec((2, 3, 9), 5, bias=False)  # torch takes another path without
    yield "4d_input", spec((2, 1, 3, 9), 5)  # with a dimension of one
    yield "3d_empty_inner", spec((2, 0, 9), 5)  # an empty leading dimension other than the first

    plain = "contiguous"
    for layout in ("transposed", "reversed", "sliced", "offset", "expanded"):
        yield f"input_{layout}", spec((10, 18), 11, layouts=(layout, plain, plain))
        yield f"weight_{layout}", spec((10, 18), 11, layouts=(plain, layout, plain))
        yield f"3d_input_{layout}", spec((3, 4, 9), 5, layouts=(layout, plain, plain))
    yield "4d_input_channels_last", spec((2, 5, 3, 9), 5, layouts=("channels_last", plain, plain))
    for layout in ("sliced", "offset", "expanded"):
        yield f"bias_{layout}", spec((10, 18), 11, layouts=(plain, plain, layout))
    yield "all_sliced", spec((10, 18), 11, layouts=("sliced",) * 3)

    # Every output is negative: the ReLU clamps all, and the gradients are zero. Then none is.
    yield "none_active", spec((6, 9), 10, shift=-30.0)
    yield "all_active", spec((6, 9), 10, shift=30.0)


def _log_softmax_specs() -> Iterator[tuple[str, Build]]:
    def spec(shape, dim, layout="contiguous", scale=3.0, shift=0.0, **kwargs):
        # scale: three standard deviations of 3 spread the probabilities over seven decades
        return lambda make: (
            (laid_out(make.normal(*shape, scale=scale) + shift, layout), dim),
            kwargs,
        )

    for dim in (0, -1):  # a scalar counts as one element: dimension 0
        yield f"0d_dim{dim}", spec((), dim)
    for shape, dim in (((0,), 0), ((3, 0), 1), ((3, 0), 0), ((0, 5), 0), ((0, 5), 1)):
        yield f"empty_{shape}_dim{dim}".replace(" ", ""), spec(shape, dim)
    for size in VECTOR_SIZES:
        yield f"rows_3x{size}", spec((3, size), 1)  # the normalised dimension is contiguous
        yield f"long_columns_{size}x3", spec((size, 3), 0)  # strided; 3 columns only have a tail
        yield f"columns_5x{size}", spec((5, size), 0)  # the dimension that vectors run along
    for dim in (-3, -2, -1, 0, 1, 2):  # each dimension by both of its indices
        yield f"3d_dim{dim}", spec((3, 4, 5), dim)
    for dim in range(4):
        yield f"4d_dim{dim}", spec((2, 3, 4, 5), dim)
        yield f"4d_channels_last_dim{dim}", spec((2, 3, 4, 5), dim, "channels_last")
    yield "5d_channels_last_dim1", spec((2, 3, 2, 4, 3), 1, "channels_last")
    for layout, dim in product(("transposed", "sliced", "offset", "expanded"), (0, 1)):
        yield f"{layout}_dim{dim}", spec((9, 18), dim, layout)
    for layout in ("reversed", "transposed"):
        yield f"3d_{layout}", spec((3, 9, 5), 1, layout)

    yield "1000_classes", spec((7, 1000), 1)  # ImageNet's
    yield "5000_classes", spec((64, 5000), 1)  # long rows, enough of them for two threads
    yield "5000_classes_strided", spec((5000, 9), 0)  # long columns, few of them
    yield "many_rows", spec((9000, 10), 1)  # short rows for two threads
    yield "many_columns", spec((10, 9000), 0)
    yield "many_planes", spec((40, 21, 70), 1)  # both sides of dim are split
    yield "peaked", spec((6, 33), 1, scale=60.0)  # most probabilities underflow
    # exp overflows or underflows unless the maximum is subtracted, which must not include the zeros
    # that may fill a vector's last lanes. Short and long rows, each with a tail.
    for size, shift in product((5, 81), (1000.0, -1000.0)):
        yield f"3x{size}_at_{shift:.0f}", spec((3, size), 1, shift=shift)
        yield f"{size}x3_at_{shift:.0f}", spec((size, 3), 0, shift=shift)

    for cast in (torch.float64, torch.float32, torch.float16):  # wider, equal and narrower
        yield f"cast_to_{cast}".replace("torch.", ""), spec((3, 9), 1, dtype=cast)
    # An integer input only makes sense with dtype=
    yield (
        "integer_input_cast",
        lambda make: ((make.integers(-5, 5, 3, 9), 1), {"dtype": make.dtype}),
    )


# (C), (N, C) and one to three more dimensions. 5 classes are odd and few, so the rows of a small
# sample hit most of them.
LOSS_SHAPES = ((5,), (7, 5), (3, 5, 4), (2, 5, 3, 4), (2, 5, 3, 2, 2))
REDUCTIONS = ("none", "mean", "sum")


def _row_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:1] + shape[2:] if len(shape) > 1 else ()


def _classes(shape: tuple[int, ...]) -> int:
    return shape[1] if len(shape) > 1 else shape[0]


def _name(shape: tuple[int, ...], *parts: str) -> str:
    return "_".join(["x".join(map(str, shape)), *(part for part in parts if part)])


def _index_loss_spec(
    op,
    shape,
    weighted=False,
    ignored=None,
    target_dtype=torch.int64,
    layout="contiguous",
    target_layout="contiguous",
    weight_layout="contiguous",
    **kwargs,
) -> Build:
    """A loss with class indices; ``ignored`` is the ignore_index and the target of about a third of
    the rows. The first row is never ignored and its class weight isn't zero, so that 'mean' divides
    by a nonzero number (the other case has its own test)."""

    def build(make: Maker):
        draw = make.log_probs if op == "nll_loss" else make.normal
        scale = {} if op == "nll_loss" else {"scale": 3.0}
        input = draw(*shape, layout=layout, **scale)
        target = make.integers(0, _classes(shape), *_row_shape(shape))
        options = dict(kwargs)
        if ignored is not None:
            options["ignore_index"] = ignored
            target = target.masked_fill(make.integers(0, 3, *target.shape) == 0, ignored)
        if target.numel():
            target.view(-1)[0] = 0 if ignored != 0 else 1
        target = laid_out(target.to(target_dtype), target_layout)
        if weighted:
            options["weight"] = make.class_weights(_classes(shape), weight_layout)
        return (input, target), options

    return build


def _index_loss_specs(op: str) -> Iterator[tuple[str, Build]]:
    """The samples that nll_loss and cross_entropy share."""

    def spec(*args, **kwargs):
        return _index_loss_spec(op, *args, **kwargs)

    for shape, reduction, weighted in product(LOSS_SHAPES, REDUCTIONS, (False, True)):
        name = _name(shape, reduction, "weighted" if weighted else "")
        yield name, spec(shape, weighted, reduction=reduction)
    # -100: the default. 3: an index that is also a class. -1: another negative one.
    for shape, ignored, weighted in product(LOSS_SHAPES[1:], (-100, 3, -1), (False, True)):
        reduction = REDUCTIONS[(len(shape) + ignored) % 3]  # each reduction, not each with each
        name = _name(shape, f"ignore{ignored}", reduction, "weighted" if weighted else "")
        yield name, spec(shape, weighted, ignored, reduction=reduction)
    for shape in LOSS_SHAPES[:4]:  # torch itself accepts bytes only for the first two
        yield _name(shape, "uint8"), spec(shape, target_dtype=torch.uint8)
    yield (
        "uint8_ignore255",
        spec((9, 5), True, UINT8_IGNORE, target_dtype=torch.uint8),
    )
    # A class index that is negative as a signed byte.
    yield "uint8_200_classes", spec((9, 200), target_dtype=torch.uint8)

    for shape in ((0, 5), (0, 5, 3), (2, 5, 0), (0, 5, 2, 3)):  # no rows: mean is NaN
        for reduction in REDUCTIONS:
            yield _name(shape, "empty", reduction), spec(shape, reduction=reduction)

    for size in VECTOR_SIZES:
        yield f"7x{size}_classes", spec((7, size), True, -100)
    for rows in (1, 8, 16, 17, 33):  # blocks of rows processed at once if classes are few
        yield f"{rows}_rows_of_3", spec((rows, 3))
    for pixels in (1, 8, 15, 17, 33):  # vectors run along the pixels
        yield f"2x3x{pixels}_pixels", spec((2, 3, pixels), True, reduction="none")

    for layout in ("transposed", "sliced", "offset", "expanded"):
        yield f"7x18_input_{layout}", spec((7, 18), layout=layout)
        yield f"3x18x4_input_{layout}", spec((3, 18, 4), layout=layout, reduction="sum")
    yield "2x9x4x5_channels_last", spec((2, 9, 4, 5), True, 3, layout="channels_last")
    yield "2x9x4x5_reversed", spec((2, 9, 4, 5), layout="reversed", reduction="none")
    yield "2x9x3x2x4_channels_last", spec((2, 9, 3, 2, 4), layout="channels_last")
    for layout in ("sliced", "offset", "expanded"):
        yield f"target_{layout}", spec((7, 18), target_layout=layout)
        yield f"weight_{layout}", spec((7, 18), True, weight_layout=layout)
    yield "2d_target_transposed", spec((3, 5, 4, 6), target_layout="transposed")

    yield "7x1000_classes", spec((7, 1000), True)  # ImageNet's
    yield "64x5000_classes", spec((64, 5000))  # long rows, enough of them for two threads
    yield "5x5000x3_strided", spec((5, 5000, 3))  # long and strided
    # Short rows for two threads, and long sums of losses and of weights.
    yield "9000_rows_of_10", spec((9000, 10), True, -100)
    yield "segmentation", spec((3, 21, 40, 33), True, UINT8_IGNORE)  # Pascal VOC, made small
    yield "segmentation_none", spec((3, 21, 40, 33), ignored=UINT8_IGNORE, reduction="none")

    # The deprecated pair overrides ``reduction``: (None or True, None or True) is 'mean', (False,
    # .) 'sum', (., False) 'none'.
    for size_average, reduce in product((None, True, False), repeat=2):
        if size_average is None and reduce is None:
            continue  # nothing deprecated is given
        yield (
            f"size_average_{size_average}_reduce_{reduce}",
            spec((7, 5), True, 3, size_average=size_average, reduce=reduce, reduction="sum"),
        )


def _nll_loss_specs() -> Iterator[tuple[str, Build]]:
    yield from _index_loss_specs("nll_loss")
    # torch accepts a target of one element for an input without a batch.
    yield (
        "5_target_of_one",
        lambda make: ((make.log_probs(5), make.integers(0, 5, 1)), {}),
    )


def _cross_entropy_specs() -> Iterator[tuple[str, Build]]:
    yield from _index_loss_specs("cross_entropy")
    yield "5_target_of_one", lambda make: ((make.normal(5), make.integers(0, 5, 1)), {})

    def spec(*args, **kwargs):
        return _index_loss_spec("cross_entropy", *args, **kwargs)

    # 0.1 is the customary value; at 1.0 the target no longer matters.
    smoothings = (0.1, 1.0)
    for shape, reduction, weighted, smoothing in product(
        LOSS_SHAPES, REDUCTIONS, (False, True), smoothings
    ):
        ignored = 3 if weighted else -100  # in range with weights, out of range without
        name = _name(shape, f"smooth{smoothing}", reduction, "weighted" if weighted else "")
        yield (
            name,
            spec(shape, weighted, ignored, reduction=reduction, label_smoothing=smoothing),
        )
    for size in (1, 3, 8, 17, 33):  # one class; vectors short, full and over
        yield f"7x{size}_smooth", spec((7, size), True, label_smoothing=0.1)
    yield "64x5000_smooth", spec((64, 5000), label_smoothing=0.1)
    yield "9000_rows_of_10_smooth", spec((9000, 10), True, -100, label_smoothing=0.1)
    yield "channels_last_smooth", spec((2, 9, 4, 5), layout="channels_last", label_smoothing=0.1)
    yield "uint8_smooth", spec((9, 5), target_dtype=torch.uint8, label_smoothing=0.1)
    # Logits near 1000 and 3 apart: exp must not overflow or underflow, nor lse - x cancel. Short
    # and long rows, each with a tail.
    for classes, shift, smoothing in product((5, 81), (1000.0, -1000.0), (0.0, 0.1)):
        name = f"7x{classes}_at_{shift:.0f}_smooth{smoothing}"
        yield name, _far_from_zero(classes, shift, label_smoothing=smoothing)
    yield from _probability_specs()


def _far_from_zero(classes: int, shift: float, **kwargs) -> Build:
    def build(make: Maker):
        logits = make.normal(7, classes, scale=3.0) + shift
        return (logits, make.integers(0, classes, 7)), {"reduction": "none", **kwargs}

    return build


def _probability_specs() -> Iterator[tuple[str, Build]]:
    """cross_entropy with class probabilities as targets."""

    def spec(shape, weighted=False, layout="contiguous", target_layout="contiguous", **kwargs):
        def build(make: Maker):
            args = (
                make.normal(*shape, scale=3.0, layout=layout),
                make.probabilities(*shape, layout=target_layout),
            )
            weight = {"weight": make.class_weights(_classes(shape))} if weighted else {}
            return args, {**kwargs, **weight}

        return build

    for shape, reduction, weighted in product(LOSS_SHAPES, REDUCTIONS, (False, True)):
        # Each shape meets each smoothing: none, the customary one, and the limit.
        smoothing = (0.0, 0.1, 1.0)[(REDUCTIONS.index(reduction) + len(shape) + weighted) % 3]
        name = _name(shape, "probs", reduction, "weighted" if weighted else "", f"{smoothing}")
        yield name, spec(shape, weighted, reduction=reduction, label_smoothing=smoothing)
    yield "3x0_probs_no_classes", spec((3, 0), reduction="sum")  # each loss is an empty sum
    for shape in ((0, 5), (2, 5, 0)):  # no rows: mean is NaN
        for reduction in REDUCTIONS:
            yield _name(shape, "probs_empty", reduction), spec(shape, reduction=reduction)
    for size in (1, 3, 8, 17, 33):
        yield f"7x{size}_probs", spec((7, size), True, label_smoothing=0.1)
    for layout in ("transposed", "sliced", "offset", "expanded"):
        yield f"7x18_probs_input_{layout}", spec((7, 18), layout=layout)
        yield f"7x18_probs_target_{layout}", spec((7, 18), target_layout=layout)
    # The layouts of input and target may differ.
    yield "channels_last_probs", spec((2, 9, 4, 5), layout="channels_last")
    yield "channels_last_probs_target", spec((2, 9, 4, 5), target_layout="channels_last")
    yield "64x5000_probs", spec((64, 5000))  # long rows, enough of them for two threads
    yield "3000_rows_of_21_probs", spec((3000, 21), True)


def _linear_cross_entropy_spec(
    rows: int | None,
    features: int,
    *outputs: int,
    bias: bool = False,
    weighted: bool = False,
    ignored: int | None = None,
    probabilities: bool = False,
    layout: str = "contiguous",
    scale: float = 1.0,
    **kwargs,
) -> Build:
    """``outputs`` are the classes and the positions; a third of the targets, but never the first,
    is ``ignored``; logits are of order ``scale``."""

    def build(make: Maker):
        batch = () if rows is None else (rows,)
        input = make.normal(*batch, features, layout=layout)
        size = scale / max(features, 1) ** 0.5
        linear_weight = make.normal(*outputs, features, scale=size, layout=layout)
        classes, *positions = outputs
        options = dict(kwargs)
        if bias:
            options["linear_bias"] = make.normal(*outputs)
        if weighted:
            options["weight"] = make.class_weights(classes)
        if probabilities:
            logits = make.normal(*batch, classes, *positions)
            target = logits.softmax(len(batch)).to(make.dtype)
            return (input, linear_weight, target), options
        target = make.integers(0, classes, *batch, *positions)
        if ignored is not None:
            options["ignore_index"] = ignored
            target = target.masked_fill(make.integers(0, 3, *target.shape) == 0, ignored)
        if target.numel():
            target.view(-1)[0] = 0 if ignored != 0 else 1
        return (input, linear_weight, target), options

    return build


def _linear_cross_entropy_specs() -> Iterator[tuple[str, Build]]:
    spec = _linear_cross_entropy_spec
    for smoothing, reduction, bias in product((0.0, 0.1), REDUCTIONS, (False, True)):
        options = {"reduction": reduction, "label_smoothing": smoothing, "bias": bias}
        smooth = f"smooth{smoothing}" if smoothing else ""
        name = _name((7, 15), "to_9", smooth, reduction, "bias" if bias else "")
        yield name, spec(7, 15, 9, **options)
        yield f"{name}_weighted", spec(7, 15, 9, **options, weighted=True, ignored=3)
    for reduction in REDUCTIONS:
        yield f"15_to_9_{reduction}", spec(None, 15, 9, reduction=reduction)
        yield f"0x5_to_3_{reduction}", spec(0, 5, 3, reduction=reduction)
        yield f"7x5_to_6x2x3_{reduction}", spec(7, 5, 6, 2, 3, reduction=reduction, bias=True)
        yield (
            f"7x5_to_6x2_{reduction}_weighted",
            spec(7, 5, 6, 2, reduction=reduction, weighted=True, ignored=1, label_smoothing=0.1),
        )
        yield (
            f"7x15_to_9_probs_{reduction}_weighted",
            spec(7, 15, 9, probabilities=True, reduction=reduction, weighted=True, bias=True),
        )
    yield "7x15_to_9_probs", spec(7, 15, 9, probabilities=True, label_smoothing=0.1)
    yield "15_to_9_probs", spec(None, 15, 9, probabilities=True)
    yield "7x5_to_6x2_probs", spec(7, 5, 6, 2, probabilities=True)
    yield "3x5_to_6x2x2x2_none", spec(3, 5, 6, 2, 2, 2, reduction="none")
    yield "7x0_to_3_sum", spec(7, 0, 3, reduction="sum")  # no features: the logits are the bias
    yield "7x5_to_1", spec(7, 5, 1)
    for layout in ("transposed", "sliced", "offset"):
        yield f"all_{layout}", spec(18, 17, 21, layout=layout, bias=True)
    for classes in (17, 33, 64, 65, 81):  # around a vector and a short row
        yield f"9x8_to_{classes}", spec(9, 8, classes, scale=3.0)
    # Several blocks of rows, with ignored ones, and several threads.
    yield "300x20_to_500", spec(300, 20, 500, scale=3.0, ignored=-100)
    yield "300x20_to_500_none", spec(300, 20, 500, reduction="none", ignored=-100)
    yield "2000x30_to_20", spec(2000, 30, 20, bias=True)


_SPECS_OF = {
    "linear": _linear_specs,
    "linear_relu": _linear_specs,
    "log_softmax": _log_softmax_specs,
    "nll_loss": _nll_loss_specs,
    "cross_entropy": _cross_entropy_specs,
    "linear_cross_entropy": _linear_cross_entropy_specs,
}
_SPECS: dict[str, dict[str, Build]] = {}
for _op in OPS:
    _SPECS[_op] = {}
    for _sample_name, _build in _SPECS_OF[_op]():
        assert _sample_name not in _SPECS[_op], f"two samples of {_op} are called {_sample_name}"
        _SPECS[_op][_sample_name] = _build


def sample_names(op: str) -> list[str]:
    """The names of the operator's samples, the same for every dtype."""
    return list(_SPECS[op])


def sample_inputs(
    op: str,
    dtype: torch.dtype,
    seed: int = SEED,
    names: list[str] | None = None,
) -> Iterator[Sample]:
    """The operator's samples in a dtype: all of them, or those in ``names``."""
    for name in sample_names(op) if names is None else names:
        maker = Maker(f"{op}/{name}/{dtype}", dtype, seed)
        args, kwargs = _SPECS[op][name](maker)
        yield Sample(name, args, kwargs)


def sample_input(op: str, dtype: torch.dtype, name: str) -> Sample:
    """The sample with that name."""
    return next(sample_inputs(op, dtype, names=[name]))

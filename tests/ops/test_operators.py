"""Values and gradients: against float64 oracles, against torch itself, and in edge cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastnn
from support.marks import needs_extension
from support.operator_cases import CASES
from support.operators import (
    LINEARS,
    TORCH,
    assert_grads_within,
    check_value_and_gradients,
    every_dtype,
    leaves_of,
    memory_of,
    ours,
    random_grad_like,
    run,
    torch_sample,
)
from support.oracles import assert_within, expected
from support.sample_inputs import DTYPES, OPS, Sample, laid_out, sample_input, sample_names

# Two ways to call the samples are deprecated in torch, which warns each time.
pytestmark = pytest.mark.filterwarnings(
    "ignore:size_average and reduce args will be deprecated", "ignore:Implicit dimension choice"
)

SAMPLES = [pytest.param(op, name, id=f"{op}-{name}") for op in OPS for name in sample_names(op)]

every_sample = pytest.mark.parametrize(("op", "name"), SAMPLES)


# --- every sample -------------------------------------------------------------------------------


@every_dtype
@every_sample
def test_value_and_gradients(implementation, op, name, dtype):
    check_value_and_gradients(op, sample_input(op, dtype, name))


@every_dtype
@pytest.mark.parametrize("op", LINEARS)
def test_linear_of_a_large_product(op, dtype):
    """On some processors the library's product, on others ours: 512 each way, and some more."""
    input, weight, bias = torch.randn(515, 530), torch.randn(521, 530) / 530**0.5, torch.randn(521)
    args = tuple(value.to(dtype) for value in (input, weight, bias))
    check_value_and_gradients(op, Sample("large", args))


@every_sample
def test_output_looks_like_torch_s(implementation, op, name):
    for dtype in DTYPES:
        sample = sample_input(op, dtype, name)
        output = ours(op)(*sample.args, **sample.kwargs)
        # Bytes in several dimensions become int64; nothing else changes.
        args = (arg.long() if _is_bytes(arg) else arg for arg in sample.args)
        torch_output = TORCH[op](*args, **sample.kwargs)
        assert output.dtype == torch_output.dtype
        assert output.shape == torch_output.shape
        assert output.device == torch_output.device
        assert output.stride() == torch_output.stride()
        assert output.is_contiguous()


def _is_bytes(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.uint8


# --- incoming gradients -------------------------------------------------------------------------


def shared(value: object) -> object:
    """A tensor that shares memory until it is written to."""
    return torch._lazy_clone(value) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@every_sample
def test_copy_on_write_arguments_stay_shared(op, name, dtype):
    """No argument is written to or copied."""
    plain = sample_input(op, dtype, name)
    kwargs = {key: shared(value) for key, value in plain.kwargs.items()}
    sample = Sample(name, tuple(map(shared, plain.args)), kwargs)
    leaves = leaves_of(op, sample)
    output = ours(op)(*leaves, *sample.args[len(leaves) :], **sample.kwargs)
    grad_output = shared(torch.randn(output.shape).to(output.dtype))
    if leaves:
        torch.autograd.grad(output, leaves, grad_output)
    tensors = [v for v in (*sample.args, *kwargs.values(), grad_output) if isinstance(v, Tensor)]
    assert all(torch._C._is_cow_tensor(tensor) for tensor in tensors if tensor.numel() > 0)


@every_dtype
@pytest.mark.parametrize("layout", ["transposed", "reversed", "sliced", "offset"])
@pytest.mark.parametrize("op", OPS)
def test_incoming_gradient_of_any_layout(implementation, op, layout, dtype):
    sample = sample_input(op, dtype, CASES[op].several_dimensions)
    grad_output = random_grad_like(op, sample)
    _, grads = run(ours(op), op, sample, laid_out(grad_output, layout))
    exact = expected(op, sample, grad_output)
    assert_grads_within(grads, exact)


@every_dtype
@pytest.mark.parametrize("op", OPS)
def test_incoming_gradient_of_channels_last(implementation, op, dtype):
    sample = sample_input(op, dtype, CASES[op].four_dimensions)
    grad_output = random_grad_like(op, sample)
    assert grad_output.dim() == 4
    _, grads = run(ours(op), op, sample, laid_out(grad_output, "channels_last"))
    exact = expected(op, sample, grad_output)
    assert_grads_within(grads, exact)


@every_dtype
@pytest.mark.parametrize("op", OPS)
def test_incoming_gradient_of_stride_zero(implementation, op, dtype):
    """``loss.sum().backward()`` passes one number, expanded to the output's shape."""
    sample = sample_input(op, dtype, CASES[op].several_dimensions)
    leaves = leaves_of(op, sample)
    output = ours(op)(*leaves, *sample.args[len(leaves) :], **sample.kwargs)
    grads = torch.autograd.grad(output.sum(), leaves)
    exact = expected(op, sample, torch.ones_like(output.detach()))
    assert_grads_within(grads, exact)


@every_dtype
@pytest.mark.parametrize(
    ("op", "name"),
    [
        *((op, name) for op in LINEARS for name in ("0x3_to_2", "2x3_to_0", "3d_empty_inner")),
        ("log_softmax", "empty_(3,0)_dim1"),
        ("nll_loss", "0x5_empty_none"),
        ("nll_loss", "2x5x0_empty_none"),
        ("cross_entropy", "0x5x2x3_empty_none"),
        ("cross_entropy", "0x5_probs_empty_none"),
    ],
)
def test_incoming_gradient_without_elements(implementation, op, name, dtype):
    sample = sample_input(op, dtype, name)
    leaves = leaves_of(op, sample)
    output = ours(op)(*leaves, *sample.args[len(leaves) :], **sample.kwargs)
    assert output.numel() == 0
    grads = torch.autograd.grad(output.sum(), leaves)
    for leaf, grad in zip(leaves, grads, strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))  # nothing was added up


@every_dtype
@pytest.mark.parametrize("op", LINEARS)
def test_only_the_gradients_asked_for(implementation, op, dtype):
    """Each subset of a linear's arguments gets the same gradients as all of them together."""
    sample = sample_input(op, dtype, "7x15_to_9")
    grad_output = random_grad_like(op, sample)
    exact = expected(op, sample, grad_output)
    for wanted in range(1, 8):
        leaves = [arg.detach() for arg in sample.args]
        chosen = [i for i in range(3) if wanted & 1 << i]
        for i in chosen:
            leaves[i].requires_grad_()
        output = ours(op)(*leaves)
        grads = torch.autograd.grad(output, [leaves[i] for i in chosen], grad_output)
        for i, grad in zip(chosen, grads, strict=True):
            assert_within(f"gradient {i} of {chosen}", grad, exact.grads[i], exact.grad_errors[i])


# --- determinism: the extension's; torch, and so the reference, promises less --------------------


@needs_extension
@every_sample
def test_same_bits_whether_gradients_are_wanted_or_not(op, name):
    for dtype in DTYPES:
        sample = sample_input(op, dtype, name)
        leaves = leaves_of(op, sample)
        with_grad = ours(op)(*leaves, *sample.args[len(leaves) :], **sample.kwargs)
        without_grad = ours(op)(*sample.args, **sample.kwargs)
        assert with_grad.requires_grad == bool(leaves)
        assert torch.equal(memory_of(with_grad.detach()), memory_of(without_grad))


# Enough work for two threads, over rows, columns and both; with sums over all rows.
THREADED = [
    *((op, name) for op in LINEARS for name in ("300x129_to_257", "600x8_to_40")),
    ("log_softmax", "5000_classes"),
    ("log_softmax", "many_rows"),
    ("log_softmax", "many_columns"),
    ("log_softmax", "many_planes"),
    ("nll_loss", "9000_rows_of_10"),
    ("nll_loss", "segmentation"),
    ("cross_entropy", "64x5000_classes"),
    ("cross_entropy", "9000_rows_of_10"),
    ("cross_entropy", "9000_rows_of_10_smooth"),
    ("cross_entropy", "segmentation"),
    ("cross_entropy", "segmentation_none"),
    ("cross_entropy", "3000_rows_of_21_probs"),
]


@needs_extension
@every_dtype
@pytest.mark.parametrize(("op", "name"), THREADED)
def test_same_bits_again_and_on_any_number_of_threads(restore_threads, op, name, dtype):
    sample = sample_input(op, dtype, name)
    grad_output = random_grad_like(op, sample)
    results = []
    for threads in (2, 2, 1):
        torch.set_num_threads(threads)
        value, grads = run(ours(op), op, sample, grad_output)
        results.append([value, *grads])
    for again, one_thread, first in zip(results[1], results[2], results[0], strict=True):
        assert torch.equal(first, again)
        assert torch.equal(first, one_thread)


# --- special values -----------------------------------------------------------------------------

INF, NAN = math.inf, math.nan


def assert_same_specials(what: str, actual: Tensor, theirs: Tensor, tolerance: float) -> None:
    """NaN and both infinities must be where torch has them; other values agree to ``tolerance``
    relative to them or to 1, whichever is larger (the terms of these sums are of order one)."""
    __tracebackhide__ = True
    torch.testing.assert_close(
        actual.double(),
        theirs.double(),
        rtol=tolerance,
        atol=tolerance,
        equal_nan=True,
        msg=lambda message: f"{what}: {message}\nours: {actual}\ntorch's: {theirs}",
    )


def tolerance_of(dtype: torch.dtype) -> float:
    """16 units in the last place: rows here have at most 75 terms, whose sum is off by about 4
    (half the square root of their number), and exps and logs by up to 2 each."""
    return 16 * torch.finfo(dtype).eps


def special_rows(dtype: torch.dtype) -> dict[str, list[float]]:
    """Rows of five logits; the second or the fourth will be the target."""
    info = torch.finfo(dtype)
    huge = min(1e30, info.max / 4)
    least, subnormal = info.smallest_normal, info.smallest_normal / 2
    return {
        "nan at the target": [0.0, NAN, 1.0, 2.0, -1.0],
        "nan elsewhere": [NAN, 0.0, 1.0, 2.0, -1.0],
        "inf at the target": [0.0, INF, 1.0, 2.0, -1.0],
        "inf elsewhere": [INF, 0.0, 1.0, 2.0, -1.0],
        "-inf at the target": [0.0, -INF, 1.0, 2.0, -1.0],
        "-inf elsewhere": [-INF, 0.0, -INF, 2.0, -1.0],  # masked logits, the common case
        "all -inf": [-INF] * 5,
        "all inf": [INF] * 5,
        "all but the target -inf": [-INF, 3.0, -INF, -INF, -INF],
        "inf and -inf": [INF, -INF, 0.0, 1.0, 2.0],
        "inf and nan": [INF, NAN, -INF, 1.0, 2.0],
        "1e4": [1e4, 1e4 - 8, -1e4, 1e4, 0.0],  # exp overflows unless the maximum is subtracted
        "huge": [huge, -huge, huge, 0.0, 1.0],
        "largest": [info.max, -info.max, info.max, 0.0, 1.0],  # their difference overflows
        "least": [least, -least, 0.0, least, -least],
        "subnormal": [subnormal, -subnormal, 0.0, subnormal, -subnormal],
        "signed zeros": [0.0, -0.0, 0.0, -0.0, 0.0],
    }


# Five classes make a short row, processed together with its neighbours; 75 make a long one of whole
# vectors (of 4 to 32 lanes) and a tail.
SPECIAL_CLASSES = (5, 75)


def special_logits(dtype: torch.dtype, classes: int) -> Tensor:
    """The special rows stacked; further classes are -1."""
    rows = torch.full((len(special_rows(dtype)), classes), -1.0, dtype=torch.float64)
    rows[:, :5] = torch.tensor(list(special_rows(dtype).values()), dtype=torch.float64)
    return rows.to(dtype)


def assert_specials_are_torch_s(op: str, sample: Sample, grad_tolerance: float = 1.0) -> None:
    """Compares values and, for an incoming gradient of ones, gradients."""
    theirs = torch_sample(op, sample)
    ones = torch.ones_like(TORCH[op](*theirs.args, **theirs.kwargs))
    dtype = sample.args[0].dtype
    value, grads = run(ours(op), op, sample, ones.to(dtype))
    torch_value, torch_grads = run(TORCH[op], op, theirs, ones)
    assert_same_specials("value", value, torch_value.to(dtype), tolerance_of(dtype))
    for grad, torch_grad in zip(grads, torch_grads, strict=True):
        tolerance = grad_tolerance * tolerance_of(dtype)
        assert_same_specials("gradient", grad, torch_grad.to(dtype), tolerance)


@every_dtype
@pytest.mark.parametrize("classes", SPECIAL_CLASSES)
@pytest.mark.parametrize("dim", [0, 1])
def test_special_values_in_log_softmax(implementation, dim, classes, dtype):
    logits = special_logits(dtype, classes)
    logits = logits if dim == 1 else logits.t().contiguous()
    # Each gradient is 1 - classes * softmax: the sum over the classes scales the error.
    assert_specials_are_torch_s("log_softmax", Sample("special", (logits, dim)), classes)


def special_class_weights(dtype: torch.dtype, classes: int) -> Tensor:
    """Class weights; that of class 3 is zero, because 0 * inf is NaN."""
    weight = torch.ones(classes, dtype=dtype)
    weight[:4] = torch.tensor([0.5, 1.0, 2.0, 0.0])
    return weight


@every_dtype
@pytest.mark.parametrize("classes", SPECIAL_CLASSES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("target", ["1", "3", "1 strided", "probabilities"])
def test_special_values_in_cross_entropy(
    implementation, target, label_smoothing, weighted, classes, dtype
):
    logits = special_logits(dtype, classes)
    targets = torch.full((len(logits),), 3 if target == "3" else 1)
    if target == "1 strided":  # (1, C, N): the rows' classes lie apart
        logits, targets = logits.t().unsqueeze(0).contiguous(), targets.unsqueeze(0)
    if target == "probabilities":  # most are zero, because 0 * -inf is NaN
        targets = F.one_hot(targets, classes).to(dtype) / 2
        targets[:, 0] = 0.5
    kwargs = {"reduction": "none", "label_smoothing": label_smoothing}
    if weighted:
        kwargs["weight"] = special_class_weights(dtype, classes)
    assert_specials_are_torch_s("cross_entropy", Sample("special", (logits, targets), kwargs))


@every_dtype
@pytest.mark.parametrize("classes", SPECIAL_CLASSES)
@pytest.mark.parametrize("infinite", ["weight", "probability"])
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_infinite_shares_of_a_class_in_cross_entropy(
    implementation, layout, infinite, classes, dtype
):
    """A loss of infinite terms of one sign is infinite."""
    logits = torch.randn(4, classes).to(dtype)
    targets = torch.rand(4, classes).to(dtype)
    kwargs = {"reduction": "none", "label_smoothing": 0.1}
    if infinite == "weight":
        kwargs["weight"] = torch.ones(classes, dtype=dtype)
        kwargs["weight"][2] = INF
    else:
        targets[1, 2] = INF
    if layout == "strided":
        logits, targets = (values.t().unsqueeze(0).contiguous() for values in (logits, targets))
    assert_specials_are_torch_s("cross_entropy", Sample("infinite", (logits, targets), kwargs))
    if infinite == "weight":
        indices = torch.zeros(logits.select(1, 0).shape, dtype=torch.long)
        assert_specials_are_torch_s("cross_entropy", Sample("infinite", (logits, indices), kwargs))


@every_dtype
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("target", [1, 3])
def test_special_values_in_nll_loss(implementation, target, weighted, dtype):
    log_probs = special_logits(dtype, 5)
    kwargs = {"weight": special_class_weights(dtype, 5)} if weighted else {}
    targets = torch.full((len(log_probs),), target)
    sample = Sample("special", (log_probs, targets), {**kwargs, "reduction": "none"})
    assert_specials_are_torch_s("nll_loss", sample)


@every_dtype
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("op", ["nll_loss", "cross_entropy"])
def test_one_bad_row_among_many_reaches_the_reduced_loss(implementation, op, bad, reduction, dtype):
    logits = torch.zeros(40, 5, dtype=dtype)
    logits[17, 1] = bad
    sample = Sample("bad row", (logits, torch.ones(40, dtype=torch.long)))
    sample.kwargs["reduction"] = reduction
    assert not TORCH[op](*sample.args, **sample.kwargs).isfinite()
    assert_specials_are_torch_s(op, sample)


@every_dtype
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("argument", ["input", "weight", "bias"])
@pytest.mark.parametrize("op", LINEARS)
def test_special_values_in_linear(implementation, op, argument, bad, dtype):
    """Sizes that fill vectors and leave tails; one bad value, which affects a row, a column or
    everything, becomes NaN where it meets a zero; the ReLU clamps it depending on its sign."""
    values = {
        "input": torch.ones(5, 19, dtype=dtype),
        "weight": torch.ones(35, 19, dtype=dtype),
        "bias": torch.zeros(35, dtype=dtype),
    }
    values["weight"][::2] = -1
    values["weight"][3] = 0
    values["input"][4] = 0
    values[argument].view(-1)[18] = bad
    sample = Sample("special", tuple(values.values()))
    assert_specials_are_torch_s(op, sample)


@every_dtype
def test_linear_relu_drops_what_comes_in_where_the_output_is_clamped(implementation, dtype):
    """NaN and infinity there give zeros: torch selects instead of multiplying by a mask."""
    input = torch.ones(3, 9, dtype=dtype)
    weight = torch.ones(20, 9, dtype=dtype)
    weight[::2] = -1
    weight[::4] = 0  # outputs of exactly zero are clamped, too
    grad_output = torch.ones(3, 20, dtype=dtype)
    grad_output[0, ::2], grad_output[1, ::2], grad_output[2, ::2] = NAN, INF, -INF
    bias = torch.zeros(20, dtype=dtype)
    _, grads = run(
        fastnn.functional.linear_relu, "linear_relu", Sample("", (input, weight, bias)), grad_output
    )
    active = torch.arange(20) % 2 == 1
    assert torch.equal(grads[0], torch.full_like(input, 10))
    assert torch.equal(grads[1], torch.where(active[:, None], 3, 0).expand(20, 9).to(dtype))
    assert torch.equal(grads[2], torch.where(active, 3, 0).to(dtype))


# --- rows that don't count ----------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 5, 3)])
@pytest.mark.parametrize("op", ["nll_loss", "cross_entropy"])
def test_mean_is_nan_and_gradients_zero_where_all_rows_are_ignored(
    implementation, op, shape, weighted, label_smoothing, dtype
):
    input = torch.randn(shape).to(dtype).requires_grad_()
    kwargs = {"label_smoothing": label_smoothing} if op == "cross_entropy" else {}
    kwargs["weight"] = torch.rand(5).to(dtype) if weighted else None
    target = torch.full(shape[:1] + shape[2:] if len(shape) > 1 else (), -100)
    loss = ours(op)(input, target, **kwargs)
    loss.backward()
    assert loss.isnan()
    assert torch.equal(input.grad, torch.zeros_like(input))


@every_dtype
@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("nll_loss", {}),
        ("cross_entropy", {}),
        ("cross_entropy", {"label_smoothing": 0.1}),
    ],
)
def test_mean_over_zero_weights_is_torch_s(implementation, op, options, dtype):
    """Rows are kept, but all their classes have weight zero: the loss and its gradients are NaN."""
    weight = torch.tensor([1.0, 1.0, 0.0, 2.0, 0.0]).to(dtype)
    target = torch.tensor([2, 4, 4, 2, 2, 2, 4])
    sample = Sample("", (torch.randn(7, 5).to(dtype), target), {"weight": weight, **options})
    assert TORCH[op](*sample.args, **sample.kwargs).isnan()
    assert_specials_are_torch_s(op, sample)


@every_dtype
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("op", ["nll_loss", "cross_entropy"])
def test_ignored_rows_drop_what_comes_in(implementation, op, label_smoothing, dtype):
    """With reduction='none' an ignored row's gradient is zero, whatever the incoming one is."""
    kwargs = {"label_smoothing": label_smoothing} if op == "cross_entropy" else {}
    input = torch.randn(7, 5).to(dtype).requires_grad_()
    target = torch.arange(7) % 5
    target[[0, 3]] = -100
    grad_output = torch.ones(7, dtype=dtype)
    grad_output[0], grad_output[3] = NAN, INF
    loss = ours(op)(input, target, reduction="none", **kwargs)
    (grad,) = torch.autograd.grad(loss, input, grad_output)
    assert torch.equal(grad[[0, 3]], torch.zeros(2, 5, dtype=dtype))
    assert grad[target >= 0].isfinite().all()


@every_dtype
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("op", ["nll_loss", "cross_entropy"])
def test_ignored_rows_of_nan_leave_no_trace_in_the_loss(
    implementation, op, reduction, label_smoothing, dtype
):
    kwargs = {"label_smoothing": label_smoothing} if op == "cross_entropy" else {}
    input = torch.randn(7, 5).to(dtype)
    target = torch.arange(7) % 5
    target[[0, 3]] = -100
    clean = ours(op)(input, target, reduction=reduction, **kwargs)
    input[[0, 3]] = NAN
    assert torch.equal(ours(op)(input, target, reduction=reduction, **kwargs), clean)


# --- what the kernels leave to torch ------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("input_dtype", "target_dtype"),
    [
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float16),
    ],
)
def test_probabilities_of_another_dtype_promote_as_in_torch(
    implementation, input_dtype, target_dtype, weighted
):
    """In torch, too, only class indices require weights of the input's dtype."""
    input = torch.randn(7, 5).to(input_dtype).requires_grad_()
    target = torch.rand(7, 5).softmax(1).to(target_dtype)
    weight = torch.rand(5, dtype=torch.float64) if weighted else None
    results = []
    for function in (fastnn.functional.cross_entropy, F.cross_entropy):
        loss = function(input, target, weight)
        results.append((loss, *torch.autograd.grad(loss, input)))
    # Torch rounds its log-probabilities, of magnitude up to 4, to the input's dtype.
    tolerance = 4 * torch.finfo(input_dtype).eps
    torch.testing.assert_close(results[0], results[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "arguments",
    [
        lambda: (torch.randn(2, 3), torch.randn(4, 3), torch.randn(1)),
        lambda: (torch.randn(2, 3), torch.randn(4, 3), torch.randn(2, 4)),
        lambda: (torch.randn(2, 3), torch.randn(4, 3), torch.randn(())),
        lambda: (torch.randn(2, 3), torch.randn(3)),
        pytest.param(
            lambda: (torch.randint(-5, 5, (2, 3)), torch.randint(-5, 5, (4, 3))),
            marks=pytest.mark.not_on_a_gpu("products of integers, which torch has on the CPU only"),
        ),
    ],
    ids=["bias of one", "bias of two dimensions", "0-d bias", "1-D weight", "integers"],
)
@pytest.mark.parametrize("op", LINEARS)
def test_linear_takes_what_torch_takes(implementation, op, arguments):
    """Torch broadcasts biases and multiplies by vectors; ours pass such calls on."""
    args = arguments()
    assert torch.equal(ours(op)(*args), TORCH[op](*args))


@pytest.mark.parametrize("number", [np.int64, np.uint8, torch.tensor], ids=lambda f: f.__name__)
def test_integer_options_may_be_numpy_s_or_tensors(implementation, number):
    logits, target = torch.randn(4, 5), torch.arange(4)
    for op in ("nll_loss", "cross_entropy"):
        result = ours(op)(logits, target, ignore_index=number(3))
        assert torch.equal(result, ours(op)(logits, target, ignore_index=3))
    result = fastnn.functional.log_softmax(logits, number(1))
    assert torch.equal(result, fastnn.functional.log_softmax(logits, 1))


@pytest.mark.parametrize(
    "number", [np.float64, np.int64, int, torch.tensor], ids=lambda f: f.__name__
)
def test_label_smoothing_may_be_any_real_number(implementation, number):
    logits, target = torch.randn(4, 5), torch.arange(4)
    result = fastnn.functional.cross_entropy(logits, target, label_smoothing=number(1.0))
    assert torch.equal(result, fastnn.functional.cross_entropy(logits, target, label_smoothing=1))


# --- defaults -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [0, 1, 2, 3, 4])
def test_log_softmax_without_a_dim_chooses_torch_s_and_warns(implementation, dims):
    input = torch.randn((3,) * dims)
    with pytest.warns(UserWarning, match="Implicit dimension choice for log_softmax") as records:
        output = fastnn.functional.log_softmax(input)
    if torch.get_default_device().type == "cpu":  # other devices add frames of torch's
        assert records[0].filename == __file__  # the caller's line, not one of ours
    exact = expected("log_softmax", Sample("", (input, 0 if dims in (0, 1, 3) else 1)), input)
    assert_within("value", output, exact.value, exact.value_error)


def test_size_average_and_reduce_warn_as_torch_s_do(implementation):
    for op in ("nll_loss", "cross_entropy"):
        with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
            ours(op)(torch.randn(3, 5), torch.tensor([0, 1, 2]), size_average=False)


@pytest.mark.cpu_only("the CPU's memory")
def test_nll_loss_gradient_of_a_size_that_is_mapped_from_the_system():
    """Its zeros are pages of the system (csrc/cpu/memory.h), in an otherwise ordinary tensor."""
    rows, classes = 17, 1_000_000  # 65 MiB
    log_probs = torch.zeros(rows, classes, requires_grad=True)
    target = torch.randint(classes, (rows,))
    target[3] = -100
    for _ in range(2):  # the second time in memory that was returned
        loss = fastnn.functional.nll_loss(log_probs, target, reduction="sum")
        (grad,) = torch.autograd.grad(loss, log_probs)
        assert grad.count_nonzero() == rows - 1
        assert grad.sum() == -(rows - 1)
        grad.add_(1)
        assert grad.sum(dtype=torch.float64) == rows * classes - (rows - 1)
        grad.resize_(rows + 1, classes)
        assert grad[: rows - 1].isfinite().all()

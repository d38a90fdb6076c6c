"""Each way in which the CUDA launchers split up work, on inputs that would not choose it.

The other tests use what the launchers choose; for inputs small enough to test, that is seldom one
block per row, or several.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastnn
from cuda_emulation.chosen import EMULATES_CUDA
from support.narrow_losses import (
    NARROW_LOSSES,
    check_bits_of_a_copy,
    loss_arguments,
    loss_in_float32,
    narrow_logits,
)
from support.operators import LINEARS, check_value_and_gradients, every_dtype
from support.sample_inputs import Sample, sample_input

pytestmark = pytest.mark.on_cuda_kernels

# One class, rows at any alignment, more classes than a warp has lanes or a block has threads.
ROWS = {
    "log_softmax": ["rows_3x1", "rows_3x7", "rows_3x81", "offset_dim1", "1000_classes"],
    "nll_loss": ["7x1_classes", "7x5_mean_weighted", "7x81_classes", "7x1000_classes"],
    "cross_entropy": [
        "7x1_classes",
        "7x5_ignore3_sum_weighted",
        "7x81_classes",
        "7x1000_classes",
        "7x33_smooth",
        "7x5_smooth0.1_mean_weighted",
        "7x5_probs_mean_weighted_0.1",
        "7x33_probs",
    ],
    "linear_cross_entropy": [
        "9x8_to_81",
        "7x15_to_9_none_weighted",
        "7x15_to_9_smooth0.1_mean_bias_weighted",
        "7x15_to_9_smooth0.1_none_bias_weighted",
        "7x15_to_9_probs_mean_weighted",
        "7x15_to_9_probs_none_weighted",
    ],
}
PRODUCTS = ["1x9_to_7", "17x33_to_31", "65x63_to_65_no_bias", "weight_transposed", "all_active"]
# Sizes of 0 and 1, which libraries treat specially, and odd ones, whose rows are unaligned.
PRODUCTS += ["0x3_to_2", "2x0_to_3", "2x3_to_0", "1x1_to_1", "9x7_to_1", "300x129_to_257_no_bias"]


@every_dtype
@pytest.mark.parametrize("path", ["subwarp", "warp", "block", "split"])
@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, names in ROWS.items() for name in names]
)
def test_rows(monkeypatch, path, op, name, dtype):
    monkeypatch.setenv("FASTNN_CUDA_ROWS", path)
    check_value_and_gradients(op, sample_input(op, dtype, name))


@every_dtype
@pytest.mark.parametrize("kibibytes", [46, 47, 48, 49, 62, 63, 111])
def test_rows_about_as_long_as_shared_memory(kibibytes, dtype):
    """The longest rows that a block keeps in shared memory, besides what its reductions need.

    For the size that every GPU has, for the emulated one's larger size, and for rows that occupy a
    whole multiprocessor of an H100.
    """
    classes = kibibytes * 1024 // dtype.itemsize
    logits, target = torch.randn(2, 2, classes).to(dtype)
    check_value_and_gradients("log_softmax", Sample("long rows", (logits, 1)))
    probabilities = target.softmax(1)
    check_value_and_gradients("cross_entropy", Sample("long rows", (logits, probabilities)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("path", ["subwarp", "warp", "block", "split"])
def test_narrow_losses_have_the_bits_of_a_copys(monkeypatch, path, dtype):
    """Their kernels group the elements as those of float32 do."""
    monkeypatch.setenv("FASTNN_CUDA_ROWS", path)
    for name in NARROW_LOSSES:
        for shape in ((67, 3), (7, 81), (5, 1000)):
            loss = loss_in_float32(name, loss_arguments(name, shape, dtype))
            check_bits_of_a_copy(loss, narrow_logits(shape, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("path", ["subwarp", "warp", "block", "split"])
def test_narrow_log_softmaxes_have_the_bits_of_a_copys(monkeypatch, path, dtype):
    monkeypatch.setenv("FASTNN_CUDA_ROWS", path)
    log_softmax = partial(fastnn.functional.log_softmax, dim=1, dtype=torch.float32)
    for shape in ((67, 3), (7, 81), (5, 1000)):
        check_bits_of_a_copy(log_softmax, narrow_logits(shape, dtype))


def test_rows_that_float32_gives_a_block_of_all_threads():
    dtype, shape = torch.bfloat16, (2, 30000)
    loss = loss_in_float32("cross_entropy", loss_arguments("cross_entropy", shape, dtype))
    check_bits_of_a_copy(loss, narrow_logits(shape, dtype))


@every_dtype
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_several_blocks_of_a_heads_rows(reduction, dtype):
    """The first have 1152 each: more than 2048 rows are never one block."""
    input, weight = torch.randn(2305, 3).to(dtype), torch.randn(5, 3).to(dtype)
    target = torch.arange(2305) % 5
    options = {"ignore_index": 2, "reduction": reduction}
    check_value_and_gradients(
        "linear_cross_entropy", Sample("blocks", (input, weight, target), options)
    )


@every_dtype
@pytest.mark.parametrize("product", ["library", "tiled"])
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("op", LINEARS)
def test_products(monkeypatch, op, product, name, dtype):
    monkeypatch.setenv("FASTNN_CUDA_GEMM", product)
    check_value_and_gradients(op, sample_input(op, dtype, name))


@pytest.fixture
def a_fused_relu_without_nan() -> Iterator[None]:
    """Where the kernels are emulated, the library's product with a ReLU is as it is on a GPU."""
    with torch.library._scoped_library("aten", "IMPL") as library, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel of ATen is replaced
        if EMULATES_CUDA:
            library.impl("_addmm_activation", addmm_and_clamp, "CPU")
        yield


def addmm_and_clamp(
    bias: Tensor, a: Tensor, b: Tensor, *, beta=1, alpha=1, use_gelu=False
) -> Tensor:
    product = torch.addmm(bias, a, b, beta=beta, alpha=alpha)
    return torch.where(product > 0, product, 0)


@every_dtype
@pytest.mark.parametrize("product", ["library", "tiled"])
@pytest.mark.parametrize(("rows", "depth", "cols"), [(33, 65, 31), (64, 64, 64), (512, 1000, 776)])
def test_nan_and_infinity_pass_every_product(
    monkeypatch, a_fused_relu_without_nan, product, rows, depth, cols, dtype
):
    """Sizes that are odd, and sizes of whole vectors: a library has different kernels for them.

    Their fused ReLUs differ: on an H200 those for odd sizes in 2-byte dtypes turn NaN into 0.
    """
    monkeypatch.setenv("FASTNN_CUDA_GEMM", product)
    input, weight, bias = torch.randn(rows, depth), torch.randn(cols, depth), torch.randn(cols)
    input[3, 5], input[4, 6], input[5, 7] = float("nan"), float("inf"), float("-inf")
    weight[7, 2], weight[8, 3] = float("nan"), float("inf")
    bias[9], bias[10], bias[11] = float("nan"), float("inf"), float("-inf")
    args = [value.to(dtype) for value in (input, weight, bias)]
    output = fastnn.functional.linear_relu(*args)
    exact = F.linear(*(value.double() for value in args)).relu()
    assert torch.equal(output.isnan(), exact.isnan())
    assert torch.equal(output.isinf(), exact.isinf())


@every_dtype
@pytest.mark.parametrize("past", [0, 1, 2], ids=lambda past: f"{past}_past_a_boundary")
@pytest.mark.parametrize("transposed", [False, True], ids=["as_is", "transposed"])
def test_large_tiles_at_any_alignment(monkeypatch, past, transposed, dtype):
    """The tiles of larger products load as many neighbours at once as the alignment allows."""
    monkeypatch.setenv("FASTNN_CUDA_GEMM", "tiled")
    rows, cols, depth = 304, 200, 24
    input = torch.randn(rows * depth + past).to(dtype)[past:]
    input = input.view(depth, rows).t() if transposed else input.view(rows, depth)
    weight = torch.randn(cols * depth + past).to(dtype)[past:].view(cols, depth)
    actual = fastnn.functional.linear_relu(input, weight)
    exact = F.linear(input.double(), weight.double()).relu()
    # One rounding in the accumulator's type per product, and the rounding of the result.
    accumulated = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * depth
    magnitude = input.double().abs() @ weight.double().abs().t()
    bound = accumulated * magnitude + torch.finfo(dtype).eps * exact
    assert ((actual.double() - exact).abs() <= bound).all()


def launches(kernel: str, call: Callable[[], object]) -> int:
    """How often a call launches the kernel; under emulation, how often it launches any."""
    if EMULATES_CUDA:
        before = torch.ops.fastnn_cuda_emulation.launches()
        call()
        return torch.ops.fastnn_cuda_emulation.launches() - before
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(kernel in event.name for event in profiler.events())


@pytest.mark.parametrize(
    ("dtype", "tf32", "rows", "depth", "cols", "ours"),
    [
        (torch.float32, False, 3, 128, 5, 1),
        (torch.float32, False, 3, 129, 5, 0),  # a long sum
        (torch.float32, True, 3, 128, 5, 0),  # else a layer's rounding would depend on its batch
        (torch.bfloat16, True, 3, 64, 5, 1),
        (torch.bfloat16, False, 3, 65, 5, 0),
        (torch.float64, False, 65, 64, 65, 1),
        (torch.float64, False, 513, 64, 512, 0),  # much to multiply
    ],
)
def test_which_products_are_ours(dtype, tf32, rows, depth, cols, ours):
    input, weight = torch.zeros(rows, depth, dtype=dtype), torch.zeros(cols, depth, dtype=dtype)
    call = partial(fastnn.functional.linear_relu, input, weight)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        assert launches("fastnn::cuda::gemm_kernel", call) == ours
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


@every_dtype
@pytest.mark.parametrize("tensors", [7, 300])
@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.5}, {"momentum": 0.5, "float32_momentum": True}], ids=str
)
def test_all_tensors_are_stepped_in_one_launch(options, tensors, dtype):
    """Even with more tensors than fit 4 KiB of kernel arguments. All results are exact."""
    before = [torch.full((1 + i % 5,), i % 8).to(dtype) for i in range(tensors)]
    params = [torch.nn.Parameter(value.clone()) for value in before]
    for i, param in enumerate(params):
        param.grad = torch.full_like(param, 4 * (i % 3))
    optimizer = fastnn.optim.SGD(params, lr=0.5, **options)
    assert [launches("sgd_step_kernel", optimizer.step) for _ in range(2)] == [1, 1]
    steps = 0.5 + 0.75 if options else 1.0
    for value, param in zip(before, params, strict=True):
        assert torch.equal(param, value - steps * param.grad)

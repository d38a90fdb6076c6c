"""Tensors of more than 2^31 elements and 2^32 bytes, whose offsets don't fit an int.

Only run on request (``make test-large``): each test takes up to 16 GiB. All elements are compared
with torch's results for parts of the input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastnn
from support.operators import LINEARS

pytestmark = pytest.mark.large


@pytest.fixture(autouse=True)
def _our_own_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own product on CUDA, too: the library's is not ours to test."""
    monkeypatch.setenv("FASTNN_CUDA_GEMM", "tiled")


DTYPE = torch.bfloat16  # 4 GiB per tensor
PERIOD = 1_000_003  # a prime, so it divides no power of two
PART = 1 << 21  # 16 MiB of float64: malloc reuses them, which is faster than new pages

# Each way in which the launchers split up work: several rows per vector or warp, a warp or a block
# per row, several blocks per row, classes with a stride.
SHAPES = {
    "tiny_rows": (214_748_371, 10),
    "short_rows": (2_097_161, 1025),
    "medium_rows": (524_387, 4099),
    "long_rows": (33, 65_075_269),
    "classes_apart": (70_003, 1027, 30),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
SHORT_ROWS = SHAPES["short_rows"]


def large(*shape: int) -> Tensor:
    """Random values; an offset that loses its upper half reads different ones."""
    assert math.prod(shape) > 2**31
    return repeated(normal(PERIOD), math.prod(shape)).view(shape)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape).to(DTYPE)


def repeated(values: Tensor, size: int) -> Tensor:
    return values.repeat(math.ceil(size / len(values)))[:size]


def parts(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the first dimension."""
    step = max(PART // math.prod(shape[1:]), 1)
    for start in range(0, shape[0], step):
        yield slice(start, start + step)


def assert_near(actual: Tensor, exact: Tensor, terms: int = 1) -> None:
    """Compares with ``exact``, in float64, rounded to float32 on the way and then to DTYPE.

    The rounding to DTYPE takes half of eps. The rest is for float32 roundings of values halfway
    between two, and the absolute part for sums of terms that cancel.
    """
    atol = 1e-5 * terms**0.5
    if torch.get_default_device().type == "cuda":
        # The product for a gradient is the library's. Tensor cores add 16 terms at a time and
        # truncate the sum to float32; the sum is about the root of the number of terms.
        atol += 2**-23 * terms**1.5 / 16
    torch.testing.assert_close(actual.double(), exact, rtol=torch.finfo(DTYPE).eps, atol=atol)


@every_shape
def test_log_softmax(shape):
    x = large(*shape).requires_grad_()
    out = fastnn.functional.log_softmax(x, 1)
    (grad,) = torch.autograd.grad(out, x, x.detach())
    for part in parts(shape):
        exact = x[part].detach().double().requires_grad_()
        exact_out = F.log_softmax(exact, 1)
        assert_near(out[part].detach(), exact_out.detach())
        rounded = out[part].detach().double()
        incoming = x[part].detach().double()
        assert_near(grad[part], incoming - rounded.exp() * incoming.sum(1, keepdim=True))


def check_loss(op: str, input: Tensor, target: Tensor) -> None:
    input.requires_grad_()
    losses = getattr(fastnn.functional, op)(input, target, reduction="none")
    incoming = normal(*losses.shape)
    (grad,) = torch.autograd.grad(losses, input, incoming)
    for part in parts(input.shape):
        exact = input[part].detach().double().requires_grad_()
        exact_target = target[part].double() if target.is_floating_point() else target[part]
        exact_losses = getattr(F, op)(exact, exact_target, reduction="none")
        assert_near(losses[part].detach(), exact_losses.detach())
        (exact_grad,) = torch.autograd.grad(exact_losses, exact, incoming[part].double())
        assert_near(grad[part], exact_grad)


@every_shape
def test_cross_entropy(shape):
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    check_loss("cross_entropy", large(*shape), target)


def test_cross_entropy_with_probabilities():
    check_loss("cross_entropy", large(*SHORT_ROWS), large(*SHORT_ROWS).abs_())


def test_nll_loss():
    check_loss("nll_loss", large(*SHORT_ROWS), torch.randint(SHORT_ROWS[1], SHORT_ROWS[:1]))


every_linear = pytest.mark.parametrize("op", LINEARS)


@every_linear
def test_linear_of_a_large_output(op):
    rows, cols = 65_539, 32_771
    check_product(op, normal(rows, 3), normal(cols, 3), incoming=large(rows, cols))


@every_linear
def test_linear_of_a_large_input(op):
    rows, depth = 524_387, 4099
    weight = normal(3, depth) / depth**0.5
    check_product(op, large(rows, depth), weight, incoming=normal(rows, 3))


def check_product(op: str, input: Tensor, weight: Tensor, incoming: Tensor) -> None:
    bias = normal(len(weight))
    leaves = [leaf.requires_grad_() for leaf in (input, weight, bias)]
    out = getattr(fastnn.functional, op)(*leaves)
    grad_input, grad_weight, grad_bias = torch.autograd.grad(out, leaves, incoming)
    input, weight, bias, out = (tensor.detach() for tensor in (*leaves, out))

    exact_weight, exact_bias = torch.zeros(2, dtype=torch.float64)
    for part in parts((len(input), max(input.shape[1], out.shape[1]))):
        x = input[part].double()
        exact_out, grad = F.linear(x, weight.double(), bias.double()), incoming[part].double()
        if op == "linear_relu":
            exact_out, grad = exact_out.relu(), grad * (out[part] > 0)
        assert_near(out[part], exact_out, input.shape[1])
        assert_near(grad_input[part], grad @ weight.double(), out.shape[1])
        exact_weight = exact_weight + grad.t() @ x
        exact_bias = exact_bias + grad.sum(0)
    assert_near(grad_weight, exact_weight, len(input))
    assert_near(grad_bias, exact_bias, len(input))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd(momentum):
    size = 2**31 + 12_345
    values, grads = normal(2, PERIOD)
    param = torch.nn.Parameter(repeated(values, size))
    param.grad = repeated(grads, size)
    few = torch.nn.Parameter(values.clone())
    few.grad = grads
    for parameter in (param, few):
        optimizer = fastnn.optim.SGD([parameter], lr=0.1, momentum=momentum)
        for _ in range(2):
            optimizer.step()
        del optimizer
    assert all(torch.equal(part, few[: len(part)]) for part in param.detach().split(PERIOD))

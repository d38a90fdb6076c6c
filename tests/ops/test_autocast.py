"""torch.autocast: every operator runs in the dtype of torch's own, with the same numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastnn
from support import stock
from support.marks import needs_extension
from support.narrow_losses import (
    NARROW_LOSSES,
    SHAPES,
    check_bits_of_a_copy,
    loss_arguments,
    loss_in_float32,
    loss_under_autocast,
    narrow_logits,
)
from support.operators import LINEARS, ours
from support.sample_inputs import Draws

F = torch.nn.functional
C = fastnn.functional

LOW_PRECISION = [torch.bfloat16, torch.float16]
INPUTS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


# Each operator and torch's, with the same arguments.
OPERATORS = {
    "linear": (
        lambda a: C.linear(a.input, a.weight, a.bias),
        lambda a: F.linear(a.input, a.weight, a.bias),
    ),
    "linear, no bias": (
        lambda a: C.linear(a.input, a.weight),
        lambda a: F.linear(a.input, a.weight),
    ),
    "linear_relu": (
        lambda a: C.linear_relu(a.input, a.weight, a.bias),
        lambda a: stock.linear_relu(a.input, a.weight, a.bias),
    ),
    "linear_relu, no bias": (
        lambda a: C.linear_relu(a.input, a.weight),
        lambda a: stock.linear_relu(a.input, a.weight),
    ),
    "log_softmax": (lambda a: C.log_softmax(a.input, 1), lambda a: F.log_softmax(a.input, 1)),
    "log_softmax, dtype": (
        lambda a: C.log_softmax(a.input, 1, dtype=torch.float16),
        lambda a: F.log_softmax(a.input, 1, dtype=torch.float16),
    ),
    "nll_loss": (lambda a: C.nll_loss(a.input, a.target), lambda a: F.nll_loss(a.input, a.target)),
    "nll_loss, weight": (
        lambda a: C.nll_loss(a.input, a.target, a.class_weight),
        lambda a: F.nll_loss(a.input, a.target, a.class_weight),
    ),
    "cross_entropy": (
        lambda a: C.cross_entropy(a.input, a.target),
        lambda a: F.cross_entropy(a.input, a.target),
    ),
    "cross_entropy, probabilities": (
        lambda a: C.cross_entropy(a.input, a.probabilities),
        lambda a: F.cross_entropy(a.input, a.probabilities),
    ),
}
operators = pytest.mark.parametrize("name", OPERATORS)
low_precision = pytest.mark.parametrize("autocast_dtype", LOW_PRECISION, ids=str)
inputs = pytest.mark.parametrize("dtype", INPUTS, ids=str)


def autocast(**options) -> torch.autocast:
    """Autocast for the device under test."""
    return torch.autocast(torch.get_default_device().type, **options)


def arguments(dtype: torch.dtype, device: str | None = None, requires_grad: bool = True):
    """An input of `dtype` and float32 parameters (float64 with a float64 input)."""
    other = {"dtype": torch.float64 if dtype == torch.float64 else torch.float32, "device": device}
    return SimpleNamespace(
        input=torch.randn(6, 9, dtype=dtype, device=device, requires_grad=requires_grad),
        weight=torch.randn(7, 9, **other, requires_grad=requires_grad),
        bias=torch.randn(7, **other, requires_grad=requires_grad),
        target=torch.randint(9, (6,), device=device),
        class_weight=torch.rand(9, **other),
        probabilities=torch.rand(6, 9, **other),
    )


def gradients(result, a):
    return torch.autograd.grad(result.sum(), (a.input, a.weight, a.bias), allow_unused=True)


def eps_of(*tensors: torch.Tensor) -> float:
    return max(torch.finfo(tensor.dtype).eps for tensor in tensors)


def assert_same(actual, expected, *rounded: torch.Tensor) -> None:
    """The same dtype, and values that differ by a few roundings to it, or to the other dtypes that
    torch rounds to. Both sum in float32 or wider."""
    assert actual.dtype == expected.dtype
    eps = eps_of(expected, *rounded)
    torch.testing.assert_close(actual, expected, rtol=4 * eps, atol=8 * eps)


def assert_same_gradient(actual, expected, result) -> None:
    """The same for the gradient of a result, which passes through the result's dtype. torch also
    rounds sums over the rows to it: some roundings of the largest value."""
    if expected is None:
        assert actual is None
        return
    assert actual.dtype == expected.dtype
    bound = 8 * eps_of(expected, result) * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound)


# Implementations with autocast: the Functions cast by themselves, without autocast's cache.
functions_too = pytest.mark.parametrize(
    "implementation", ["functional", "autograd", "autograd over reference"], indirect=True
)


@functions_too
@operators
@low_precision
@inputs
@pytest.mark.capability(
    "precision",
    "`torch.autocast` on the CPU, bfloat16 and float16: torch's dtypes and numbers",
)
def test_same_dtypes_and_numbers_as_torch(implementation, name, autocast_dtype, dtype) -> None:
    ours, theirs = OPERATORS[name]
    a = arguments(dtype)
    with autocast(dtype=autocast_dtype):
        actual, expected = ours(a), theirs(a)
    # On a GPU torch's cross_entropy rounds its log-probabilities to the input's dtype.
    rounded = [a.input] if a.input.is_cuda and name.startswith("cross_entropy") else []
    assert_same(actual, expected, *rounded)
    for ours_grad, torch_grad in zip(gradients(actual, a), gradients(expected, a), strict=True):
        assert_same_gradient(ours_grad, torch_grad, actual)


@functions_too
@operators
@low_precision
@inputs
@pytest.mark.capability("precision", "`torch.autocast` on CUDA: torch's dtypes (on fake tensors)")
def test_dtypes_on_cuda_are_torchs(implementation, name, autocast_dtype, dtype) -> None:
    """Only compares shapes and dtypes, so it needs no GPU."""
    ours, theirs = OPERATORS[name]
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", autocast_dtype)
    try:
        with FakeTensorMode():
            # Without gradients: for a leaf that wants one, torch asks the device for its stream.
            a = arguments(dtype, "cuda", requires_grad=False)
            assert ours(a).dtype == theirs(a).dtype
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()


@functions_too
@operators
@pytest.mark.capability("precision", "disabled regions inside of others")
def test_a_disabled_region_is_left_alone(implementation, name) -> None:
    ours, theirs = OPERATORS[name]
    a = arguments(torch.float32)
    with autocast(dtype=torch.bfloat16):
        with autocast(enabled=False):
            assert_same(ours(a), theirs(a))
        assert ours(a).dtype == theirs(a).dtype


@pytest.mark.parametrize("op", LINEARS)
@pytest.mark.capability("precision", "nested regions")
def test_nested_regions_take_the_inner_dtype(op) -> None:
    a = arguments(torch.float32)
    # Without the cache, which makes torch reuse the inner region's casts in the outer one.
    with autocast(dtype=torch.bfloat16, cache_enabled=False):
        with autocast(dtype=torch.float16, cache_enabled=False):
            assert ours(op)(a.input, a.weight, a.bias).dtype == torch.float16
        assert ours(op)(a.input, a.weight, a.bias).dtype == torch.bfloat16


class CountCasts(TorchDispatchMode):
    """Counts casts of tensors with a given shape."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].shape == self.shape:
            self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("cache_enabled", [True, False])
@pytest.mark.parametrize("op", LINEARS)
@pytest.mark.capability("precision", "autocast's cache of casts")
def test_a_parameter_is_cast_once_in_a_region_with_the_cache(op, cache_enabled) -> None:
    a = arguments(torch.float32)
    with (
        autocast(dtype=torch.bfloat16, cache_enabled=cache_enabled),
        CountCasts(a.weight.shape) as casts,
    ):
        ours(op)(a.input, a.weight, a.bias)
        ours(op)(a.input, a.weight, a.bias)
    assert casts.count == (1 if cache_enabled else 2)


# ---- losses read narrow logits as they are -------------------------------------------------------


@needs_extension
@low_precision
@pytest.mark.parametrize("name", NARROW_LOSSES)
def test_losses_of_narrow_logits_have_the_bits_of_a_copys(name, autocast_dtype) -> None:
    for shape in SHAPES.values():
        for reduction in ("mean", "sum", "none"):
            arguments = loss_arguments(name, shape, autocast_dtype, reduction)
            loss = loss_in_float32(name, arguments)
            check_bits_of_a_copy(loss, narrow_logits(shape, autocast_dtype))


def logits_at_an_odd_address(dtype: torch.dtype) -> torch.Tensor:
    rows, classes = 7, 301
    numbers = narrow_logits((rows * classes + 1,), dtype).detach()
    return numbers[1:].view(rows, classes).requires_grad_()


@needs_extension
@low_precision
@pytest.mark.parametrize("name", NARROW_LOSSES)
def test_losses_of_narrow_logits_at_an_odd_address_have_the_bits_of_a_copys(
    name, autocast_dtype
) -> None:
    """The copy's vectors start at other classes."""
    logits = logits_at_an_odd_address(autocast_dtype)
    loss = loss_in_float32(name, loss_arguments(name, tuple(logits.shape), autocast_dtype))
    check_bits_of_a_copy(loss, logits)


# More elements than a CPU's cache holds.
LARGE = (1100, 1000)


@needs_extension
@pytest.mark.parametrize("name", ["nll_loss", "cross_entropy", "cross_entropy, probabilities"])
@pytest.mark.capability("precision", "`torch.autocast`: losses make no copy of many narrow logits")
def test_losses_under_autocast_make_no_copy_of_many_narrow_logits(name) -> None:
    dtype = torch.bfloat16
    loss = loss_under_autocast(name, loss_arguments(name, LARGE, dtype), dtype)
    logits, copied = narrow_logits(LARGE, dtype), narrow_logits(LARGE, dtype)
    with CountCasts(logits.shape) as casts:
        loss(logits).backward()
    assert casts.count == 0
    loss(copied.float()).backward()
    assert torch.equal(logits.grad, copied.grad)


@needs_extension
@pytest.mark.cpu_only("of the processor's memory")
def test_a_loss_of_many_narrow_logits_takes_the_memory_of_one_copy() -> None:
    """The gradient takes the place of the kept copy of the logits; no float32 copy is made."""
    logits, name = narrow_logits(LARGE, torch.bfloat16), "cross_entropy"
    loss = loss_under_autocast(name, loss_arguments(name, LARGE, logits.dtype), logits.dtype)
    with torch.profiler.profile(profile_memory=True) as profile:
        (gradient,) = torch.autograd.grad(loss(logits), logits)
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert gradient.nbytes <= allocated < 1.1 * gradient.nbytes


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_log_softmax_in_float32_of_narrow_logits_has_the_bits_of_a_copys(dtype, dim) -> None:
    for shape in SHAPES.values():
        logits = narrow_logits(shape, dtype)
        actual = C.log_softmax(logits, dim, dtype=torch.float32)
        expected = C.log_softmax(logits.float(), dim)
        assert actual.dtype == torch.float32
        assert torch.equal(actual, expected)
        grad = Draws(2).normal(*shape)
        assert torch.equal(
            *torch.autograd.grad(actual, logits, grad, create_graph=True),
            *torch.autograd.grad(expected, logits, grad, create_graph=True),
        )
        assert torch.equal(
            *torch.autograd.grad(actual, logits, grad), *torch.autograd.grad(expected, logits, grad)
        )


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_log_softmax_in_float32_at_an_odd_address_has_the_bits_of_a_copys(dtype) -> None:
    logits = logits_at_an_odd_address(dtype)
    actual = C.log_softmax(logits, 1, dtype=torch.float32)
    assert torch.equal(actual, C.log_softmax(logits.float(), 1))


@needs_extension
def test_log_softmax_in_float32_makes_no_copy_of_narrow_logits() -> None:
    logits = narrow_logits((3, 50), torch.bfloat16)
    with CountCasts(logits.shape) as casts:
        C.log_softmax(logits, 1, dtype=torch.float32).sum().backward()
    assert casts.count == 0


@needs_extension
@pytest.mark.parametrize("name", NARROW_LOSSES)
def test_derivatives_of_narrow_losses_under_transforms_are_a_copys(name) -> None:
    dtype = torch.bfloat16
    shape = SHAPES["apart"]
    loss = loss_in_float32(name, loss_arguments(name, shape, dtype))
    direction = narrow_logits(shape, dtype).detach() + 1

    def second_derivative(loss, logits: torch.Tensor) -> torch.Tensor:
        (first,) = torch.autograd.grad(loss(logits), logits, create_graph=True)
        return torch.autograd.grad(first, logits, direction)[0]

    def tangent(loss, logits: torch.Tensor) -> torch.Tensor:
        return torch.func.jvp(loss, (logits.detach(),), (direction,))[1]

    def gradients(loss, logits: torch.Tensor) -> torch.Tensor:
        several = torch.stack([logits.detach(), direction])
        return torch.func.vmap(torch.func.grad(loss))(several)

    for derivative in (second_derivative, tangent, gradients):
        actual = derivative(loss, narrow_logits(shape, dtype))
        expected = derivative(lambda logits: loss(logits.float()), narrow_logits(shape, dtype))
        assert_same(actual, expected)


@pytest.mark.parametrize("name", ["nll_loss", "cross_entropy"])
def test_narrow_logits_may_be_overwritten_once_their_loss_is_there(name) -> None:
    """As if autocast had made a copy."""
    shape, dtype, results = LARGE, torch.bfloat16, []
    for overwrites in (False, True):
        leaf = narrow_logits(shape, dtype)
        logits = leaf + 0
        loss = loss_under_autocast(name, loss_arguments(name, shape, dtype), dtype)(logits)
        if overwrites:
            with torch.no_grad():
                logits.zero_()
        results += torch.autograd.grad(loss, leaf)
    assert torch.equal(*results)


@low_precision
@pytest.mark.capability(
    "precision",
    "training with `GradScaler`",
    operators=["linear_relu", "cross_entropy", "SGD"],
)
def test_training_under_autocast_with_a_scaler_is_torchs(autocast_dtype) -> None:
    """Some steps of the MLP with GradScaler; one overflows and is skipped."""

    device = torch.get_default_device().type

    def train(layers, loss_of, sgd):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*layers())
        optimizer = sgd(model.parameters(), lr=0.05, momentum=0.9)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=3)
        draw = Draws(1)
        losses = []
        for step in range(8):
            x, y = draw.normal(16, 20), draw.integers(0, 5, 16)
            with autocast(dtype=autocast_dtype):
                loss = loss_of(model(x), y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            if step == 4:
                next(model.parameters()).grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        return losses, [p.detach().clone() for p in model.parameters()], scaler.get_scale()

    ours = train(
        lambda: [fastnn.nn.LinearReLU(20, 32), torch.nn.Linear(32, 5)],
        fastnn.nn.CrossEntropyLoss(),
        fastnn.optim.SGD,
    )
    theirs = train(
        lambda: [torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Linear(32, 5)],
        torch.nn.CrossEntropyLoss(),
        torch.optim.SGD,
    )
    assert ours[2] == theirs[2]
    # Eight steps of 0.05 times gradients of about 1, each rounded to the low precision in both.
    bound = 8 * 0.05 * 4 * torch.finfo(autocast_dtype).eps
    assert ours[0] == pytest.approx(theirs[0], abs=bound)
    for actual, expected in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=bound)

"""SGD's numbers, compared with torch's and with the formula in float64."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

import fastnn
from support.optimizers import (
    DTYPES,
    EVERYTHING,
    MOMENTUM,
    OPTIMIZERS,
    OPTIONS,
    ExactRun,
    assert_same_training,
    assert_within,
    compute_dtype,
    flat,
    layout_grads,
    layout_params,
    make_pair,
    make_params,
    momentum_buffer,
    option_name,
    params_of,
    randn,
    set_layout_grads,
    threads,
    tolerance,
    train,
)

# --- the numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
def test_long_run_stays_within_rounding_of_formula_and_torch(options, dtype):
    ours, stock = (kind(layout_params(dtype), **options) for kind in OPTIMIZERS)
    start = flat(params_of(ours))
    exact = ExactRun(start, dtype, compute_dtype(dtype))
    stock_exact = ExactRun(start, dtype, dtype)  # torch rounds every intermediate
    # The formula is evaluated in float64: its own error counts when ours is float64, too.
    oracle = ExactRun(start, torch.float64, torch.float64)
    for seed in range(50):
        grad = flat(layout_grads(dtype, seed))
        for run in (exact, stock_exact, oracle):
            run.step(grad, **options)
        for optimizer in (ours, stock):
            set_layout_grads(params_of(optimizer), seed)
            optimizer.step()
        # At every step: the first ones have the fewest roundings and the tightest bound.
        mine, theirs = flat(params_of(ours)), flat(params_of(stock))
        assert_within(mine, exact.param, exact.param_error + oracle.param_error)
        assert_within(mine, theirs, exact.param_error + stock_exact.param_error)
        if options["momentum"]:
            buffers = flat([momentum_buffer(ours, p) for p in params_of(ours)])
            assert_within(buffers, exact.buffer, exact.buffer_error + oracle.buffer_error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_takes_any_layout(dtype):
    """Compares with torch's default: its fused=True is silently wrong where strides differ."""
    ours = fastnn.optim.SGD(layout_params(dtype), fused=True, **EVERYTHING)
    stock = torch.optim.SGD(layout_params(dtype), **EVERYTHING)
    for optimizer in (ours, stock):
        for seed in range(4):
            set_layout_grads(params_of(optimizer), seed)
            optimizer.step()
    assert_same_training(ours, stock, 4)


@pytest.mark.parametrize("size", [5, 300])
def test_gradient_that_is_the_parameter_transposed(size):
    """The step uses its value from before the step."""
    ours, stock = make_pair((size, size), **MOMENTUM)
    for optimizer in (ours, stock):
        (param,) = params_of(optimizer)
        param.grad = param.detach().t()
        optimizer.step()
        param.grad = param.grad.clone()  # for the tolerance: the gradient has been stepped, too
    assert_same_training(ours, stock, 1)


def test_two_hundred_steps_of_float32():
    ours, stock = make_pair((13, 11), (29,), **EVERYTHING)
    for optimizer in (ours, stock):
        train(optimizer, 200)
    assert_same_training(ours, stock, 200)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_around_powers_of_two(dtype):
    """Vector widths, unrolled blocks and cache-sized chunks all end at a power of two."""
    sizes = [(max(2**k + d, 0),) for k in range(16) for d in (-1, 0, 1)]
    ours, stock = (kind(make_params(*sizes, dtype=dtype), **EVERYTHING) for kind in OPTIMIZERS)
    for optimizer in (ours, stock):
        train(optimizer, 3)
    assert_same_training(ours, stock, 3)


def test_many_small_parameters():
    ours, stock = make_pair(*[(i % 7,) for i in range(400)], **MOMENTUM)
    for optimizer in (ours, stock):
        train(optimizer, 3)
    assert_same_training(ours, stock, 3)


@pytest.mark.capability(
    "precision", "parameters of several dtypes in one optimizer", operators=["SGD"]
)
def test_mixed_dtypes_in_one_group():
    def params() -> list[Tensor]:
        return [p for dtype in DTYPES for p in make_params((5, 3), (17,), dtype=dtype)]

    ours, stock = (kind(params(), **EVERYTHING) for kind in OPTIMIZERS)
    for optimizer in (ours, stock):
        train(optimizer, 10)
    assert_same_training(ours, stock, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
def test_infinite_and_nan_values_go_where_torch_puts_them(value, options, dtype):
    """Without decay the parameter must not enter the gradient: 0 * inf would be NaN."""

    def run(kind) -> Tensor:
        params = [torch.nn.Parameter(torch.tensor([value, 1.0, 1.0], dtype=dtype))]
        optimizer = kind(params, **options)
        for _ in range(2):
            params[0].grad = torch.tensor([1.0, value, 1.0], dtype=dtype)
            optimizer.step()
        return params[0].detach()

    mine, theirs = (run(kind) for kind in OPTIMIZERS)
    # Two steps; infinities and NaNs must match exactly.
    atol = tolerance(dtype, 2, theirs[2:], torch.ones(1))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=atol, equal_nan=True)


@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
def test_same_bits_on_one_and_two_threads(options):
    def run(thread_count: int) -> list[Tensor]:
        params = make_params((300, 1001), (5,), (70_001,), dtype=torch.float32)
        with threads(thread_count):
            train(fastnn.optim.SGD(params, **options), 3)
        return params

    for one, two in zip(run(1), run(2), strict=True):
        assert torch.equal(one, two)


def test_memory_between_a_views_elements_is_untouched():
    base = torch.full((6, 10), 7.0)
    param = torch.nn.Parameter(base[1::2, 1:9:3])
    optimizer = fastnn.optim.SGD([param], **MOMENTUM)
    train(optimizer, 3)
    inside = torch.zeros(6, 10, dtype=torch.bool)
    inside[1::2, 1:9:3] = True
    assert bool((base[~inside] == 7).all())
    assert not bool((base[inside] == 7).any())


def test_neighbouring_views_of_one_buffer():
    """Flattened parameters: each is a slice of one memory."""

    def run(kind) -> Tensor:
        buffer = randn((100,), torch.float64, 0)
        params = [torch.nn.Parameter(piece) for piece in buffer.split([33, 1, 66])]
        train(kind(params, **EVERYTHING), 5)
        return buffer

    mine, theirs = (run(kind) for kind in OPTIMIZERS)
    assert not torch.equal(mine, randn((100,), torch.float64, 0))
    atol = tolerance(torch.float64, 5, theirs, torch.tensor(10.0))  # no buffer exceeds 10
    torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)


def test_overlapping_parameter_raises_as_in_torch():
    for kind in OPTIMIZERS:
        param = torch.nn.Parameter(torch.ones(1).expand(3))
        param.grad = torch.ones(3)
        with pytest.raises(RuntimeError, match="single memory location"):
            kind([param], lr=0.1).step()
        assert param[0].item() == 1


# --- float32_momentum -----------------------------------------------------------------------------


def test_no_warnings_in_a_plain_training():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, _ = make_pair((5, 3), **EVERYTHING)
        train(ours, 3)
    assert momentum_buffer(ours, params_of(ours)[0]) is not None

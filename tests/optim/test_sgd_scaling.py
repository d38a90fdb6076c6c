"""SGD under a gradient scaler, on the host and on the device."""

from __future__ import annotations

import math

import pytest
import torch

import fastnn
from support.marks import needs_extension
from support.optimizers import (
    DTYPES,
    EVERYTHING,
    MOMENTUM,
    OPTIMIZERS,
    OperatorNames,
    TaggedParameter,
    assert_same_training,
    make_params,
    momentum_buffer,
    params_of,
    randn,
    tolerance,
    train,
)


def grad_scaler(**options) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(torch.get_default_device().type, **options)


# --- gradient scaling -----------------------------------------------------------------------------


def scaled_training(kind, fused: bool | None, overflowing_steps: set[int], steps: int = 6):
    """Trains under a GradScaler; the loss of some steps overflows. Yields after each step."""
    params = make_params((5, 3), (7,), dtype=torch.float32)
    optimizer = kind(params, fused=fused, **EVERYTHING)
    scaler = grad_scaler(init_scale=2.0**10, growth_interval=2)
    for step in range(steps):
        optimizer.zero_grad()
        loss = sum((p * randn(tuple(p.shape), p.dtype, 100 + step)).sum() for p in params)
        if step in overflowing_steps:
            loss = loss * math.inf
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        yield optimizer


@pytest.mark.parametrize("overflowing_steps", [set(), {0}, {0, 1}, {3}, {0, 2, 5}], ids=str)
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.capability("precision", "training with `GradScaler`", operators=["SGD"])
def test_grad_scaler_trains_as_in_torch(fused, overflowing_steps):
    """Compares with torch's default: fused=True is wrong after a first step that overflows."""
    runs = zip(
        scaled_training(fastnn.optim.SGD, fused, overflowing_steps),
        scaled_training(torch.optim.SGD, None, overflowing_steps),
        strict=True,
    )
    for steps, (ours, stock) in enumerate(runs, start=1):
        for param in params_of(ours):
            param_state = ours.state.get(param, {})
            if momentum_buffer(stock, params_of(stock)[0]) is None:
                assert "momentum_buffer" not in param_state
        for mine, theirs in zip(params_of(ours), params_of(stock), strict=True):
            buffer = momentum_buffer(stock, theirs)
            # Scales are powers of two, which round nothing. Gradients of N(0, 1) stay below 5.
            atol = tolerance(torch.float32, steps, theirs, buffer, torch.tensor(5.0))
            torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)
            if buffer is not None:
                torch.testing.assert_close(momentum_buffer(ours, mine), buffer, rtol=0, atol=atol)


@pytest.mark.parametrize("fused", [None, True])
def test_skipped_step_leaves_bits_and_state_alone(fused):
    run = scaled_training(fastnn.optim.SGD, fused, {0, 3})
    optimizer = next(run)
    start = make_params((5, 3), (7,), dtype=torch.float32)
    for param, untouched in zip(params_of(optimizer), start, strict=True):
        assert torch.equal(param, untouched)
        assert momentum_buffer(optimizer, param) is None
    next(run), next(run)
    before = [
        (p.detach().clone(), momentum_buffer(optimizer, p).clone()) for p in params_of(optimizer)
    ]
    next(run)
    for param, (old, buffer) in zip(params_of(optimizer), before, strict=True):
        assert torch.equal(param, old)
        assert torch.equal(momentum_buffer(optimizer, param), buffer)


@pytest.mark.parametrize("fused", [None, True])
def test_unscaled_and_clipped_by_hand(fused):
    def run(kind) -> torch.optim.Optimizer:
        params = make_params((5, 3), dtype=torch.float32)
        optimizer = kind(params, fused=fused, **EVERYTHING)
        scaler = grad_scaler(init_scale=2.0**10)
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale((params[0] * randn((5, 3), torch.float32, step)).sum()).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, 0.5)
            scaler.step(optimizer)
            scaler.update()
        return optimizer

    ours, stock = (run(kind) for kind in OPTIMIZERS)
    assert_same_training(ours, stock, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fused_step_divides_gradients_by_the_scale_in_place(momentum, dtype):
    def run(kind) -> torch.optim.Optimizer:
        optimizer = kind(make_params((5, 3), dtype=dtype), lr=0.1, momentum=momentum, fused=True)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(3.0), torch.tensor(0.0)
        train(optimizer, 2)
        return optimizer

    ours, stock = (run(kind) for kind in OPTIMIZERS)
    assert_same_training(ours, stock, 2)
    mine, theirs = params_of(ours)[0].grad, params_of(stock)[0].grad
    # The last gradient over 3: one side divides, the other may multiply by 1/3.
    scaled = randn((5, 3), dtype, 2000)
    assert not torch.equal(mine, scaled)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance(dtype, 1, scaled))


def test_found_inf_skips_every_kind_of_parameter():
    """Parameters on torch's own path are skipped, too. (If the kernels skip, there are buffers.)"""
    tagged = TaggedParameter(torch.ones(3))
    plain = torch.nn.Parameter(torch.ones(3))
    optimizer = fastnn.optim.SGD([tagged, plain], fused=True, **MOMENTUM)
    optimizer.grad_scale = torch.tensor(1.0)
    optimizer.found_inf = torch.tensor(1.0, device="cpu")
    train(optimizer, 1)
    for param in (tagged, plain):
        assert torch.equal(param, torch.ones(3))
        assert momentum_buffer(optimizer, param) is None


@needs_extension
@pytest.mark.usefixtures("scalars_stay_on_device")
@pytest.mark.parametrize("overflow", [0.0, 1.0])
def test_nothing_waits_for_scalars_on_the_device(overflow):
    (param,) = make_params((5, 3), dtype=torch.float32)
    start = param.detach().clone()
    optimizer = fastnn.optim.SGD([param], lr=torch.tensor(0.25), momentum=0.9, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(overflow)
    param.grad = torch.ones_like(param)
    with OperatorNames() as operators:
        optimizer.step()
    assert "fastnn.sgd_step_.tensor_lr" in operators.names
    assert "aten._local_scalar_dense.default" not in operators.names
    # A gradient of 1 over a scale of 2, times a quarter: only the difference rounds.
    assert torch.equal(param, start if overflow else start - 0.125)


@needs_extension
@pytest.mark.usefixtures("scalars_stay_on_device")
@pytest.mark.parametrize("dampening", [0.0, 0.3])
@pytest.mark.parametrize("overflowing_steps", [{0}, {0, 1}, {3}], ids=str)
def test_a_step_that_the_kernels_skip_is_as_if_it_had_not_been(dampening, overflowing_steps):
    """After a skipped first step the next one is a first step, also with dampening."""
    params = make_params((5, 3), (7,), dtype=torch.float32)
    stock_params = make_params((5, 3), (7,), dtype=torch.float32)
    options = {"momentum": 0.9, "dampening": dampening}
    ours = fastnn.optim.SGD(params, lr=torch.tensor(0.1), fused=True, **options)
    stock = torch.optim.SGD(stock_params, lr=0.1, **options)
    ours.grad_scale = torch.tensor(1.0)
    for step in range(5):
        for index, (mine, theirs) in enumerate(zip(params, stock_params, strict=True)):
            mine.grad = randn(tuple(mine.shape), torch.float32, 100 * step + index)
            theirs.grad = mine.grad.clone()
        ours.found_inf = torch.tensor(float(step in overflowing_steps))
        ours.step()
        if step not in overflowing_steps:
            stock.step()
    for mine, theirs in zip(params, stock_params, strict=True):
        atol = tolerance(torch.float32, 5, theirs, torch.tensor(5.0))
        torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)


@needs_extension
@pytest.mark.usefixtures("scalars_stay_on_device")
def test_parameters_of_torchs_own_path_are_skipped_too_where_the_kernels_skip():
    tagged, plain = TaggedParameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = fastnn.optim.SGD([tagged, plain], fused=True, **MOMENTUM)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    train(optimizer, 1)
    for param in (tagged, plain):
        assert torch.equal(param, torch.ones(3))

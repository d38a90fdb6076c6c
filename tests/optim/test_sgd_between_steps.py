"""What a user may change between two SGD steps: parameters, gradients, state."""

from __future__ import annotations

import copy

import pytest
import torch

import fastnn
from support.optimizers import (
    EVERYTHING,
    MOMENTUM,
    OPTIMIZERS,
    OPTIONS,
    assert_same_training,
    layout_params,
    make_pair,
    make_params,
    momentum_buffer,
    option_name,
    params_of,
    randn,
    set_grads,
    set_layout_grads,
    tolerance,
    train,
    transposed,
)


def replace_data(optimizer: torch.optim.Optimizer) -> None:
    for param in params_of(optimizer):
        param.data = param.data * 2


def replace_data_by_another_layout(optimizer: torch.optim.Optimizer) -> None:
    for param in params_of(optimizer):
        param.data = transposed(param.data)


def replace_a_parameter(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(randn((3,), torch.float64, 99))


def replace_a_buffer(optimizer: torch.optim.Optimizer) -> None:
    param = params_of(optimizer)[0]
    optimizer.state[param]["momentum_buffer"] = torch.ones_like(param)


def remove_a_buffer(optimizer: torch.optim.Optimizer) -> None:
    del optimizer.state[params_of(optimizer)[0]]["momentum_buffer"]


def empty_a_buffer(optimizer: torch.optim.Optimizer) -> None:
    """Checkpoints of older torch have this before the first step."""
    optimizer.state[params_of(optimizer)[0]]["momentum_buffer"] = None


def clear_state(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state.clear()


def reload_own_state(optimizer: torch.optim.Optimizer) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def fill_a_parameter(optimizer: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        params_of(optimizer)[0].fill_(3.0)


@pytest.mark.parametrize(
    "change",
    [
        replace_data,
        replace_data_by_another_layout,
        replace_a_parameter,
        replace_a_buffer,
        remove_a_buffer,
        empty_a_buffer,
        clear_state,
        reload_own_state,
        fill_a_parameter,
    ],
    ids=lambda change: change.__name__,
)
def test_nothing_stale_is_kept_between_steps(change):
    ours, stock = make_pair((5, 3), (7,), **EVERYTHING)
    for optimizer in (ours, stock):
        train(optimizer, 3)
        change(optimizer)
        train(optimizer, 3, first_seed=10)
    assert_same_training(ours, stock, 6)


@pytest.mark.capability("saving", "`.to(dtype)`, `half`, `bfloat16`", operators=["SGD"])
def test_parameters_converted_in_place_follow_their_new_dtype():
    def run(kind) -> torch.optim.Optimizer:
        model = torch.nn.Linear(3, 2)
        model.load_state_dict(
            {"weight": randn((2, 3), torch.float32, 0), "bias": randn((2,), torch.float32, 1)}
        )
        optimizer = kind(model.parameters(), lr=0.1)
        train(optimizer, 2)
        model.double()
        train(optimizer, 2, first_seed=10)
        return optimizer

    ours, stock = (run(kind) for kind in OPTIMIZERS)
    for mine, theirs in zip(params_of(ours), params_of(stock), strict=True):
        assert mine.dtype == torch.float64
        # The first two steps were in float32.
        atol = tolerance(torch.float32, 2, theirs, theirs.grad)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)


@pytest.mark.capability("saving", "lazy parameters", operators=["SGD"])
def test_lazy_parameters():
    """Uninitialised when the optimizer is made, and of another class once they have a shape."""

    def run(kind) -> torch.optim.Optimizer:
        model = torch.nn.LazyLinear(2, dtype=torch.float64)
        optimizer = kind(model.parameters(), **MOMENTUM)
        optimizer.step()
        model(torch.ones(1, 3, dtype=torch.float64))
        with torch.no_grad():
            for i, param in enumerate(model.parameters()):
                param.copy_(randn(tuple(param.shape), torch.float64, i))
        train(optimizer, 3)
        return optimizer

    ours, stock = (run(kind) for kind in OPTIMIZERS)
    assert_same_training(ours, stock, 3)


def test_first_buffer_does_not_share_memory_with_the_gradient():
    ours, stock = make_pair((5, 3), **MOMENTUM)
    for optimizer in (ours, stock):
        train(optimizer, 1)
        params_of(optimizer)[0].grad.fill_(100.0)
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
    assert_same_training(ours, stock, 2)


def test_buffer_stays_the_same_tensor():
    ours, _ = make_pair((5, 3), **MOMENTUM)
    train(ours, 1)
    buffer = momentum_buffer(ours, params_of(ours)[0])
    train(ours, 2)
    assert momentum_buffer(ours, params_of(ours)[0]) is buffer


@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
def test_step_leaves_gradients_untouched(options):
    params = layout_params(torch.float32)
    optimizer = fastnn.optim.SGD(params, **options)
    for seed in range(2):
        set_layout_grads(params, seed)
        grads = [param.grad for param in params]
        before = [grad.clone() for grad in grads]
        optimizer.step()
        for param, grad, copied in zip(params, grads, before, strict=True):
            assert param.grad is grad
            assert torch.equal(grad, copied)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    ours, stock = make_pair((5, 3), **EVERYTHING)
    for optimizer in (ours, stock):
        train(optimizer, 2)
        optimizer.zero_grad(set_to_none=set_to_none)
        assert (params_of(optimizer)[0].grad is None) == set_to_none
        optimizer.step()  # only along the decay and the old momentum, or not at all
        train(optimizer, 1, first_seed=10)
    assert_same_training(ours, stock, 4)


def test_gradient_clipping():
    def run(kind) -> torch.optim.Optimizer:
        optimizer = kind(make_params((5, 3), (7,)), **MOMENTUM)
        for seed in range(5):
            set_grads(params_of(optimizer), seed)
            norm = torch.nn.utils.clip_grad_norm_(params_of(optimizer), 0.5)
            assert norm > 0.5
            optimizer.step()
        return optimizer

    ours, stock = (run(kind) for kind in OPTIMIZERS)
    assert_same_training(ours, stock, 5)

"""SGD's options, changed during training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR

import fastnn
from support.optimizers import (
    EVERYTHING,
    OPTIMIZERS,
    assert_same_training,
    make_pair,
    make_params,
    momentum_buffer,
    params_of,
    set_grads,
    tolerance,
    train,
)

SCHEDULERS = {
    "StepLR": lambda optimizer: StepLR(optimizer, step_size=3, gamma=0.5),
    "LambdaLR": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    # Sets lr and momentum at each step.
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, max_lr=0.1, total_steps=12),
}


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name, lr):
    ours, stock = (
        kind(make_params((5, 3), (7,)), lr=copy.deepcopy(lr), momentum=0.9) for kind in OPTIMIZERS
    )
    for optimizer in (ours, stock):
        scheduler = SCHEDULERS[name](optimizer)
        for seed in range(10):
            train(optimizer, 1, first_seed=seed)
            scheduler.step()
    assert float(ours.param_groups[0]["lr"]) == float(stock.param_groups[0]["lr"]) != 0.1
    assert_same_training(ours, stock, 10)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_lr_may_be_a_tensor_and_change_in_place(shape, dtype):
    ours, stock = (
        kind(make_params((5, 3)), lr=torch.full(shape, 0.1, dtype=dtype), momentum=0.9)
        for kind in OPTIMIZERS
    )
    for optimizer in (ours, stock):
        train(optimizer, 2)
        optimizer.param_groups[0]["lr"].fill_(0.03)
        train(optimizer, 2, first_seed=10)
    assert_same_training(ours, stock, 4)


def test_weight_decay_may_be_a_tensor():
    ours, stock = make_pair((5, 3), lr=0.1, weight_decay=torch.tensor(0.5))
    for optimizer in (ours, stock):
        train(optimizer, 3)
    assert_same_training(ours, stock, 3)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", 0.02),
        ("momentum", 0.5),
        ("momentum", 0),  # an int that turns momentum off
        ("dampening", 0.7),
        ("weight_decay", 0.3),
        ("nesterov", True),
        ("maximize", True),
        ("foreach", True),
    ],
)
def test_options_are_read_at_each_step(option, value):
    options = {**EVERYTHING, "dampening": 0.0} if option == "nesterov" else EVERYTHING
    ours, stock = make_pair((5, 3), (7,), **options)
    for optimizer in (ours, stock):
        train(optimizer, 3)
        optimizer.param_groups[0][option] = value
        train(optimizer, 3, first_seed=10)
    assert_same_training(ours, stock, 6)


def test_momentum_switched_off_and_on_again_finds_its_buffer():
    ours, stock = make_pair((5, 3), (7,), **EVERYTHING)
    train(ours, 2)
    before = [momentum_buffer(ours, p).clone() for p in params_of(ours)]
    train(stock, 2)
    for optimizer in (ours, stock):
        optimizer.param_groups[0]["momentum"] = 0.0
        train(optimizer, 2, first_seed=10)
    for param, buffer in zip(params_of(ours), before, strict=True):
        assert torch.equal(momentum_buffer(ours, param), buffer)
    for optimizer in (ours, stock):
        optimizer.param_groups[0]["momentum"] = 0.9
        train(optimizer, 2, first_seed=20)
    assert_same_training(ours, stock, 6)


def test_momentum_switched_on_later_starts_with_the_first_step_rule():
    ours, stock = make_pair((5, 3), (7,), lr=0.1, dampening=0.5)
    for optimizer in (ours, stock):
        train(optimizer, 2)
        assert all("momentum_buffer" not in optimizer.state[p] for p in params_of(optimizer))
        optimizer.param_groups[0]["momentum"] = 0.9
        train(optimizer, 1, first_seed=10)
    for param in params_of(ours):
        assert torch.equal(momentum_buffer(ours, param), param.grad)  # undampened
    for optimizer in (ours, stock):
        train(optimizer, 2, first_seed=20)
    assert_same_training(ours, stock, 5)


@pytest.mark.parametrize("fused", [None, True])
def test_late_first_gradient_starts_with_the_first_step_rule(fused):
    """torch's own fused=True raises here, so this compares with its default."""
    ours = fastnn.optim.SGD(make_params((4,), (4,)), fused=fused, **EVERYTHING)
    stock = torch.optim.SGD(make_params((4,), (4,)), **EVERYTHING)
    for optimizer in (ours, stock):
        early, late = params_of(optimizer)
        for seed in range(3):
            set_grads([early], seed)
            optimizer.step()
        assert momentum_buffer(optimizer, late) is None
        train(optimizer, 1, first_seed=10)
        decayed = late.grad + 0.01 * make_params((4,), (4,))[1]
        # One product and one sum away from the formula, also computed in float64.
        atol = tolerance(torch.float64, 1, decayed)
        torch.testing.assert_close(momentum_buffer(optimizer, late), decayed, rtol=0, atol=atol)
        train(optimizer, 3, first_seed=20)
    assert_same_training(ours, stock, 7)


def test_parameter_without_gradient_is_left_alone():
    ours, stock = make_pair((4,), (4,), **EVERYTHING)
    for optimizer in (ours, stock):
        train(optimizer, 2)
        idle = params_of(optimizer)[1]
        before = idle.detach().clone(), momentum_buffer(optimizer, idle).clone()
        set_grads(params_of(optimizer), 10)
        idle.grad = None
        optimizer.step()
        assert torch.equal(idle, before[0])
        assert torch.equal(momentum_buffer(optimizer, idle), before[1])
        train(optimizer, 2, first_seed=20)
    assert_same_training(ours, stock, 5)


def test_step_without_any_gradient_does_nothing():
    ours, _ = make_pair((4,), (0,), **EVERYTHING)
    ours.step()
    assert torch.equal(params_of(ours)[0], make_params((4,))[0])
    assert all(not state for state in ours.state.values())


def test_groups_have_options_of_their_own():
    def make(kind) -> torch.optim.Optimizer:
        first, second, third, frozen = make_params((5, 3), (7,), (2, 2), (3,))
        frozen.requires_grad_(False)
        groups = [
            {"params": [first, frozen], "lr": 0.01, "nesterov": True, "dampening": 0.0},
            {"params": [second], "momentum": 0.0, "maximize": True},
            {"params": [third], "weight_decay": 0.3, "foreach": True},
        ]
        return kind(groups, **EVERYTHING)

    ours, stock = (make(kind) for kind in OPTIMIZERS)
    for optimizer in (ours, stock):
        for seed in range(5):
            set_grads([p for p in params_of(optimizer) if p.requires_grad], seed)
            optimizer.step()
    assert_same_training(ours, stock, 5)
    assert torch.equal(params_of(ours)[1], make_params((), (), (), (3,))[3])


def test_group_added_while_training():
    ours, stock = make_pair((5, 3), **EVERYTHING)
    for optimizer in (ours, stock):
        train(optimizer, 2)
        optimizer.add_param_group({"params": make_params((7,), (2,)), "lr": 0.02})
        train(optimizer, 3, first_seed=10)
    assert ours.param_groups[1].keys() == stock.param_groups[1].keys()
    assert_same_training(ours, stock, 5)


@pytest.mark.parametrize(
    "choice",
    [{"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}],
    ids=str,
)
def test_foreach_and_fused_change_nothing(choice):
    results = []
    for chosen in ({}, choice):
        params = make_params((5, 3), (7,))
        train(fastnn.optim.SGD(params, **chosen, **EVERYTHING), 4)
        results.append(params)
    for default, chosen in zip(*results, strict=True):
        assert torch.equal(default, chosen)

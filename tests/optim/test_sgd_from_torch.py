"""SGD.from_torch: taking over torch's optimizer."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from torch.optim.lr_scheduler import StepLR

import fastnn
from support.optimizers import (
    EVERYTHING,
    MOMENTUM,
    OperatorNames,
    OwnStep,
    TaggedParameter,
    assert_same_training,
    make_params,
    momentum_buffer,
    params_of,
    set_grads,
    train,
)


def test_from_torch_goes_on_where_torch_is():
    old, stock = (torch.optim.SGD(make_params((5, 3), (7,)), **EVERYTHING) for _ in range(2))
    train(old, 2)
    buffers = [momentum_buffer(old, param) for param in params_of(old)]
    taken = fastnn.optim.SGD.from_torch(old)
    assert taken is old
    assert type(taken) is fastnn.optim.SGD
    for param, buffer in zip(params_of(taken), buffers, strict=True):
        assert momentum_buffer(taken, param) is buffer
    train(taken, 3, first_seed=3)
    train(stock, 5)
    assert_same_training(taken, stock, 5)
    assert fastnn.optim.SGD.from_torch(taken) is taken


@pytest.mark.parametrize("resumed", [False, True])
def test_from_torch_under_a_scheduler(resumed):
    """It continues without a warning, even after a resume, which replaces the parameter groups."""
    runs = []
    for take in (fastnn.optim.SGD.from_torch, lambda optimizer: optimizer):
        params = make_params((5, 3), (7,))
        groups = [{"params": params[:1], "lr": 0.2, "name": "body"}, {"params": params[1:]}]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        called = []
        optimizer.register_step_post_hook(lambda *_, called=called: called.append("hook"))
        scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
        optimizer = take(optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for seed in range(1, 4):
                train(optimizer, 1, first_seed=seed)
                scheduler.step()
                if resumed:
                    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert called == ["hook"] * 3
        assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.0125]
        assert optimizer.param_groups[0]["name"] == "body"
        runs.append(optimizer)
    assert_same_training(*runs, 3)


def test_from_torch_steps_with_our_operator():
    for scheduled in (False, True):
        (param,) = make_params((5, 3))
        old = torch.optim.SGD([param], **MOMENTUM)
        if scheduled:
            StepLR(old, step_size=1)
        taken = fastnn.optim.SGD.from_torch(old)
        param.grad = torch.ones_like(param)
        with OperatorNames() as operators:
            taken.step()
        expected = "fastnn.sgd_step_.default" if fastnn.is_available() else "aten.add_.Tensor"
        assert expected in operators.names


@pytest.mark.parametrize("wrong", [torch.optim.Adam, OwnStep, None, "SGD"])
def test_from_torch_refuses_what_is_no_sgd(wrong):
    wrong = wrong(make_params((3,))) if isinstance(wrong, type) else wrong
    expected = f"optimizer: expected a torch.optim.SGD, got {type(wrong).__name__}"
    with pytest.raises(TypeError, match=re.escape(expected)):
        fastnn.optim.SGD.from_torch(wrong)


def test_from_torch_refuses_a_replaced_step():
    optimizer = torch.optim.SGD(make_params((3,)))
    optimizer.step = lambda closure=None: None
    with pytest.raises(TypeError, match="optimizer: its step has been replaced"):
        fastnn.optim.SGD.from_torch(optimizer)
    assert type(optimizer) is torch.optim.SGD


@pytest.mark.parametrize("late", [0, 1])
def test_late_first_gradient_of_a_subclass_under_fused(late):
    """torch's fused path rejects a list in which only some have a buffer."""

    def run(kind, fused: bool | None) -> torch.optim.Optimizer:
        params = [TaggedParameter(p.detach()) for p in make_params((5, 3), (7,))]
        optimizer = kind(params, fused=fused, **EVERYTHING)
        set_grads(params, 0)
        params[late].grad = None
        optimizer.step()
        train(optimizer, 2)
        return optimizer

    ours, stock = run(fastnn.optim.SGD, True), run(torch.optim.SGD, None)
    assert_same_training(ours, stock, 3)

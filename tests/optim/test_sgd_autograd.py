"""SGD's step under autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support.optimizers import (
    MOMENTUM,
    OPTIMIZERS,
    assert_same_training,
    make_pair,
    make_params,
    momentum_buffer,
    params_of,
    randn,
    train,
)


def test_parameters_stay_leaves():
    ours, _ = make_pair((5, 3), **MOMENTUM)
    train(ours, 2)
    (param,) = params_of(ours)
    assert param.is_leaf
    assert param.requires_grad
    assert not momentum_buffer(ours, param).requires_grad


def test_backward_through_a_stepped_parameter_raises():
    """The step bumps version counters; otherwise this gradient would be silently wrong."""
    for kind in OPTIMIZERS:
        weight = torch.nn.Parameter(torch.ones(3))
        x = torch.ones(3, requires_grad=True)
        loss = (x * weight).sum()
        weight.grad = torch.ones(3)
        kind([weight], lr=0.1).step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_gradients_with_a_graph():
    def run(kind) -> torch.optim.Optimizer:
        optimizer = kind(make_params((5, 3)), **MOMENTUM)
        (param,) = params_of(optimizer)
        for _ in range(3):
            (param.grad,) = torch.autograd.grad((param**3).sum(), param, create_graph=True)
            optimizer.step()
            assert not momentum_buffer(optimizer, param).requires_grad
            assert param.grad_fn is None
            param.grad = param.grad.detach()
        return optimizer

    ours, stock = (run(kind) for kind in OPTIMIZERS)
    assert_same_training(ours, stock, 3)


@pytest.mark.parametrize(
    ("momentum", "lr_requires_grad"),
    # Not (0.9, True): torch overwrites the buffer that the gradient of lr needs.
    [(0.0, True), (0.9, False)],
)
@pytest.mark.capability("autograd", "`differentiable=True`", operators=["SGD"])
def test_differentiable_step(momentum, lr_requires_grad):
    def run(kind) -> list[Tensor]:
        start = randn((4,), torch.float64, 0).requires_grad_()
        grad = randn((4,), torch.float64, 1).requires_grad_()
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=lr_requires_grad)
        param = start.clone()
        optimizer = kind([param], lr=lr, momentum=momentum, differentiable=True)
        for _ in range(2):
            param.grad = grad * 2
            optimizer.step()
        (param**2).sum().backward()
        return [start.grad, grad.grad] + ([lr.grad] if lr_requires_grad else [])

    mine, theirs = (run(kind) for kind in OPTIMIZERS)
    for a, b in zip(mine, theirs, strict=True):
        assert bool((b != 0).all())
        assert torch.equal(a, b)  # exactly the same ATen calls

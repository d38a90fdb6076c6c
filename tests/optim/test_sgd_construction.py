"""SGD's constructor: which arguments it accepts and rejects, compared with torch's."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastnn
from support.marks import needs_extension
from support.optimizers import (
    EVERYTHING,
    MOMENTUM,
    OPTIMIZERS,
    assert_same_training,
    contiguous,
    make_pair,
    make_params,
    option_name,
    randn,
    set_grads,
    sliced,
    threads,
    train,
    transposed,
)


def test_signature_is_torchs():
    *ours, added = inspect.signature(fastnn.optim.SGD).parameters.values()
    stock = inspect.signature(torch.optim.SGD).parameters.values()
    assert [(p.name, p.default, p.kind) for p in ours] == [
        (p.name, p.default, p.kind) for p in stock
    ]
    assert (added.name, added.default) == ("float32_momentum", False)
    assert added.kind is inspect.Parameter.KEYWORD_ONLY
    steps = [inspect.signature(kind.step).parameters.values() for kind in OPTIMIZERS]
    assert [(p.name, p.default) for p in steps[0]] == [(p.name, p.default) for p in steps[1]]


def test_is_torchs_optimizer_with_torchs_groups_and_defaults():
    ours, stock = make_pair((2,), **EVERYTHING)
    assert isinstance(ours, torch.optim.SGD)
    assert ours.defaults == stock.defaults
    assert ours.param_groups[0].keys() == stock.param_groups[0].keys()
    assert repr(ours) == repr(stock)
    assert ours.state_dict() == stock.state_dict()


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -0.1},
        {"lr": torch.tensor(-0.1)},
        {"lr": torch.ones(2)},
        {"momentum": -0.1},
        {"weight_decay": -0.1},
        {"nesterov": True},
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        {"fused": True, "differentiable": True},
        {"fused": True, "foreach": True},
        {"betas": (0.9, 0.99)},
    ],
    ids=str,
)
def test_bad_options_raise_as_in_torch(options):
    with pytest.raises(Exception) as stock:
        torch.optim.SGD(make_params((2,)), **options)
    message = re.escape(str(stock.value))
    with pytest.raises(type(stock.value), match=f"^{message}$"):
        fastnn.optim.SGD(make_params((2,)), **options)


@pytest.mark.parametrize("name", ["lr", "momentum", "dampening", "weight_decay"])
def test_an_option_that_is_no_number(name):
    params = make_params((2,))
    with pytest.raises(TypeError, match=f"{name} must be a number or a tensor of one, but got '1'"):
        fastnn.optim.SGD(params, **{"lr": 0.1, name: "1"})


@needs_extension
def test_a_learning_rate_that_has_become_no_number():
    params = make_params((2,))
    set_grads(params, 1)
    optimizer = fastnn.optim.SGD(params)
    optimizer.param_groups[0]["lr"] = "1"
    with pytest.raises(TypeError, match="lr must be a number"):
        optimizer.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: [],
        lambda p: p,
        lambda p: ["weight"],
        lambda p: [p * 2],
        lambda p: [{"params": [p]}, {"params": [p]}],
        lambda p: [("weight", p), p],
    ],
    ids=["empty", "tensor", "string", "non-leaf", "in two groups", "half named"],
)
def test_bad_params_raise_as_in_torch(make: Callable[[Tensor], object]):
    param = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(Exception) as stock:
        torch.optim.SGD(make(param), lr=0.1)
    message = re.escape(str(stock.value))
    with pytest.raises(type(stock.value), match=f"^{message}$"):
        fastnn.optim.SGD(make(param), lr=0.1)


@pytest.mark.parametrize("layout", [contiguous, sliced, transposed])
@pytest.mark.parametrize("options", [{"lr": 0.1}, MOMENTUM, EVERYTHING], ids=option_name)
def test_parameter_twice_in_a_group_warns_and_steps_twice(options, layout):
    """A parallel pass over all parameters would race here, and copies of them would be lost."""

    def run(kind) -> torch.optim.Optimizer:
        shared = torch.nn.Parameter(layout(randn((500, 600), torch.float64, 0)))
        (other,) = make_params((3,))
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = kind([shared, other, shared], **options)
        with threads(2):
            train(optimizer, 4)
        return optimizer

    ours, stock = (run(kind) for kind in OPTIMIZERS)
    assert_same_training(ours, stock, 2 * 4)


@pytest.mark.parametrize("shift", [0, 1000])
@pytest.mark.parametrize("options", [{"lr": 0.1}, MOMENTUM, EVERYTHING], ids=option_name)
def test_parameters_that_share_memory_step_one_after_the_other(options, shift):
    """Weights tied by their ``.data``: two parameters in the same or overlapping memory."""

    def run(kind) -> torch.optim.Optimizer:
        memory = randn((300_000 + shift,), torch.float64, 0)
        first, second = memory[:300_000], memory[shift:]
        optimizer = kind([torch.nn.Parameter(first), torch.nn.Parameter(second)], **options)
        with threads(2):
            train(optimizer, 4)
        return optimizer

    ours, stock = (run(kind) for kind in OPTIMIZERS)
    assert_same_training(ours, stock, 2 * 4)


def test_named_parameters():
    model = torch.nn.Linear(3, 2)
    ours = fastnn.optim.SGD(model.named_parameters(), **MOMENTUM)
    assert ours.param_groups[0]["param_names"] == ["weight", "bias"]
    train(ours, 2)
    assert ours.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    stock = torch.optim.SGD(torch.nn.Linear(3, 2).named_parameters(), **MOMENTUM)
    stock.load_state_dict(ours.state_dict())
    assert len(stock.state) == 2

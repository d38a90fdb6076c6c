"""SGD's groups and states of types that torch's own code doesn't create."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from support.optimizers import (
    MOMENTUM,
    OPTIMIZERS,
    OPTIONS,
    assert_same_training,
    make_pair,
    make_params,
    option_name,
    set_grads,
    tolerance,
    train,
)

PARAMS_KINDS: dict[str, Callable[[list[Tensor]], object]] = {
    "tuple": tuple,
    "iterator": iter,
    "deque": deque,
    "ParameterList": torch.nn.ParameterList,
    "dict's values": lambda params: dict(enumerate(params)).values(),
    "model.parameters()": lambda params: torch.nn.ParameterList(params).parameters(),
}


@pytest.mark.parametrize("first", ["zero_grad", "step"])
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("kind_of_params", PARAMS_KINDS)
def test_params_that_are_no_list(kind_of_params, fused, first):
    """An iterator is exhausted after the first step, or after zero_grad."""

    def run(kind) -> list[Tensor]:
        params = make_params((5, 3), (7,))
        optimizer = kind(params, **MOMENTUM, fused=fused)
        optimizer.param_groups[0]["params"] = PARAMS_KINDS[kind_of_params](params)
        set_grads(params, 1)
        getattr(optimizer, first)()
        seen = [param.grad is None for param in params]
        for seed in range(2, 5):
            set_grads(params, seed)
            optimizer.step()
        return [*seen, *(param.detach() for param in params)]

    ours, stock = (run(kind) for kind in OPTIMIZERS)
    assert ours[:2] == stock[:2]
    params = ours[2:]
    changed = not all(map(torch.equal, params, make_params((5, 3), (7,))))
    can_be_read_once = kind_of_params in ("iterator", "model.parameters()")
    assert changed != (can_be_read_once and first == "zero_grad")
    atol = tolerance(torch.float64, 4, *params)
    torch.testing.assert_close(params, stock[2:], rtol=0, atol=atol)


@pytest.mark.parametrize("method", ["step", "zero_grad"])
@pytest.mark.parametrize("params", [None, 1, [1], [None], ["x"]], ids=repr)
def test_params_that_are_no_parameters_raise_as_in_torch(params, method):
    errors = []
    for kind in OPTIMIZERS:
        optimizer = kind(make_params((3,)), lr=0.1)
        optimizer.param_groups[0]["params"] = params
        with pytest.raises((AttributeError, TypeError)) as error:
            getattr(optimizer, method)()
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


class OwnMapping(UserDict):
    """Not a dict; a lookup creates an entry, which isn't a dict either."""

    def __missing__(self, key) -> UserDict:
        self[key] = UserDict()
        return self[key]


class OwnDict(dict):
    def __missing__(self, key) -> dict:
        self[key] = {}
        return self[key]


STATES = {
    "own mapping": OwnMapping,
    "own dict": OwnDict,
    "entries of another kind": lambda: defaultdict(UserDict),
    "entries of ordered dicts": lambda: defaultdict(OrderedDict),
}


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
@pytest.mark.parametrize("kind_of_state", STATES)
def test_states_of_other_kinds(kind_of_state, options, fused):
    ours, stock = make_pair((5, 3), (7,), **options, fused=fused)
    for optimizer in (ours, stock):
        optimizer.state = STATES[kind_of_state]()
        train(optimizer, 3)
    assert type(ours.state) is type(stock.state)
    assert_same_training(ours, stock, 3)


def test_state_that_makes_no_entries_raises_before_the_step():
    for kind in OPTIMIZERS:
        (param,) = make_params((3,))
        optimizer = kind([param], **MOMENTUM)
        optimizer.state = {}
        set_grads([param], 1)
        with pytest.raises(KeyError):
            optimizer.step()
        assert torch.equal(param, make_params((3,))[0])


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("missing", ["params", *torch.optim.SGD(make_params((3,))).defaults])
def test_group_without_an_option_steps_or_raises_as_in_torch(missing, with_gradient):
    results = []
    for kind in OPTIMIZERS:
        params = make_params((3,))
        optimizer = kind(params, **MOMENTUM)
        optimizer.param_groups[0]["extra"] = object()
        del optimizer.param_groups[0][missing]
        if with_gradient:
            set_grads(params, 1)
        try:
            results.append(optimizer.step())
        except KeyError as error:
            results.append(error.args)
    assert results[0] == results[1] == (None if missing == "differentiable" else (missing,))


def test_the_optimizer_and_no_group_decides_whether_autograd_sees_the_step():
    for kind in OPTIMIZERS:
        for chosen in (False, True):
            (leaf,) = make_params((3,))
            param = leaf.clone() if chosen else leaf
            optimizer = kind([param], lr=0.1, differentiable=chosen)
            optimizer.param_groups[0]["differentiable"] = not chosen
            param.grad = torch.ones_like(param, requires_grad=True)
            optimizer.step()
            if chosen:
                (seen,) = torch.autograd.grad(param.sum(), param.grad)
                # The product of two numbers, which both sides round alike.
                assert torch.equal(seen, torch.full_like(param, -0.1))
            else:
                assert param.grad_fn is None


@pytest.mark.parametrize("option", ["lr", "weight_decay"])
def test_option_that_is_a_string_raises_as_in_torch(option):
    """Not even a string with a number in it, as from a command line, is accepted."""
    for kind in OPTIMIZERS:
        params = make_params((3,))
        optimizer = kind(params, lr=0.1)
        optimizer.param_groups[0][option] = "0.1"
        set_grads(params, 1)
        with pytest.raises(TypeError):
            optimizer.step()

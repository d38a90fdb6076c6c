"""SGD saved, loaded and copied."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import fastnn
from support.optimizers import (
    DTYPES,
    EVERYTHING,
    MOMENTUM,
    assert_same_training,
    layout_params,
    make_pair,
    option_name,
    params_of,
    set_layout_grads,
    through_pickle,
    through_torch_save,
    train,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{"lr": 0.1}, MOMENTUM, EVERYTHING], ids=option_name)
@pytest.mark.capability(
    "saving",
    "`state_dict` to and from torch's, `strict=True`",
    operators=["SGD"],
)
def test_state_dict_passes_from_torch_to_fastnn_and_back(options, dtype):
    """One training passed from torch to fastnn and back equals one by torch alone."""
    alone = torch.optim.SGD(layout_params(dtype), **options)
    relay = torch.optim.SGD(layout_params(dtype), **options)
    for leg, kind in enumerate([torch.optim.SGD, fastnn.optim.SGD, torch.optim.SGD]):
        state = relay.state_dict()
        relay = kind(params_of(relay), lr=123.0)
        relay.load_state_dict(state)
        for optimizer in (alone, relay):
            for seed in range(10 * leg, 10 * leg + 4):
                set_layout_grads(params_of(optimizer), seed)
                optimizer.step()
    ours, stock = relay.state_dict(), alone.state_dict()
    assert ours["param_groups"] == stock["param_groups"]
    assert ours["state"].keys() == stock["state"].keys()
    assert_same_training(relay, alone, 12)


@pytest.mark.capability(
    "saving",
    "`state_dict` through `torch.load(weights_only=True)`",
    operators=["SGD"],
)
def test_state_dict_of_fastnn_has_torchs_keys_and_loads_weights_only():
    ours, stock = make_pair((5, 3), (7,), **EVERYTHING)
    for optimizer in (ours, stock):
        train(optimizer, 2)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    expected = stock.state_dict()
    assert loaded["param_groups"] == expected["param_groups"]
    assert {i: s.keys() for i, s in loaded["state"].items()} == {
        i: s.keys() for i, s in expected["state"].items()
    }
    fresh = fastnn.optim.SGD([torch.nn.Parameter(p.detach().clone()) for p in params_of(ours)])
    fresh.load_state_dict(loaded)
    for optimizer in (fresh, stock):
        train(optimizer, 2, first_seed=10)
    assert_same_training(fresh, stock, 4)


def test_the_class_keeps_the_name_that_pickles_know_it_by():
    """Pickles from another version must load, whichever module the class is defined in."""
    assert pickle.loads(b"cfastnn.optim\nSGD\n.") is fastnn.optim.SGD
    assert pickle.dumps(fastnn.optim.SGD, protocol=0).startswith(b"cfastnn.optim\nSGD\n")


@pytest.mark.parametrize("trained_before", [0, 3])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.capability("saving", "`pickle`, `torch.save`, `copy.deepcopy`", operators=["SGD"])
def test_copies_train_on_their_own(duplicate, trained_before):
    ours, stock = make_pair((5, 3), (7,), **EVERYTHING)
    for optimizer in (ours, stock):
        train(optimizer, trained_before)
    copied = duplicate(ours)
    before = [param.detach().clone() for param in params_of(ours)]
    for optimizer in (copied, stock):
        train(optimizer, 3, first_seed=10)
    assert_same_training(copied, stock, trained_before + 3)
    for param, old in zip(params_of(ours), before, strict=True):
        assert torch.equal(param, old)


def test_state_from_before_newer_options_existed():
    """Old pickles lack options that torch has added since; __setstate__ fills them in."""
    ours, stock = make_pair((5, 3), **MOMENTUM)
    for optimizer in (ours, stock):
        train(optimizer, 1)
        state = optimizer.__getstate__()
        for option in ("nesterov", "maximize", "foreach", "differentiable", "fused"):
            del state["param_groups"][0][option]
        optimizer.__setstate__(state)
        train(optimizer, 2, first_seed=10)
    assert ours.param_groups[0].keys() == stock.param_groups[0].keys()
    assert_same_training(ours, stock, 3)

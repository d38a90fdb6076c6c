"""Calls of the fused step from the program's view: errors, modes, copies, results."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fastnn
from fastnn._step import OrdinaryStep
from support.marks import needs_extension
from support.training_programs import CLASSES, FEATURES, Training, batch, same

pytestmark = [
    pytest.mark.cpu_only("the fused step, which the CPU alone has"),
    needs_extension,
]

STEPS = 12


def ordinary(training: Training) -> fastnn.TrainStep:
    step = training.step()
    step._ways = (OrdinaryStep(),)
    return step


def assert_fused(step: fastnn.TrainStep) -> None:
    assert step.report().way == "fused", step.report()


def small() -> Training:
    torch.manual_seed(0)
    model = fastnn.fuse(nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, CLASSES)))
    optimizer = fastnn.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return Training(model, fastnn.nn.CrossEntropyLoss(), optimizer, {})


def test_gradients_from_before_are_dropped():
    """Gradients of frozen parameters are dropped, too."""
    ours, theirs = small(), small()
    for training in (ours, theirs):
        training.model[2].requires_grad_(False)
        for param in training.model.parameters():
            param.grad = torch.ones_like(param)
    step, loop = ours.step(), ordinary(theirs)
    assert same(step(*batch(0)), loop(*batch(0)))
    assert same(ours.everything(), theirs.everything())


def test_a_hook_is_seen_by_the_next_call():
    training, seen = small(), []
    step = training.step()
    step(*batch(0))
    assert_fused(step)
    handle = training.model[0].register_forward_hook(lambda *_: seen.append(1))
    step(*batch(1))
    assert seen == [1]
    assert step.report().way == "ordinary"
    handle.remove()
    assert_fused(step)


BAD_BATCHES = {
    "a class that there isn't": (torch.ones(4, FEATURES), torch.full((4,), CLASSES)),
    "a negative class": (torch.ones(4, FEATURES), torch.full((4,), -1)),
    "too many features": (torch.ones(4, FEATURES + 1), torch.zeros(4, dtype=torch.int64)),
    "another number of targets": (torch.ones(4, FEATURES), torch.zeros(5, dtype=torch.int64)),
    "another dtype": (torch.ones(4, FEATURES).double(), torch.zeros(4, dtype=torch.int64)),
    "a target of int8": (torch.ones(4, FEATURES), torch.zeros(4, dtype=torch.int8)),
    "no tensor": ("digits", torch.zeros(4, dtype=torch.int64)),
}


@pytest.mark.parametrize("calls", [0, 2])
@pytest.mark.parametrize("name", BAD_BATCHES)
def test_bad_batches_change_nothing_and_raise_as_the_loop(name, calls):
    ours, theirs = small(), small()
    step, loop = ours.step(), ordinary(theirs)
    for index in range(calls):
        step(*batch(index)), loop(*batch(index))
    before, errors = ours.everything(), []
    for one in (step, loop):
        with pytest.raises((IndexError, RuntimeError, ValueError, TypeError)) as raised:
            one(*BAD_BATCHES[name])
        errors.append(raised.type)
    assert errors[0] is errors[1]
    assert same(ours.everything(), before)
    assert same(step(*batch(calls)), loop(*batch(calls)))
    assert_fused(step)


def test_a_batch_without_rows():
    ours, theirs = small(), small()
    sample = torch.ones(0, FEATURES), torch.zeros(0, dtype=torch.int64)
    assert same(ours.step()(*sample), ordinary(theirs)(*sample))
    assert same(ours.everything(), theirs.everything())


def test_the_loss_stays_as_it_was():
    """A step runs in memory that it keeps, but the loss it returned belongs to the caller."""
    step = small().step()
    losses = [step(*batch(index)) for index in range(4)]
    values = [loss.item() for loss in losses]
    for index in range(4, 8):
        step(*batch(index))
    assert [loss.item() for loss in losses] == values
    assert len(set(values)) == 4


def test_under_no_grad():
    ours, theirs = small(), small()
    step, loop = ours.step(), ordinary(theirs)
    with torch.no_grad():
        loss = step(*batch(0))
    assert same(loss, loop(*batch(0)))
    assert same(ours.everything(), theirs.everything())
    assert not loss.requires_grad


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda step: pickle.loads(pickle.dumps(step))])
def test_a_copy_trains_its_own_model(copied):
    ours, theirs = small(), small()
    step, loop = ours.step(), ordinary(theirs)
    step(*batch(0)), loop(*batch(0))
    before = ours.everything()
    twin = copied(step)
    assert_fused(twin)
    assert same(twin(*batch(1)), loop(*batch(1)))
    assert same(ours.everything(), before)


def test_a_model_of_stock_layers_gives_the_fused_one_s_bits():
    """The fused step looks through containers, whether fused or not."""
    ours, theirs = small(), small()
    ours.model = fastnn.unfuse(ours.model)
    step, loop = ours.step(), ordinary(theirs)
    assert_fused(step)
    for index in range(STEPS):
        assert same(step(*batch(index)), loop(*batch(index)))

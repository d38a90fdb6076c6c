"""A training step that raises changes nothing, wherever it raises."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastnn
from fastnn._step import keep
from support.training_programs import (
    CLASSES,
    FEATURES,
    Training,
    batch,
    everything,
    make_training,
    same,
)

pytestmark = pytest.mark.cpu_only("what Python puts back, whatever the kernels")


class Failure(Exception):
    """The exception that the tests raise."""


def fail(*_: Any) -> None:
    raise Failure


class FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise Failure


class FailsInBackward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return FailingBackward.apply(x)


@contextmanager
def removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


Stage = Callable[[Training], Any]

# A failure in each stage of a call, removed through its handle.
STAGES: dict[str, Stage] = {
    "before the first layer": lambda t: t.model[0].register_forward_pre_hook(fail),
    "in the middle of the forward": lambda t: t.model[3].register_forward_hook(fail),
    "after the model": lambda t: t.model.register_forward_hook(fail),
    "after the loss": lambda t: t.loss_fn.register_forward_hook(fail),
    "at the first gradient": lambda t: t.model[-1].bias.register_hook(fail),
    "at the last gradient": lambda t: t.model[0].weight.register_hook(fail),
    "behind a gradient": lambda t: t.model[0].bias.register_post_accumulate_grad_hook(fail),
    "before the step": lambda t: t.optimizer.register_step_pre_hook(fail),
    "after the step": lambda t: t.optimizer.register_step_post_hook(fail),
}
KINDS = [fastnn.optim.SGD, torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW]


def make(kind: type = fastnn.optim.SGD, **options: Any) -> Training:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, CLASSES)
    )
    kwargs = {"momentum": 0.9} if issubclass(kind, torch.optim.SGD) else {}
    optimizer = kind(model.parameters(), lr=0.05, **kwargs)
    return Training(model, nn.CrossEntropyLoss(), optimizer, options)


# The number of calls that accumulate, and the number that succeed before the failing one.
CASES = [
    (stage, accumulate, calls)
    for stage in STAGES
    for accumulate, calls in ((1, 0), (1, 2), (2, 0), (2, 1), (2, 2), (2, 3))
    if "the step" not in stage or (calls + 1) % accumulate == 0
]


def call(step: fastnn.TrainStep, index: int) -> Tensor:
    torch.manual_seed(index)  # Dropout draws the same
    return step(*batch(index))


@pytest.mark.parametrize(("stage", "accumulate", "calls"), CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_at_any_stage(stage, accumulate, calls, kind):
    """The training then continues as if the call had never happened."""
    training, twin = (make(kind, accumulate=accumulate, clip_grad_norm=0.5) for _ in range(2))
    step, other = training.step(), twin.step()
    for index in range(calls):
        call(step, index), call(other, index)
    before = training.everything()
    grads = [param.grad for param in training.model.parameters()]
    with removed(STAGES[stage](training)), pytest.raises(Failure):
        call(step, calls)
    assert same(training.everything(), before)
    # The gradients are the same objects.
    params = training.model.parameters()
    assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))
    for index in range(calls, calls + 3):
        assert same(call(step, index), call(other, index))
    assert same(training.everything(), twin.everything())


BAD_BATCHES = {
    "a class that there isn't": (torch.ones(4, FEATURES), torch.full((4,), CLASSES)),
    "too many features": (torch.ones(4, FEATURES + 1), torch.zeros(4, dtype=torch.int64)),
    "another number of targets": (torch.ones(4, FEATURES), torch.zeros(5, dtype=torch.int64)),
    "no tensor": ("digits", torch.zeros(4, dtype=torch.int64)),
    "another dtype": (torch.ones(4, FEATURES).double(), torch.zeros(4, dtype=torch.int64)),
    "too many inputs": ([torch.ones(4, FEATURES)] * 2, torch.zeros(4, dtype=torch.int64)),
    "a name that there isn't": ({"digits": 1}, torch.zeros(4, dtype=torch.int64)),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_bad_batches(name):
    training = make(accumulate=2)
    step = training.step()
    for index in range(3):
        step(*batch(index))
    before = training.everything()
    with pytest.raises((IndexError, RuntimeError, ValueError, TypeError)):
        step(*BAD_BATCHES[name])
    assert same(training.everything(), before)


LOSSES = {
    "no scalar": (nn.CrossEntropyLoss(reduction="none"), RuntimeError, "scalar outputs"),
    "no tensor": (lambda output, target: 1.0, TypeError, "loss_fn: expected .* got float"),
    "no gradient": (lambda output, target: output.detach().sum(), RuntimeError, "require grad"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_are_none(name):
    training = make()
    training.loss_fn, error, message = LOSSES[name]
    before = training.everything()
    with pytest.raises(error, match=message):
        training.step()(*batch(0))
    assert same(training.everything(), before)


@pytest.mark.parametrize("seed", range(10))
def test_random_programs_whose_backward_fails(seed):
    training = make_training(seed)
    step = training.step()
    for index in range(4):
        step(*batch(index))
    before = training.everything()
    training.model.insert(1, FailsInBackward())
    with pytest.raises(Failure):
        step(*batch(4))
    del training.model[1]
    assert same(training.everything(), before)


def test_an_interrupt():
    training = make()
    step = training.step()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = training.everything()
    training.model[-1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        step(*batch(0))
    assert same(training.everything(), before)


def test_a_flush_that_fails():
    training = make(accumulate=3, clip_grad_norm=0.1)
    step = training.step()
    step(*batch(0))
    before = training.everything()
    with removed(training.optimizer.register_step_post_hook(fail)), pytest.raises(Failure):
        step.flush()
    assert same(training.everything(), before)
    step.flush()
    assert not same(training.everything(), before)


# ---- the optimizer's step ------------------------------------------------------------------------


class FailsHalfway(torch.optim.SGD):
    """Another optimizer; it raises after its step if ``fails`` is set."""

    fails = False

    def step(self, closure=None):
        super().step(closure)
        if self.fails:
            self.param_groups[0]["lr"] = 7.0
            raise Failure


def test_an_optimizer_of_another_make_that_fails_halfway():
    training = make(FailsHalfway)
    step = training.step()
    step(*batch(0))
    before = training.everything()
    training.optimizer.fails = True
    with pytest.raises(Failure):
        step(*batch(1))
    assert same(training.everything(), before)


def test_a_step_that_has_been_replaced_and_fails():
    training = make()
    step, stock = training.step(), training.optimizer.step

    def replaced() -> None:
        stock()
        raise Failure

    step(*batch(0))
    before = training.everything()
    training.optimizer.step = replaced
    with pytest.raises(Failure):
        step(*batch(1))
    assert same(training.everything(), before)


def test_the_first_step_that_fails_in_its_second_group():
    """Adam rejects sparse gradients group by group, after it has created state."""
    dense, sparse = nn.Linear(3, 2), nn.Embedding(4, 3, sparse=True)
    model = nn.Sequential(sparse, dense)
    optimizer = torch.optim.Adam(
        [{"params": dense.parameters()}, {"params": sparse.parameters()}], lr=0.1
    )
    step = fastnn.train_step(model, nn.CrossEntropyLoss(), optimizer)
    before = everything(model, optimizer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="sparse gradients"):
            step(torch.tensor([0, 3]), torch.tensor([0, 1]))
        assert same(everything(model, optimizer), before)
    assert len(optimizer.state) == 0


def test_a_group_that_joins_and_fails():
    dense, sparse = nn.Linear(3, 2), nn.Embedding(4, 3, sparse=True)
    model = nn.Sequential(sparse, dense)
    optimizer = torch.optim.Adam(dense.parameters(), lr=0.1)
    step = fastnn.train_step(model, nn.CrossEntropyLoss(), optimizer)
    sample = torch.tensor([0, 3]), torch.tensor([0, 1])
    step(*sample)
    sparse.weight.grad = None
    optimizer.add_param_group({"params": sparse.parameters()})
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match="sparse gradients"):
        step(*sample)
    assert same(everything(model, optimizer), before)


def test_parameters_are_copied_only_where_the_step_may_fail(monkeypatch):
    kept: list[object] = []

    def spy(value: object) -> Any:
        kept.append(value)
        return keep(value)

    monkeypatch.setattr("fastnn._step.keep", spy)
    training = make()
    step = training.step()
    state = training.optimizer.state

    def is_copied() -> bool:
        kept.clear()
        step(*batch(0))
        return any(value is state for value in kept)

    assert [is_copied() for _ in range(3)] == [True, False, False]
    handle = training.optimizer.register_step_post_hook(lambda *_: None)
    assert is_copied()
    handle.remove()
    assert not is_copied()


# ---- buffers -------------------------------------------------------------------------------------


class Buffers(nn.Module):
    """What a forward may do to buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("written", torch.zeros(3))
        self.register_buffer("replaced", torch.zeros(3))
        self.register_buffer("expanded", torch.ones(1).expand(3))
        self.register_buffer("gone", torch.zeros(3))
        self.register_buffer("none", None)

    def forward(self, x: Tensor) -> Tensor:
        self.written += 1
        self.replaced = self.replaced + 1
        self.expanded = self.expanded * 2
        self.gone = None
        self.none = torch.zeros(1)
        self.register_buffer("new", torch.zeros(1), persistent=False)
        return self.linear(x)


def test_buffers_come_back_with_their_names_and_tensors():
    model = Buffers()
    buffers = dict(model._buffers)
    values = copy.deepcopy(buffers)
    step = fastnn.train_step(model, fail, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(Failure):
        step(torch.ones(2, 3), None)
    assert list(model._buffers) == list(buffers)
    assert all(model._buffers[name] is buffer for name, buffer in buffers.items())
    assert same(dict(model._buffers), values)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_weights_that_the_forward_scales(kind):
    model = kind(4, 3, max_norm=0.1)
    step = fastnn.train_step(model, fail, torch.optim.SGD(model.parameters(), lr=0.1))
    weight = model.weight.detach().clone()
    with pytest.raises(Failure):
        step(torch.tensor([[0, 1]]), None)
    assert same(model.weight.detach(), weight)


def test_gradients_of_an_ordinary_backward_come_back():
    """Both those of the optimizer's parameters, which a call drops, and those that it adds to."""
    training = make()
    training.optimizer = torch.optim.SGD(training.model[4].parameters(), lr=0.1)
    training.loss_fn(training.model(batch(0)[0]), batch(0)[1]).backward()
    before = training.everything()
    grads = [param.grad for param in training.model.parameters()]
    training.model[0].weight.register_post_accumulate_grad_hook(fail)
    with pytest.raises(Failure):
        training.step()(*batch(1))
    assert same(training.everything(), before)
    params = training.model.parameters()
    assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))

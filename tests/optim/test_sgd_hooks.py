"""Around SGD's step: the closure, hooks, the profiler."""

from __future__ import annotations

import copy
import functools
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.profiler import profile

import fastnn
from support.optimizers import (
    MOMENTUM,
    OPTIMIZERS,
    assert_same_training,
    make_pair,
    make_params,
    params_of,
    set_grads,
    tolerance,
    train,
)


def test_closure_runs_once_with_gradients_and_its_loss_is_returned():
    for kind in OPTIMIZERS:
        (param,) = make_params((3,))
        optimizer = kind([param], lr=0.1)
        calls = []

        def closure(param=param, optimizer=optimizer, calls=calls) -> Tensor:
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = (param * 2).sum()
            loss.backward()
            return loss

        expected = make_params((3,))[0].detach() - 0.1 * 2
        with torch.no_grad():
            loss = optimizer.step(closure)
        assert calls == [True]
        assert loss.item() == (make_params((3,))[0] * 2).sum().item()
        # One step with at most two roundings on either side.
        torch.testing.assert_close(
            param.detach(), expected, rtol=0, atol=tolerance(torch.float64, 1, expected)
        )


def test_step_returns_none_without_closure():
    ours, _ = make_pair((3,), lr=0.1)
    set_grads(params_of(ours), 1)
    assert ours.step() is None


def test_step_hooks_run_and_may_change_the_gradients():
    def run(kind) -> tuple[torch.optim.Optimizer, list[str]]:
        optimizer = kind(make_params((3,)), **MOMENTUM)
        events: list[str] = []

        def halve_gradients(optimizer, args, kwargs) -> None:
            events.append("pre")
            for param in params_of(optimizer):
                param.grad.mul_(0.5)

        handles = [
            optimizer.register_step_pre_hook(halve_gradients),
            optimizer.register_step_post_hook(lambda *_: events.append("post")),
            register_optimizer_step_pre_hook(lambda *_: events.append("global pre")),
            register_optimizer_step_post_hook(lambda *_: events.append("global post")),
        ]
        train(optimizer, 2)
        for handle in handles:
            handle.remove()
        train(optimizer, 1, first_seed=10)
        return optimizer, events

    (ours, our_events), (stock, stock_events) = (run(kind) for kind in OPTIMIZERS)
    assert our_events == stock_events
    assert sorted(set(our_events)) == ["global post", "global pre", "post", "pre"]
    assert_same_training(ours, stock, 3)


@pytest.mark.parametrize("by_name", [False, True])
def test_step_hooks_see_the_arguments_as_the_caller_wrote_them_and_may_replace_them(by_name):
    def run(kind) -> list:
        (param,) = make_params((3,))
        optimizer = kind([param], lr=0.1)
        seen = []

        def double_the_loss(optimizer, args, kwargs):
            seen.append((args[1:], kwargs))
            if by_name:
                return args, {"closure": lambda: 2 * kwargs["closure"]()}
            return (optimizer, lambda: 2 * args[1]()), kwargs

        optimizer.register_step_pre_hook(double_the_loss)
        optimizer.register_step_post_hook(lambda _, args, kwargs: seen.append((len(args), kwargs)))
        loss = optimizer.step(closure=three) if by_name else optimizer.step(three)
        seen[1] = (seen[1][0], sorted(seen[1][1]))
        return [loss, *seen]

    def three() -> int:
        return 3

    ours, stock = (run(kind) for kind in OPTIMIZERS)
    assert ours == stock
    if by_name:
        assert ours == [6, ((), {"closure": three}), (1, ["closure"])]
    else:
        assert ours == [6, ((three,), {}), (2, [])]


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize(
    ("args", "kwargs"), [((), {"closer": None}), ((None, 1), {}), ((None,), {"closure": None})]
)
def test_step_refuses_unknown_arguments_as_torch_does(args, kwargs, hooked):
    messages = []
    for kind in OPTIMIZERS:
        optimizer = kind(make_params((3,)), lr=0.1)
        if hooked:
            optimizer.register_step_pre_hook(lambda *_: None)
        with pytest.raises(TypeError) as error:
            optimizer.step(*args, **kwargs)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert messages[0].startswith("SGD.step() ")


def optimizers_with_steps_of_their_own() -> dict[str, type]:
    """Created for each test, because the first optimizer of a class changes the class."""

    class OwnStep(fastnn.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    class Inherited(OwnStep):
        pass

    class OwnStepOverInherited(Inherited):
        def step(self, closure=None):
            return super().step(closure=closure)

    class TwoSteps(fastnn.optim.SGD):
        def step(self, closure=None):
            super().step()
            return super().step(closure)

    class WithMarks(OwnStep):
        @functools.wraps(OwnStep.step)
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    class Mixin:
        def step(self, closure=None):
            return super().step(closure)

    class Mixed(Mixin, fastnn.optim.SGD):
        pass

    class RunsHooksItself(fastnn.optim.SGD):
        @torch.optim.Optimizer.profile_hook_step
        def step(self, closure=None):
            return super().step(closure)

        step.hooked = True

    return {cls.__name__: cls for cls in vars().values() if issubclass(cls, fastnn.optim.SGD)}


def as_it_is(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return optimizer


def under_schedulers(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    StepLR(optimizer, step_size=10)
    StepLR(optimizer, step_size=10)
    return optimizer


def with_its_step_replaced(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    optimizer.step = functools.partial(type(optimizer).step, optimizer)
    return optimizer


def taken_over(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    params = params_of(optimizer)
    return type(optimizer).from_torch(under_schedulers(torch.optim.SGD(params, lr=0.1)))


def with_another_class(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Its step is new to torch, which only inspects the class of an optimizer it makes."""

    class Other(type(optimizer)):
        def step(self, closure=None):
            return super().step(closure)

    optimizer.__class__ = Other
    return optimizer


@pytest.mark.parametrize("profiled", [False, True])
@pytest.mark.parametrize("with_parents", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        as_it_is,
        under_schedulers,
        with_its_step_replaced,
        taken_over,
        with_another_class,
        copy.deepcopy,
    ],
)
@pytest.mark.parametrize("name", ["SGD", *optimizers_with_steps_of_their_own()])
def test_a_steps_hooks_run_once(name, change, with_parents, profiled):
    """Holds whichever of these classes the first optimizers were made from."""
    cls = optimizers_with_steps_of_their_own().get(name, fastnn.optim.SGD)
    if with_parents:
        for parent in cls.__mro__:
            if issubclass(parent, torch.optim.SGD):
                parent(make_params((3,)))
    params = make_params((3,))
    expected = params[0].detach().clone()
    optimizer = change(cls(params, lr=0.1))
    events = []

    def halve_gradients(optimizer, args, kwargs) -> None:
        events.append("pre")
        for param in params_of(optimizer):
            param.grad.mul_(0.5)

    handles = [
        optimizer.register_step_pre_hook(halve_gradients),
        optimizer.register_step_post_hook(lambda *_: events.append("post")),
        register_optimizer_step_post_hook(lambda *_: events.append("global post")),
    ]
    params_of(optimizer)[0].grad = torch.ones_like(expected)
    with profile() if profiled else nullcontext() as profiler:
        assert optimizer.step(lambda: 7) == 7
    for handle in handles:
        handle.remove()
    assert events == ["pre", "post", "global post"]
    for _ in range(2 if name == "TwoSteps" else 1):
        expected -= 0.1 * 0.5
    # Each step rounds once or twice, and the product here, too.
    atol = tolerance(torch.float64, 2, expected)
    torch.testing.assert_close(params_of(optimizer)[0].detach(), expected, rtol=0, atol=atol)
    if profiled:
        ranges = [event.key for event in profiler.events() if "Optimizer.step" in event.key]
        assert ranges == [f"Optimizer.step#{type(optimizer).__name__}.step"]


def test_hooks_run_once_around_a_class_whose_step_was_replaced(monkeypatch):
    """Whether the new step has the old one's marks or not."""
    cls = optimizers_with_steps_of_their_own()["OwnStep"]
    old = cls(make_params((3,)))
    for decorator in (functools.wraps(cls.step), as_it_is):
        replacement = decorator(lambda self, *args, step=cls.step: step(self, *args))
        monkeypatch.setattr(cls, "step", replacement)
        for optimizer in (old, cls(make_params((3,)))):
            called = []
            optimizer.register_step_post_hook(lambda *_, called=called: called.append(1))
            optimizer.step()
            assert called == [1]
        monkeypatch.undo()


def test_a_step_inside_of_a_step_has_hooks_of_its_own():
    for kind in OPTIMIZERS:
        optimizer = kind(make_params((3,)), lr=0.1)
        called = []
        optimizer.register_step_post_hook(lambda *_, called=called: called.append(1))
        optimizer.step(optimizer.step)
        assert called == [1, 1]


def test_state_dict_hooks():
    ours, _ = make_pair((3,), **MOMENTUM)
    events = []
    ours.register_state_dict_pre_hook(lambda *_: events.append("pre"))
    ours.register_state_dict_post_hook(lambda _, state: events.append("post"))
    ours.register_load_state_dict_pre_hook(lambda *_: events.append("load pre"))
    ours.register_load_state_dict_post_hook(lambda _: events.append("load post"))
    ours.load_state_dict(ours.state_dict())
    assert events == ["pre", "post", "load pre", "load post"]


def test_profiler_shows_the_step_under_torchs_name():
    ours, _ = make_pair((3,), **MOMENTUM)
    set_grads(params_of(ours), 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours.step()
    assert "Optimizer.step#SGD.step" in {event.key for event in profile.key_averages()}

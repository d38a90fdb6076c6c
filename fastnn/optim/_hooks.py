"""Conventions of torch about an optimizer's ``step``: what runs the hooks around it, and how a
scheduler watches it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch.optim.optimizer import Optimizer

from fastnn import _torch


def stock_step(cls: type[Optimizer]) -> Callable[..., Any]:
    """A stock class's step without the hooks that torch adds with its first optimizer.

    Args:
        cls: the class.

    Returns:
        The step, as a function of the optimizer and the closure.
    """
    return inspect.unwrap(cls.step, stop=lambda step: not getattr(step, "hooked", False))


def with_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a step in a profiler range and its hooks, as torch does, but only when needed.

    They would cost as much as a small model's whole step. If a subclass's step calls its parent's,
    they run around the subclass's only.

    Args:
        step: the method.

    Returns:
        The method to put into its class instead.
    """
    observed_step = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def wrapper(self: Optimizer, /, *args: Any, **kwargs: Any) -> Any:
        if _torch.is_step_observed(self) and _outermost_hooks(type(self)) in (wrapper, None):
            return observed_step(self, *args, **kwargs)
        return step(self, *args, **kwargs)

    wrapper.hooked = wrapper  # type: ignore[attr-defined]
    return wrapper


def hook_step(cls: type[Optimizer]) -> None:
    """Makes a subclass's own step run the hooks, before torch does so at a higher cost.

    Args:
        cls: the class.
    """
    if not _runs_hooks(cls.step):
        cls.step = with_hooks(cls.step)  # type: ignore[method-assign]


def _runs_hooks(step: Callable[..., Any]) -> bool:
    """Whether a step has torch's mark for running the hooks itself: a plain True.

    Our mark is the step itself, since functools.wraps copies marks to steps that run none.
    """
    return getattr(step, "hooked", None) in (True, step)


def _outermost_hooks(cls: type) -> Callable[..., Any] | None:
    """The first step in a class's MRO that runs the hooks."""
    for parent in cls.__mro__:
        step = vars(parent).get("step")
        if step is not None and _runs_hooks(step):
            return step
    return None


def has_replaced_step(optimizer: Optimizer) -> bool:
    """Whether the optimizer's step was replaced by anything but a scheduler's wrapper."""
    step = vars(optimizer).get("step")
    return step is not None and not _torch.has_scheduler_mark(step)


def take_over_scheduler(optimizer: Optimizer) -> None:
    """Makes a scheduler watch the steps of the optimizer's new class.

    Args:
        optimizer: the optimizer, whose step a scheduler may have wrapped.
    """
    if "step" in vars(optimizer):
        vars(optimizer)["step"] = MethodType(_step_for_schedulers, optimizer)


@functools.wraps(Optimizer.step)
def _step_for_schedulers(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
    """Replaces the wrapper that a scheduler put around the step of torch's class."""
    _torch.note_step_for_schedulers(optimizer)
    return type(optimizer).step(optimizer, *args, **kwargs)


_torch.add_scheduler_mark(_step_for_schedulers)

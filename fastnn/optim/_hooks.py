"""The agreements that torch has with a class about its ``step``: who runs the hooks around it, and
how a scheduler sees it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch.optim.optimizer import Optimizer

from fastnn import _torch


def stock_step(cls: type[Optimizer]) -> Callable[..., Any]:
    """A stock class's step without the hooks that its first optimizer puts around it.

    Args:
        cls: the class.

    Returns:
        The step, as a function of the optimizer and the closure.
    """
    return inspect.unwrap(cls.step, stop=lambda step: not getattr(step, "hooked", False))


def with_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a step in a profiler range and its hooks, as torch does, but only when needed.

    They would cost a small model's whole step. Where a subclass's step calls its parent's, they run
    around the subclass's alone.

    Args:
        step: the method.

    Returns:
        The method that takes its place in its class.
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
    """Lets a subclass's own step run the hooks, before torch does so at a higher cost.

    Args:
        cls: the class.
    """
    if not _runs_hooks(cls.step):
        cls.step = with_hooks(cls.step)  # type: ignore[method-assign]


def _runs_hooks(step: Callable[..., Any]) -> bool:
    """Whether a step has torch's mark that it runs the hooks itself, which is a plain True.

    Ours names its owner, since functools.wraps copies it to steps that don't.
    """
    return getattr(step, "hooked", None) in (True, step)


def _outermost_hooks(cls: type) -> Callable[..., Any] | None:
    """The step that runs the hooks, of those that a class and its parents define."""
    for parent in cls.__mro__:
        step = vars(parent).get("step")
        if step is not None and _runs_hooks(step):
            return step
    return None


def has_replaced_step(optimizer: Optimizer) -> bool:
    """Whether the optimizer has a step of its own, other than the one that a scheduler gives it."""
    step = vars(optimizer).get("step")
    return step is not None and not _torch.has_scheduler_mark(step)


def take_over_scheduler(optimizer: Optimizer) -> None:
    """Has a scheduler see the steps of the optimizer's new class.

    Args:
        optimizer: the optimizer, whose step a scheduler may have wrapped.
    """
    if "step" in vars(optimizer):
        vars(optimizer)["step"] = MethodType(_step_for_schedulers, optimizer)


@functools.wraps(Optimizer.step)
def _step_for_schedulers(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
    """The step of an optimizer that a scheduler watches: in place of its wrapper of torch's."""
    _torch.note_step_for_schedulers(optimizer)
    return type(optimizer).step(optimizer, *args, **kwargs)


_torch.add_scheduler_mark(_step_for_schedulers)

"""A training step as one call instead of the five lines of a loop."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim.optimizer import Optimizer

from fastnn._fused_step import FusedStep
from fastnn._graphed_step import GraphedStep
from fastnn._step import OrdinaryStep, Program, Way, flush

__all__ = ["StepReport", "TrainStep", "train_step"]


@dataclass(frozen=True)
class StepReport:
    """How a :class:`TrainStep` runs; prints as a table.

    Args:
        way: ``"fused"``, ``"CUDA graph"`` or ``"ordinary"``.
        reasons: maps the name of each faster way to why the step doesn't run in it.

    >>> import torch, fastnn
    >>> model = torch.nn.Linear(2, 2)
    >>> optimizer = torch.optim.Adam(model.parameters())
    >>> fastnn.train_step(model, torch.nn.MSELoss(), optimizer).report().way
    'ordinary'
    """

    way: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        rows = [("way", "runs", "reason")]
        rows += [(name, "no", reason) for name, reason in self.reasons.items()]
        rows.append((self.way, "yes", ""))
        width = max(len(row[0]) for row in rows)
        return "\n".join(f"{way:{width}}  {runs:4}  {why}".rstrip() for way, runs, why in rows)


class TrainStep:
    """A training step that is called with each batch; made by :func:`train_step`.

    ``copy.deepcopy`` and ``pickle`` include its model and optimizer, so a copy trains its own
    model. It starts with nothing accumulated, since copied parameters have no gradients.

    Args:
        program: the arguments of ``train_step``.

    >>> import torch, fastnn
    >>> model = torch.nn.Linear(8, 3)
    >>> optimizer = fastnn.optim.SGD(model.parameters(), lr=0.1)
    >>> step = fastnn.train_step(model, fastnn.nn.CrossEntropyLoss(), optimizer, accumulate=2)
    >>> step
    TrainStep(Linear, CrossEntropyLoss, SGD, accumulate=2, clip_grad_norm=None)
    >>> for _ in range(3):
    ...     loss = step(torch.randn(4, 8), torch.tensor([0, 2, 1, 1]))
    >>> step.flush()  # the third batch
    >>> model.weight.grad is None
    True
    """

    def __init__(self, program: Program) -> None:
        self._begin(program)

    def _begin(self, program: Program) -> None:
        self._program = program
        # The first one that can run a call does.
        self._ways: tuple[Way, ...] = (FusedStep(), GraphedStep(), OrdinaryStep())
        self._reasons: dict[str, str] = {}  # why the last batch couldn't run a faster way

    def __getstate__(self) -> dict[str, Any]:
        return {"program": replace(self._program, accumulated=0, stepped=None)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._begin(state["program"])

    def __repr__(self) -> str:
        program = self._program
        loss_fn = getattr(program.loss_fn, "__name__", type(program.loss_fn).__name__)
        parts = f"{type(program.model).__name__}, {loss_fn}, {type(program.optimizer).__name__}"
        options = f"accumulate={program.accumulate}, clip_grad_norm={program.clip_grad_norm}"
        return f"TrainStep({parts}, {options})"

    def __call__(self, input: Any, target: Any) -> Tensor:
        """Trains on a batch.

        Args:
            input: the model's input: a tuple or list is unpacked into positional arguments, a dict
                into keyword arguments; anything else is passed as it is.
            target: passed to ``loss_fn`` as it is.

        Returns:
            The batch's loss, detached; not divided by ``accumulate``.

        Raises:
            TypeError: ``loss_fn`` returned no tensor.
            RuntimeError: the call is under ``torch.inference_mode()``.
            Exception: whatever model, loss, hooks or optimizer raise. Parameters, buffers,
                gradients, optimizer state and accumulated gradients are then as before the call.

        >>> import torch, fastnn
        >>> model = torch.nn.Bilinear(4, 5, 1)
        >>> optimizer = fastnn.optim.SGD(model.parameters(), lr=0.1)
        >>> step = fastnn.train_step(model, torch.nn.MSELoss(), optimizer)
        >>> step((torch.randn(2, 4), torch.randn(2, 5)), torch.randn(2, 1)).shape
        torch.Size([])
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("train_step: expected to be called outside of torch.inference_mode")
        program, batch = self._program, (input, target)
        self._reasons = {}
        for way in self._ways:
            if way.why_not(program):
                continue
            reason = way.why_not_batch(program, batch)
            if not reason:
                break
            self._reasons[way.name] = reason
        return way.run(program, batch)

    def report(self) -> StepReport:
        """Says how calls would run now, with batches like the last one.

        Returns:
            A :class:`StepReport`. Before the first call it omits reasons that depend on the batch.

        >>> import torch, fastnn
        >>> model = torch.nn.Linear(2, 2)
        >>> step = fastnn.train_step(
        ...     model, torch.nn.MSELoss(), torch.optim.Adam(model.parameters())
        ... )
        >>> "ordinary" in str(step.report())
        True
        """
        reasons: dict[str, str] = {}
        for way in self._ways:
            reason = way.why_not(self._program) or self._reasons.get(way.name, "")
            if not reason:
                break
            reasons[way.name] = reason
        return StepReport(way.name, reasons)

    def flush(self) -> None:
        """Updates the parameters with the gradients accumulated so far, if any.

        Use it after the last batches of an epoch. Their gradients stay divided by ``accumulate``
        although they are fewer, as in Lightning.

        Raises:
            Exception: whatever hooks or the optimizer raise; everything is then as before.

        >>> import torch, fastnn
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = fastnn.optim.SGD(model.parameters(), lr=0.1)
        >>> step = fastnn.train_step(model, torch.nn.MSELoss(), optimizer, accumulate=8)
        >>> _ = step(torch.randn(4, 2), torch.randn(4, 1))
        >>> step.flush()
        >>> model.weight.grad is None
        True
        """
        flush(self._program)


def train_step(
    model: Module,
    loss_fn: Callable[[Any, Any], Tensor],
    optimizer: Optimizer,
    *,
    accumulate: int = 1,
    clip_grad_norm: float | None = None,
) -> TrainStep:
    """Makes a training step: forward, loss, backward and update as one call.

    It computes what this loop computes:

    .. code-block:: python

        optimizer.zero_grad()
        loss = loss_fn(model(input), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, clip_grad_norm)  # if given; the optimizer's
        optimizer.step()

    It leaves the same state in the optimizer, so you can switch between the two at any time. The
    optimizer's options are read at each call, so schedulers work as usual. After an update the
    gradients are None. :meth:`TrainStep.report` says how the step runs.

    Args:
        model: the module to train.
        loss_fn: called with the model's output and the target; a module or a function. It returns
            a scalar tensor.
        optimizer: any :class:`torch.optim.Optimizer` that needs no closure.
        accumulate: number of calls whose gradients are summed before an update; each is divided by
            this number (default 1: every call updates).
        clip_grad_norm: maximum norm of the gradients of all the optimizer's parameters together;
            :func:`torch.nn.utils.clip_grad_norm_` scales them down to it (default ``None``: no
            clipping).

    Returns:
        A :class:`TrainStep`.

    Raises:
        TypeError: ``model`` is not a module, ``loss_fn`` can't be called, ``optimizer`` is not a
            :class:`torch.optim.Optimizer`, or its step needs a closure, as LBFGS's does.
        ValueError: ``accumulate`` is not a positive integer, or ``clip_grad_norm`` not a positive
            number.

    >>> import torch, fastnn
    >>> model = torch.nn.Sequential(fastnn.nn.LinearReLU(8, 4), torch.nn.Linear(4, 3))
    >>> optimizer = fastnn.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> step = fastnn.train_step(model, fastnn.nn.CrossEntropyLoss(), optimizer)
    >>> step(torch.randn(2, 8), torch.tensor([0, 2])).requires_grad
    False
    """
    if not isinstance(model, Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn: expected a function or a module, got {type(loss_fn).__name__}")
    if isinstance(loss_fn, type):
        raise TypeError(
            f"loss_fn: expected a function or a module, got the class {loss_fn.__name__}; call it"
        )
    _check_optimizer(optimizer)
    return TrainStep(
        Program(
            model, loss_fn, optimizer, _checked_count(accumulate), _checked_norm(clip_grad_norm)
        )
    )


def _check_optimizer(optimizer: object) -> None:
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {name}")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"optimizer: expected one whose step needs no closure, got {name}; call its step with "
            "a closure instead of train_step"
        )


def _checked_count(accumulate: Any) -> int:
    try:
        count = operator.index(accumulate)
    except TypeError:
        count = 0
    if isinstance(accumulate, bool) or count < 1:
        raise ValueError(f"accumulate: expected a positive integer, got {accumulate!r}")
    return count


def _checked_norm(clip_grad_norm: Any) -> float | None:
    if clip_grad_norm is None:
        return None
    try:
        norm = float(clip_grad_norm)
    except (TypeError, ValueError):
        norm = 0.0
    if isinstance(clip_grad_norm, (bool, str)) or not norm > 0:
        raise ValueError(f"clip_grad_norm: expected a number above 0, got {clip_grad_norm!r}")
    return norm

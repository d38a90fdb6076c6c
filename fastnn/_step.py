"""Shared by the ways to run a training step: the program, the loop, and undoing a failed call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn import Embedding, EmbeddingBag, Module
from torch.nn.parameter import is_lazy
from torch.nn.utils import clip_grad_norm_
from torch.optim.optimizer import Optimizer

from fastnn import _torch
from fastnn.optim._hooks import has_replaced_step

Batch: TypeAlias = tuple[Any, Any]  # input and target of a call


@dataclass
class Program:
    """A training step: its parts, its options, and its progress.

    Args:
        model, loss_fn, optimizer, accumulate, clip_grad_norm: as for :func:`fastnn.train_step`.
        accumulated: number of batches whose gradients await an update (default 0).
        stepped: the size of the optimizer's state after the last update (default: no update yet).
    """

    model: Module
    loss_fn: Callable[[Any, Any], Tensor]
    optimizer: Optimizer
    accumulate: int = 1
    clip_grad_norm: float | None = None
    accumulated: int = 0
    stepped: tuple[int, int] | None = None

    @property
    def updates_next(self) -> bool:
        """Whether the next batch completes an update."""
        return self.accumulated + 1 >= self.accumulate

    def parameters(self) -> list[Tensor]:
        """The optimizer's parameters."""
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    @property
    def device_type(self) -> str:
        """The type of the first parameter's device."""
        return self.optimizer.param_groups[0]["params"][0].device.type

    def modules(self) -> list[Module]:
        """The modules of the model, and of the loss if it is a module; each once."""
        found: dict[int, Module] = {}
        waiting: list[Any] = [self.model]
        if isinstance(self.loss_fn, Module):
            waiting.append(self.loss_fn)
        while waiting:
            module = waiting.pop()
            if module is not None and id(module) not in found:
                found[id(module)] = module
                waiting += _torch.submodules(module).values()
        return list(found.values())


class Way(Protocol):
    """A way to run calls. The first one that can run a call does."""

    name: str

    def why_not(self, program: Program) -> str:
        """Why this way can't run any call now; empty if it can."""

    def why_not_batch(self, program: Program, batch: Batch) -> str:
        """Why it can't run this batch; empty if it can."""

    def run(self, program: Program, batch: Batch) -> Tensor:
        """Runs a call and returns the loss, detached. If it raises, all changes are undone."""


# ---- the loop ------------------------------------------------------------------------------------


def run_loop(program: Program, batch: Batch, before_update: Callable[[], None]) -> Tensor:
    """Runs the loop on a batch.

    Args:
        program: the step.
        batch: the input and target of the call.
        before_update: called before the optimizer's step, if the call makes one.

    Returns:
        The loss, detached.
    """
    with nullcontext() if torch.is_grad_enabled() else torch.enable_grad():
        loss = program.loss_fn(_output(program.model, batch[0]), batch[1])
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss_fn: expected it to return a Tensor, got {type(loss).__name__}")
        part = loss / program.accumulate if program.accumulate > 1 else loss
    with _without_autocast(program):
        part.backward()
        if program.updates_next:
            before_update()
            update(program)
    return loss.detach()


def _output(model: Module, input: Any) -> Any:
    if isinstance(input, (tuple, list)):
        return model(*input)
    return model(**input) if isinstance(input, dict) else model(input)


def update(program: Program) -> None:
    """Steps the optimizer, and sets the gradients to None."""
    if program.clip_grad_norm is not None:
        clip_grad_norm_(program.parameters(), program.clip_grad_norm)
    program.optimizer.step()
    program.optimizer.zero_grad(set_to_none=True)


def _without_autocast(program: Program) -> AbstractContextManager[Any]:
    """Turns autocast off for the backward, as a hand-written loop does: its operators keep their
    dtypes, and no cached cast of a parameter outlives the parameter's update."""
    device = program.device_type
    if not _has_autocast(device):
        return nullcontext()
    torch.clear_autocast_cache()
    return torch.autocast(device, enabled=False)


def _has_autocast(device: str) -> bool:
    """Whether autocast is on for a device type."""
    try:
        return torch.is_autocast_enabled(device)
    except RuntimeError:  # this device type has no autocast
        return False


class OrdinaryStep:
    """The loop as written by hand, for everything that PyTorch can run."""

    name = "ordinary"

    def why_not(self, program: Program) -> str:
        """Empty: the loop runs everything."""
        return ""

    def why_not_batch(self, program: Program, batch: Batch) -> str:
        """Empty: the loop runs everything."""
        return ""

    def run(self, program: Program, batch: Batch) -> Tensor:
        """Runs a call; see :class:`Way`."""
        with Before(program) as before:
            loss = run_loop(program, batch, before.keep_for_update)
        if program.updates_next:
            note_update(program)
        else:
            program.accumulated += 1
        return loss


def flush(program: Program) -> None:
    """Steps the optimizer along the accumulated gradients, if any."""
    if program.accumulated:
        with Before(program) as before, _without_autocast(program):
            before.keep_for_update()
            update(program)
        note_update(program)


def note_scheduled_step(program: Program) -> None:
    """Tells a scheduler that the optimizer has stepped, although its step was not called."""
    if _torch.has_scheduler_mark(program.optimizer.step):
        _torch.note_step_for_schedulers(program.optimizer)


def note_update(program: Program) -> None:
    """Records that an update succeeded."""
    program.accumulated, program.stepped = 0, _size_of_state(program)


# ---- how a call is undone ------------------------------------------------------------------------

Restore: TypeAlias = Callable[[], Any]


class Before:
    """Saves what a call may change, and restores it if the call raises.

    Gradients are set aside and buffers copied. Parameters and the optimizer's state are large and
    only change in the optimizer's step, so they are copied only if that step may fail halfway for
    a foreseeable reason.

    Args:
        program: the step. If nothing is accumulated yet, its gradients are set to None.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._modules = program.modules()
        self._restores = [keep(owner) for module in self._modules for owner in _written_by(module)]
        self._gradients: list[tuple[Tensor, Restore]] = []
        if any(param.grad is not None for param in self._params()):
            self._set_gradients_aside()

    def _params(self) -> Iterator[Tensor]:
        """The optimizer's parameters, and others that the backward may reach; some twice."""
        for module in self._modules:
            for param in _torch.parameters(module).values():
                if param is not None:
                    yield param
        yield from self._program.parameters()

    def _set_gradients_aside(self) -> None:
        """Copies gradients that the backward adds to in place; the others are set to None."""
        stepped = set(self._program.parameters())
        for param in dict.fromkeys(self._params()):
            if param.grad is not None and self._program.accumulated == 0 and param in stepped:
                self._gradients.append((param, partial(_itself, param.grad)))
                param.grad = None
            else:
                self._gradients.append((param, keep(param.grad)))

    def keep_for_update(self) -> None:
        """Copies parameters and state if the update may change some of them and then raise."""
        if _may_fail_halfway(self._program):
            optimizer = self._program.optimizer
            self._restores.append(keep([optimizer.state, optimizer.param_groups]))

    def __enter__(self) -> Before:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            return
        with torch.no_grad():
            for restore in self._restores:
                restore()
            for param in self._params():
                param.grad = None
            for param, gradient in self._gradients:
                param.grad = gradient()


def _written_by(module: Module) -> list[Any]:
    """What a module's forward writes: buffers, and an Embedding's weight if it renormalises it."""
    written: list[Any] = []
    if buffers := _torch.buffers(module):
        # The buffers of a scripted module are not in a dict.
        written.append(buffers if isinstance(buffers, dict) else [*buffers.values()])
    if isinstance(module, (Embedding, EmbeddingBag)) and module.max_norm is not None:
        written.append(_torch.parameters(module))
    return written


def keep(value: Any) -> Restore:
    """Copies a value; the function returned restores the same object with its old contents."""
    if isinstance(value, Tensor):
        # An expanded tensor can't be written in place.
        if is_lazy(value) or _is_expanded(value):
            return partial(_itself, value)
        return partial(value.copy_, value.detach().clone())
    if isinstance(value, dict):
        return partial(_refill, value, {key: keep(item) for key, item in value.items()})
    if isinstance(value, list):
        return partial(_exchange, value, list(map(keep, value)))
    return partial(_itself, copy.deepcopy(value))


def _itself(value: Any) -> Any:
    return value


def _is_expanded(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided:
        return False
    strides = tensor.stride()
    return 0 in strides and any(
        stride == 0 and size > 1 for stride, size in zip(strides, tensor.shape, strict=True)
    )


def _refill(owner: dict[Any, Any], items: dict[Any, Restore]) -> dict[Any, Any]:
    owner.clear()
    owner.update((key, restore()) for key, restore in items.items())
    return owner


def _exchange(owner: list[Any], items: list[Restore]) -> list[Any]:
    owner[:] = [restore() for restore in items]
    return owner


def _may_fail_halfway(program: Program) -> bool:
    """Whether the next step creates state, is followed by hooks, or runs unknown code."""
    optimizer = program.optimizer
    return (
        program.stepped != _size_of_state(program)
        or _torch.has_step_hooks(optimizer)
        or has_replaced_step(optimizer)
        or not type(optimizer).__module__.startswith(("torch.optim.", "fastnn.optim"))
    )


def _size_of_state(program: Program) -> tuple[int, int]:
    groups = program.optimizer.param_groups
    return len(program.optimizer.state), sum(len(group["params"]) for group in groups)

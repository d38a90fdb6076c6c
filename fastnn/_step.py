"""What the ways of a training step share: the program, the loop, and how a call is undone."""

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

Batch: TypeAlias = tuple[Any, Any]  # the input and the target of a call


@dataclass
class Program:
    """A training step: its parts, its options, and what is known of the calls before.

    Args:
        model, loss_fn, optimizer, accumulate, clip_grad_norm: as for :func:`fastnn.train_step`.
        accumulated: how many batches' gradients wait for an update (default 0).
        stepped: how much state the optimizer had after the last update (default: there was none).
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
        """Whether the next batch is the last before an update."""
        return self.accumulated + 1 >= self.accumulate

    def parameters(self) -> list[Tensor]:
        """What the optimizer steps."""
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    @property
    def device_type(self) -> str:
        """Where the first parameter lies."""
        return self.optimizer.param_groups[0]["params"][0].device.type

    def modules(self) -> list[Module]:
        """The modules of the model, and of the loss if it is one; each once."""
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
    """How calls are run. The first way that can run a call does."""

    name: str

    def why_not(self, program: Program) -> str:
        """Why this way can run no call, as things are now; empty where it can."""

    def why_not_batch(self, program: Program, batch: Batch) -> str:
        """Why it can't run this batch, if it can run others; empty where it can."""

    def run(self, program: Program, batch: Batch) -> Tensor:
        """Runs a call and returns the loss, detached; undoes what it did where it raises."""


# ---- the loop ------------------------------------------------------------------------------------


def run_loop(program: Program, batch: Batch, before_update: Callable[[], None]) -> Tensor:
    """What the loop does with a batch.

    Args:
        program: the step.
        batch: the call's.
        before_update: called before the optimizer's step, where there is one.

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
    """Steps along the gradients, and sets them to None."""
    if program.clip_grad_norm is not None:
        clip_grad_norm_(program.parameters(), program.clip_grad_norm)
    program.optimizer.step()
    program.optimizer.zero_grad(set_to_none=True)


def _without_autocast(program: Program) -> AbstractContextManager[Any]:
    """As in a loop whose autocast ends before the backward: operators of the backward keep their
    dtypes, and no cast of a parameter outlives the parameter's step."""
    device = program.device_type
    if not has_autocast(device):
        return nullcontext()
    torch.clear_autocast_cache()
    return torch.autocast(device, enabled=False)


def has_autocast(device: str) -> bool:
    """Whether autocast is on for a type of device."""
    try:
        return torch.is_autocast_enabled(device)
    except RuntimeError:  # there is none for this type of device
        return False


class OrdinaryStep:
    """The loop as it is written by hand, for everything that PyTorch runs."""

    name = "ordinary"

    def why_not(self, program: Program) -> str:
        """Empty: it runs everything."""
        return ""

    def why_not_batch(self, program: Program, batch: Batch) -> str:
        """Empty: it runs everything."""
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
    """Steps along what is accumulated, if anything."""
    if program.accumulated:
        with Before(program) as before, _without_autocast(program):
            before.keep_for_update()
            update(program)
        note_update(program)


def note_scheduled_step(program: Program) -> None:
    """Tells a scheduler that the optimizer has stepped, where its step was not called."""
    if _torch.has_scheduler_mark(program.optimizer.step):
        _torch.note_step_for_schedulers(program.optimizer)


def note_update(program: Program) -> None:
    """Notes that an update has gone well."""
    program.accumulated, program.stepped = 0, _size_of_state(program)


# ---- how a call is undone ------------------------------------------------------------------------

Restore: TypeAlias = Callable[[], Any]


class Before:
    """What a call may change, as it was before; put back where the call raises.

    Gradients are set aside and buffers copied. Parameters and the optimizer's state, which are
    large, change in the optimizer's step alone: they are copied only where that may raise halfway
    for a reason that can be foreseen.

    Args:
        program: the step. Where nothing is accumulated yet, its gradients are set to None.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._modules = program.modules()
        self._restores = [keep(owner) for module in self._modules for owner in _written_by(module)]
        self._gradients: list[tuple[Tensor, Restore]] = []
        if any(param.grad is not None for param in self._params()):
            self._set_gradients_aside()

    def _params(self) -> Iterator[Tensor]:
        """The optimizer's, and what else the backward may give a gradient; some twice."""
        for module in self._modules:
            for param in _torch.parameters(module).values():
                if param is not None:
                    yield param
        yield from self._program.parameters()

    def _set_gradients_aside(self) -> None:
        """Those that add up are copied, since the backward adds to them in place."""
        stepped = set(self._program.parameters())
        for param in dict.fromkeys(self._params()):
            if param.grad is not None and self._program.accumulated == 0 and param in stepped:
                self._gradients.append((param, partial(_itself, param.grad)))
                param.grad = None
            else:
                self._gradients.append((param, keep(param.grad)))

    def keep_for_update(self) -> None:
        """Copies parameters and state, where the update may change some of them and raise."""
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
    """What a module's forward writes: buffers, and the weight that an Embedding scales."""
    written: list[Any] = []
    if buffers := _torch.buffers(module):
        # A scripted module's are in no dict.
        written.append(buffers if isinstance(buffers, dict) else [*buffers.values()])
    if isinstance(module, (Embedding, EmbeddingBag)) and module.max_norm is not None:
        written.append(_torch.parameters(module))
    return written


def keep(value: Any) -> Restore:
    """Copies a value; what is returned gives the value back, the same object with what it held."""
    if isinstance(value, Tensor):
        # Nothing can write to an expanded tensor in place.
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
    """Whether its first step makes state, a hook comes after it, or its code isn't known."""
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

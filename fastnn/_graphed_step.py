"""A training step as a CUDA graph: the loop is captured once and replayed for each batch.

A replay repeats the loop's work on the GPU and runs no Python, so a step is captured only if its
Python does nothing else: PyTorch's own modules, losses and optimizers, and ours. Everything that a
capture fixes is part of its key (:func:`capture_key`); another key needs another capture.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Module
from torch.nn.parameter import is_lazy

from fastnn import _torch
from fastnn._step import (
    Batch,
    OrdinaryStep,
    Program,
    note_scheduled_step,
    note_update,
    run_loop,
)
from fastnn.optim import SGD
from fastnn.optim._hooks import has_replaced_step

# Calls that run as the ordinary loop before a capture: they create the optimizer's state and what
# the libraries allocate at their first call.
WARM_UP_CALLS = 3
# Enough for a smaller last batch of an epoch and an occasional other one; more would cost memory.
MOST_CAPTURES = 4

Key: TypeAlias = tuple[Any, ...]

_MODULES = ("torch.nn.modules.", "fastnn.nn")
_LOSSES = (*_MODULES, "torch.nn.functional", "fastnn.functional")


class GraphedStep:
    """Replays steps from CUDA graphs; see :class:`fastnn._step.Way`."""

    name = "CUDA graph"

    def __init__(self) -> None:
        # For each key the number of calls, then its capture; recently used ones come last.
        self._known: OrderedDict[Key, int | Capture] = OrderedDict()
        self._stream: torch.cuda.Stream | None = None
        self._failure = ""

    def why_not(self, program: Program) -> str:
        """Why no call can be captured; empty if it can."""
        return self._failure or why_not_captured(program)

    def why_not_batch(self, program: Program, batch: Batch) -> str:
        """Why this batch can't be captured; empty if it can."""
        device = program.parameters()[0].device
        for name, value in zip(("input", "target"), batch, strict=True):
            if type(value) is not Tensor:
                return f"the {name} is no plain tensor but {type(value).__name__}"
            if value.device != device:
                return f"the {name} is on {value.device}, the parameters on {device}"
            if value.requires_grad:
                return f"the {name} requires a gradient"
        return ""

    def run(self, program: Program, batch: Batch) -> Tensor:
        """Replays the capture for the batch's key, after a few calls as the ordinary loop."""
        key = capture_key(program, batch)
        known = self._known.pop(key, 0)
        if isinstance(known, int) and known >= WARM_UP_CALLS:
            known = self._capture(program, batch)
        if isinstance(known, int):
            loss = self._warm_up(program, batch)
            # The first call may have created state, which is part of the key.
            key, known = capture_key(program, batch), known + 1
        else:
            loss = known.replay(program, batch)
        self._known[key] = known
        while len(self._known) > MOST_CAPTURES:
            self._known.popitem(last=False)
        return loss

    def _warm_up(self, program: Program, batch: Batch) -> Tensor:
        """Runs the ordinary loop, on the captures' stream."""
        if self._failure:
            return OrdinaryStep().run(program, batch)
        current, stream = torch.cuda.current_stream(), self._own_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            loss = OrdinaryStep().run(program, batch)
        current.wait_stream(stream)
        loss.record_stream(current)
        return loss

    def _capture(self, program: Program, batch: Batch) -> Capture | int:
        """Captures a step; if PyTorch can't, all calls run as the ordinary loop from now on."""
        try:
            return Capture(program, batch, self._own_stream())
        except RuntimeError as error:
            self._failure = f"its capture failed: {str(error).splitlines()[0]}"
            self._known.clear()
            return 0

    def _own_stream(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        return self._stream


class Capture:
    """A captured step, and the memory that its input and target are copied to."""

    def __init__(self, program: Program, batch: Batch, stream: torch.cuda.Stream) -> None:
        self._batch = tuple(value.clone() for value in batch)
        self._graph = torch.cuda.CUDAGraph()
        gradients = [(param, param.grad) for param in program.parameters()]
        try:
            # Gradients created during the capture are allocated from the graph's memory.
            _set_gradients((param, None) for param, _ in gradients)
            torch.clear_autocast_cache()
            with torch.cuda.graph(self._graph, stream=stream):
                self._loss = run_loop(program, (self._batch[0], self._batch[1]), _do_nothing)
        except BaseException:
            _set_gradients(gradients)
            raise

    def replay(self, program: Program, batch: Batch) -> Tensor:
        """Runs the step on a batch and returns the loss."""
        for own, value in zip(self._batch, batch, strict=True):
            own.copy_(value)
        self._graph.replay()
        # The bookkeeping that the loop's Python would have done.
        increment_version(program.parameters())
        _set_gradients((param, None) for param in program.parameters())
        note_scheduled_step(program)
        note_update(program)
        return self._loss.clone()


def _do_nothing() -> None:
    pass


def _set_gradients(gradients: Any) -> None:
    for param, grad in gradients:
        param.grad = grad


# ---- what can be captured ------------------------------------------------------------------------


def why_not_captured(program: Program) -> str:
    """Why no call of a step can be captured; empty if it can."""
    params = program.parameters()
    if not all(param.is_cuda for param in params):
        return "parameters are not on a GPU"
    if len({param.device for param in params}) > 1:
        return "parameters are on several GPUs"
    if torch.cuda.is_current_stream_capturing():
        return "the stream is already being captured"
    if program.accumulate > 1:
        return "gradients are accumulated"
    reasons = (
        _why_not_loss(program.loss_fn),
        _why_not_optimizer(program),
        _why_not_modes(),
        *map(_why_not_parameter, params),
        *map(_why_not_module, program.modules()),
    )
    return next(filter(None, reasons), "")


def _why_not_loss(loss_fn: Any) -> str:
    if isinstance(loss_fn, Module) or _is_named(loss_fn, _LOSSES):
        return ""
    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    return f"the loss {name} is not PyTorch's or fastnn's, and may do more than a graph repeats"


def _why_not_module(module: Module) -> str:
    name = type(module).__name__
    if not _is_named(type(module), _MODULES):
        return f"{name} is no module of torch.nn, and may do more than a graph repeats"
    if _torch.is_observed(module):
        return f"hooks or a forward of its own on {name}"
    return ""


def _why_not_parameter(param: Tensor) -> str:
    if is_lazy(param):
        return "a parameter has no values yet"
    if type(param) not in (Tensor, torch.nn.Parameter):
        return f"a parameter is a {type(param).__name__}"
    return "hooks on a parameter" if _torch.has_tensor_hooks(param) else ""


def _why_not_optimizer(program: Program) -> str:
    optimizer = program.optimizer
    name = type(optimizer).__name__
    if _torch.has_step_hooks(optimizer) or has_replaced_step(optimizer):
        return f"hooks on {name} or a step of its own"
    if type(optimizer) in (SGD, torch.optim.SGD):
        return ""
    if not type(optimizer).__module__.startswith("torch.optim."):
        return f"{name} is not PyTorch's or fastnn's, and may do more than a graph repeats"
    if not all(group.get("capturable") for group in optimizer.param_groups):
        return f"{name} is not capturable; pass capturable=True if it can be"
    return ""


def _why_not_modes() -> str:
    if _torch.has_global_hooks():
        return "hooks on all modules"
    if _torch.has_modes():
        return "a torch function or dispatch mode is active"
    return "autograd checks for anomalies" if torch.is_anomaly_enabled() else ""


def _is_named(value: Any, modules: tuple[str, ...]) -> bool:
    return str(getattr(value, "__module__", "")).startswith(modules)


# ---- what a capture fixes ------------------------------------------------------------------------


def capture_key(program: Program, batch: Batch) -> Key:
    """Everything that a capture fixes: a call with another key needs another capture.

    Args:
        program: the step.
        batch: the input and target of the call.

    Returns:
        A hashable key.
    """
    optimizer, params = program.optimizer, program.parameters()
    fixed = partial(_fixed, device=params[0].device)
    return (
        *((value.shape, value.stride(), value.dtype) for value in batch),
        *((id(module), type(module), *map(fixed, _held(module))) for module in program.modules()),
        id(program.loss_fn),
        program.clip_grad_norm,
        *map(fixed, optimizer.param_groups),
        *(fixed(optimizer.state.get(param)) for param in params),
        *_settings(),
    )


def _held(module: Module) -> Iterator[Any]:
    """A module's tensors, its training flag, and options such as a Dropout's p."""
    yield from _torch.parameters(module).values()
    yield from _torch.buffers(module).values()
    yield from (item for item in vars(module).items() if isinstance(item[1], _OPTIONS))


_OPTIONS = (bool, int, float, str, tuple, torch.dtype, type(None))


def _fixed(value: Any, device: torch.device) -> Any:
    """A value as part of the key. Replays reread tensors on the device, so their address counts."""
    if isinstance(value, Tensor):
        if value.device != device:
            return repr(value.tolist())
        return (id(value), value.data_ptr(), value.shape, value.dtype, value.requires_grad)
    if isinstance(value, dict):
        return tuple((name, _fixed(item, device)) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_fixed(item, device) for item in value)
    return value


def _settings() -> Iterator[Any]:
    """PyTorch's settings that choose kernels and dtypes."""
    yield torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    yield torch.get_float32_matmul_precision()
    yield torch.are_deterministic_algorithms_enabled()
    yield torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    yield torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    cudnn = torch.backends.cudnn
    yield (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32)

"""A training step in one call of the extension: linear layers in a row, cross entropy and SGD."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import (
    CrossEntropyLoss,
    Dropout,
    Flatten,
    Identity,
    Linear,
    LogSoftmax,
    Module,
    NLLLoss,
    ReLU,
)

from fastnn import _containers, _torch, functional, nn
from fastnn._extension import extension
from fastnn._function import under_autocast
from fastnn._step import Batch, Program, note_scheduled_step, note_update, update
from fastnn._tensor_classes import PLAIN, PLAIN_OR_NONE
from fastnn.optim import SGD
from fastnn.optim._hooks import has_replaced_step

_MLPStep: Any = getattr(extension, "MLPStep", None)

_LINEARS = {Linear: False, nn.Linear: False, nn.LinearReLU: True}  # whether it includes a ReLU
_LOG_SOFTMAXES = (LogSoftmax, nn.LogSoftmax)
_CROSS_ENTROPIES: tuple[Any, ...] = (
    *(CrossEntropyLoss, nn.CrossEntropyLoss),
    *(F.cross_entropy, functional.cross_entropy),
)
_NLL_LOSSES: tuple[Any, ...] = (NLLLoss, nn.NLLLoss, F.nll_loss, functional.nll_loss)


class _CannotFuse(Exception):
    """Says why the ordinary loop has to run a step."""


class _Chain(NamedTuple):
    """What the model computes.

    Args:
        params: weight and bias of each layer; the bias may be None.
        relu: whether each layer has a ReLU after it.
        flattens: whether the input is flattened to a matrix first.
        has_log_softmax: whether a log-softmax follows the last layer.
    """

    params: list[Tensor | None]
    relu: list[bool]
    flattens: bool
    has_log_softmax: bool


class _Plan(NamedTuple):
    """Everything about a call except its batch.

    Args:
        chain: what the model computes.
        groups: the optimizer's group of each parameter; None if it is frozen or missing.
        loss: the options of cross_entropy.
        takes_probabilities: whether the targets may be class probabilities.
    """

    chain: _Chain
    groups: list[dict[str, Any] | None]
    loss: dict[str, Any]
    takes_probabilities: bool


class FusedStep:
    """Runs the whole step in C++; see :class:`fastnn._step.Way`."""

    name = "fused"

    def __init__(self) -> None:
        self._step: Any = None if _MLPStep is None else _MLPStep()
        self._plan: _Plan  # set by why_not

    def why_not(self, program: Program) -> str:
        """Why no call can be fused; empty if it can."""
        try:
            self._plan = _plan(program)
        except _CannotFuse as reason:
            return str(reason)
        return ""

    def why_not_batch(self, program: Program, batch: Batch) -> str:
        """Why this batch can't be fused; empty if it can."""
        chain, input, target = self._plan.chain, *batch
        for name, value in (("input", input), ("target", target)):
            if type(value) not in PLAIN:
                return f"the {name} is no plain tensor but {type(value).__name__}"
        if input.dim() != 2 and not chain.flattens:
            return "the input is no matrix"
        if target.is_floating_point() and not self._plan.takes_probabilities:
            return "the target is not class indices"
        if target.is_floating_point() and target.dtype != input.dtype:
            return "the target has another dtype than the input"
        return _MLPStep.why_not_batch(input, target, chain.params[0])

    def run(self, program: Program, batch: Batch) -> Tensor:
        """Runs a call; see :class:`fastnn._step.Way`."""
        plan, (input, target) = self._plan, batch
        # To be accumulated or clipped, the gradients must exist in memory.
        stores = program.accumulate > 1 or program.clip_grad_norm is not None
        loss, grads = self._step.run(
            input.flatten(1) if plan.chain.flattens else input,
            target,
            params=plan.chain.params,
            relu=plan.chain.relu,
            groups=plan.groups,
            state=program.optimizer.state,
            stores=stores,
            scale=1 / program.accumulate,
            **plan.loss,
        )
        if program.accumulated == 0:
            program.optimizer.zero_grad()
        if stores:
            _add_gradients(plan.chain.params, grads)
            if not program.updates_next:
                program.accumulated += 1
                return loss
            update(program)
        else:
            note_scheduled_step(program)
        note_update(program)
        return loss


@torch.no_grad()
def _add_gradients(params: list[Tensor | None], grads: list[Tensor | None]) -> None:
    for param, grad in zip(params, grads, strict=True):
        if param is not None and grad is not None:
            param.grad = grad if param.grad is None else param.grad.add_(grad)


def _plan(program: Program) -> _Plan:
    _check_setting(program)
    chain = _chain_of(program.model)
    return _Plan(
        chain,
        _groups_of(program.optimizer, chain.params),
        *_loss_options(program.loss_fn, chain),
    )


def _refuse(why: str) -> None:
    if why:
        raise _CannotFuse(why)


def _check_setting(program: Program) -> None:
    if _MLPStep is None:
        raise _CannotFuse("the CPU extension is not available")
    if is_compiling() or _torch.tracing_state() is not None:
        raise _CannotFuse("the step is being compiled or traced")
    _refuse(_containers.why_all_apart())
    if torch.is_anomaly_enabled():
        raise _CannotFuse("autograd checks for anomalies")
    if under_autocast("cpu"):
        raise _CannotFuse("autocast is on")
    if _torch.in_forward_mode() or _torch.running_transform() is not None:
        raise _CannotFuse("the step is under a torch.func transform or forward-mode AD")


# ---- the model -----------------------------------------------------------------------------------


def _chain_of(model: Module) -> _Chain:
    params: list[Tensor | None] = []
    relu: list[bool] = []
    flattens = has_log_softmax = False
    for module in _modules_in_a_row(model):
        kind = type(module)
        if has_log_softmax:
            raise _CannotFuse(f"{kind.__name__} follows the log-softmax")
        if kind in _LINEARS:
            _refuse(_containers.why_not_plain(module))
            own = _torch.parameters(module)
            params += (own["weight"], own["bias"])
            relu.append(_LINEARS[kind])
        elif _torch.is_observed(module):
            raise _CannotFuse(f"hooks or a forward of its own on {kind.__name__}")
        elif kind is ReLU:
            if not relu:
                raise _CannotFuse("a ReLU comes before the first Linear")
            relu[-1] = True
        elif kind is Flatten and not relu and _flattens_all(module):
            flattens = True
        elif kind in _LOG_SOFTMAXES and relu and module.dim in (1, -1):
            has_log_softmax = True
        elif not (kind is Identity or (kind is Dropout and not (module.training and module.p))):
            raise _CannotFuse(f"{kind.__name__} can't be part of a fused chain")
    if not relu:
        raise _CannotFuse("the model has no Linear")
    return _Chain(params, relu, flattens, has_log_softmax)


def _flattens_all(flatten: Any) -> bool:
    return flatten.start_dim == 1 and flatten.end_dim == -1


def _modules_in_a_row(model: Module) -> Iterable[Module]:
    kind = type(model)
    if kind in _LINEARS:
        return [model]
    if not _containers.runs_a_row(_containers.stock_class(kind)):
        raise _CannotFuse(f"{kind.__name__} is not a Sequential, and may compute anything")
    if _torch.is_observed(model):
        raise _CannotFuse(f"hooks or a forward of its own on {kind.__name__}")
    return (module for _, module in _containers.row_of(model))


# ---- the loss ------------------------------------------------------------------------------------


def _loss_options(loss_fn: Callable[..., Any], chain: _Chain) -> tuple[dict[str, Any], bool]:
    """The options of cross_entropy, and whether the targets may be class probabilities."""
    kind = type(loss_fn) if isinstance(loss_fn, Module) else loss_fn
    if chain.has_log_softmax:
        if kind not in _NLL_LOSSES:
            raise _CannotFuse("the loss after the log-softmax is not NLLLoss")
    elif kind not in _CROSS_ENTROPIES:
        raise _CannotFuse("the loss is neither PyTorch's cross entropy nor fastnn's")
    options: dict[str, Any] = {
        "weight": None,
        "ignore_index": -100,
        "reduction": "mean",
        "label_smoothing": 0.0,
    }
    if isinstance(loss_fn, Module):
        if _torch.is_observed(loss_fn):
            raise _CannotFuse("hooks or a forward of its own on the loss")
        options.update((name, getattr(loss_fn, name, value)) for name, value in options.items())
    weight, reduction = options["weight"], options["reduction"]
    if reduction not in ("mean", "sum"):
        raise _CannotFuse("the loss is not reduced to a scalar")
    if type(options["ignore_index"]) is not int or type(options["label_smoothing"]) is not float:
        raise _CannotFuse("an option of the loss has an unexpected type")
    if type(weight) not in PLAIN_OR_NONE or (weight is not None and weight.requires_grad):
        raise _CannotFuse("the loss's weight is not a plain tensor, or requires a gradient")
    return options, not chain.has_log_softmax


# ---- the optimizer -------------------------------------------------------------------------------


def _groups_of(optimizer: Any, params: list[Tensor | None]) -> list[dict[str, Any] | None]:
    if type(optimizer) is not SGD:
        raise _CannotFuse(f"the optimizer is {type(optimizer).__name__}, not fastnn.optim.SGD")
    if _torch.is_step_observed(optimizer) or has_replaced_step(optimizer):
        raise _CannotFuse("hooks or a profiler on the optimizer's step, or a replaced step")
    if "zero_grad" in vars(optimizer):
        raise _CannotFuse("the optimizer's zero_grad has been replaced")
    for name in ("grad_scale", "found_inf"):
        if getattr(optimizer, name, None) is not None:
            raise _CannotFuse("gradients are scaled")
    for group in optimizer.param_groups:
        _check_group(optimizer, group)
    groups = _MLPStep.groups_of(params, optimizer.param_groups, optimizer.state)
    if type(groups) is str:
        raise _CannotFuse(groups)
    if groups.count(None) == len(groups):
        raise _CannotFuse("no parameter wants a gradient")
    return groups


def _check_group(optimizer: SGD, group: dict[str, Any]) -> None:
    for name in ("momentum", "dampening", "weight_decay"):
        if type(group[name]) not in _NUMBERS:
            raise _CannotFuse("an option of the optimizer is not a number")
    lr = group["lr"]
    if type(lr) not in _NUMBERS and not (type(lr) is Tensor and lr.is_cpu):
        raise _CannotFuse("the learning rate is neither a number nor a CPU tensor")
    if not optimizer._is_fusable(group):
        raise _CannotFuse("the optimizer's step must be differentiable")
    if type(group["params"]) is not list:
        raise _CannotFuse("a parameter group's params are not a list")


_NUMBERS = (int, float)

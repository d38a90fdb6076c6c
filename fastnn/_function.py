"""What the Functions of :mod:`fastnn.autograd` share: the choice of operators, how ``apply`` is
called, and autocast's casts."""

from __future__ import annotations

from dataclasses import dataclass
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionMeta
from torch.compiler import is_compiling

from fastnn import reference
from fastnn._arguments import check_loss_arguments, loss_reduction
from fastnn._extension import extension
from fastnn._tensor_classes import have_no_say
from fastnn._torch import in_forward_mode, running_transform, tracing_state


def operators_for(input: Tensor, *others: Tensor | None) -> Any:
    """``torch.ops.fastnn`` if its kernels can serve, else the reference, which has the same names.

    A kernel's result has no derivative, so the reference runs whatever is differentiated again or
    transformed. PyTorch turns gradients off in a forward, and in a backward without create_graph.
    """
    tensors = [other for other in others if other is not None]
    for other in tensors:
        if other.device != input.device:
            raise RuntimeError(
                f"expected all tensors on input's device {input.device}, but got {other.device}"
            )
    if (
        extension is None
        or torch.is_grad_enabled()
        or in_forward_mode()
        or running_transform() is not None
        or input.dim() == 0
        or not extension.has_kernels(input)
    ):
        return reference
    if any(other.is_floating_point() and other.dtype != input.dtype for other in tensors):
        return reference
    return torch.ops.fastnn


def may_be_differentiated(*tensors: Tensor | None) -> bool:
    """Whether a derivative by one of the tensors may be needed; a transform hides whether it is."""
    if running_transform() is not None or in_forward_mode():
        return True
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Casts an argument as autocast does; float64 is kept, as in PyTorch."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value if value.dtype == torch.float64 else value.to(dtype)


def under_autocast(device: str) -> bool:
    """Whether autocast is on for a device type; on others than these our operators ignore it."""
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


class _WithItsOwnApply(FunctionMeta):
    """Dynamo recognises a Function by its metaclass, skips its ``apply`` and refuses a ``jvp``. It
    reads a Function with this metaclass like any other class."""


class Operator(Function, metaclass=_WithItsOwnApply):
    """The Functions' base. A transform calls ``apply`` again, with ``forward``'s arguments."""

    generate_vmap_rule = True
    _stands_for: Any  # the function of fastnn.functional

    @classmethod
    def steps_aside(cls, *tensors: Tensor | None) -> bool:
        """Whether to call the function of :mod:`fastnn.functional` instead: a compiler knows its
        operator, and a tensor's class may know PyTorch's. Never for a subclass, whose own methods
        must run."""
        if "_stands_for" not in vars(cls):
            return False
        return is_compiling() or tracing_state() is not None or not have_no_say(*tensors)

    @classmethod
    def record(cls, *args: Any) -> Any:
        """Calls ``forward`` through autograd, with the arguments cast as autocast would."""
        device = args[0].device.type
        if not under_autocast(device):
            return super().apply(*args)
        dtype = cls.autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return super().apply(*(cast(arg, dtype) if dtype else arg for arg in args))

    @staticmethod
    def autocast_dtype(device: str) -> torch.dtype | None:
        """The dtype that autocast casts to; None for no cast."""
        return torch.float32

    @staticmethod
    def keep(ctx: Any, *tensors: Tensor | None) -> None:
        """Saves tensors for the backward and the jvp, which get None for missing gradients."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)


@dataclass(frozen=True)
class Options:
    """A loss's options, as an argument of ``forward`` that users never pass.

    Attributes:
        values: the options, as the operators take them.
        keep: whether a derivative may be needed.
        keep_logits: whether a derivative by the target or the weight may be needed.
    """

    values: tuple[Any, ...]
    keep: bool
    keep_logits: bool


class Loss(Operator):
    """A loss whose ``forward`` also returns what the backward reuses; ``apply`` drops that."""

    @classmethod
    def call(
        cls,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        size_average: bool | Options | None,
        ignore_index: int,
        reduce: bool | None,
        reduction: str,
        *smoothing: float,
    ) -> Any:
        """Implements ``apply``, with all of its arguments."""
        if isinstance(size_average, Options):
            return cls.record(input, target, weight, size_average)
        if cls.steps_aside(input, target, weight):
            options = (size_average, ignore_index, reduce, reduction, *smoothing)
            return cls._stands_for(input, target, weight, *options)
        check_loss_arguments(cls._stands_for.__name__, input, target, weight, ignore_index)
        reduction = loss_reduction(size_average, reduce, reduction)
        check_weight(target, weight is not None and weight.requires_grad, torch.is_grad_enabled())
        values = (index(ignore_index), reduction, *map(float, smoothing))
        keep = may_be_differentiated(input, target, weight)
        keep_logits = target.is_floating_point() and may_be_differentiated(target, weight)
        return cls.record(input, target, weight, Options(values, keep, keep_logits))[0]


def check_weight(target: Tensor, *is_differentiated: bool) -> None:
    """Raises for a differentiated weight with class indices: it has a derivative, as in PyTorch,
    only with class probabilities."""
    if all(is_differentiated) and not target.is_floating_point():
        raise RuntimeError("weight of class indices is not differentiable: it requires a gradient")

"""The operators as subclasses of :class:`torch.autograd.Function`, to read and to subclass.

``apply`` takes the arguments of the function of the same name in :mod:`fastnn.functional`, and
gives the same numbers, gradients of any order and transforms. It runs the extension's operators,
or those of :mod:`fastnn.reference` where they can't serve. A function of :mod:`fastnn.functional`
has less overhead: C++ keeps the record that PyTorch keeps in Python for a class.

The compiler replaces a class of this module by the operator, and runs a subclass outside of its
graph. :func:`torch.func.functionalize` supports no ``Function``.

>>> import torch, fastnn
>>> class ClippedCrossEntropy(fastnn.autograd.CrossEntropy):
...     @staticmethod
...     def backward(ctx, *grads):
...         grad_input, *others = fastnn.autograd.CrossEntropy.backward(ctx, *grads)
...         return grad_input.clamp(-0.1, 0.1), *others
>>> logits = torch.zeros(1, 2, requires_grad=True)
>>> ClippedCrossEntropy.apply(logits, torch.tensor([1])).backward()
>>> logits.grad
tensor([[ 0.1000, -0.1000]])
"""

from __future__ import annotations

from operator import index
from typing import Any

import torch
from torch import Tensor

from fastnn import functional, reference
from fastnn._arguments import (
    LinearLossOptions,
    check_label_smoothing,
    check_linear_arguments,
    check_linear_cross_entropy_arguments,
    check_tensor,
    log_softmax_dim,
)
from fastnn._function import (
    Loss,
    Operator,
    Options,
    cast,
    check_weight,
    may_be_differentiated,
    operators_for,
    under_autocast,
)
from fastnn._head_loss import head_loss
from fastnn._torch import in_forward_mode

__all__ = [
    "CrossEntropy",
    "Linear",
    "LinearCrossEntropy",
    "LinearReLU",
    "LogSoftmax",
    "NLLLoss",
]


class Linear(Operator):
    """``apply(input, weight, bias=None)``; see :func:`fastnn.functional.linear`.

    Input and weight are each saved only if the other one's gradient needs them.

    >>> import torch, fastnn
    >>> fastnn.autograd.Linear.apply(torch.ones(1, 2), torch.tensor([[1.0, 2.0], [-1.0, 0.0]]))
    tensor([[ 3., -1.]])
    """

    _stands_for = staticmethod(functional.linear)

    @classmethod
    def apply(cls, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if cls.steps_aside(input, weight, bias):
            return cls._stands_for(input, weight, bias)
        check_linear_arguments(cls._stands_for.__name__, input, weight, bias)
        if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            # torch accepts a vector as weight, and a bias that is broadcast.
            return cls._stands_for(input, weight, bias)
        return cls.record(input, weight, bias)

    @staticmethod
    def autocast_dtype(device: str) -> torch.dtype:
        return torch.get_autocast_dtype(device)

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return operators_for(input, weight, bias).linear(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        Linear.keep(ctx, *_factors_to_keep(ctx, inputs))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None
        return operators_for(grad).linear_backward(grad, *ctx.saved_tensors, ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        input, weight = ctx.saved_tensors
        return _linear_jvp(input, weight, *tangents)


class LinearReLU(Linear):
    """``apply(input, weight, bias=None)``; see :func:`fastnn.functional.linear_relu`.

    The output is saved, and input and weight only if the other one's gradient needs them.

    >>> import torch, fastnn
    >>> fastnn.autograd.LinearReLU.apply(torch.ones(1, 2), torch.tensor([[1.0, 2.0], [-1.0, 0.0]]))
    tensor([[3., 0.]])
    """

    _stands_for = staticmethod(functional.linear_relu)

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return operators_for(input, weight, bias).linear_relu(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        LinearReLU.keep(ctx, *_factors_to_keep(ctx, inputs), output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None
        *_, output = tensors = ctx.saved_tensors
        return operators_for(output).linear_relu_backward(grad, *tensors, ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        input, weight, output = ctx.saved_tensors
        return _linear_jvp(input, weight, *tangents).masked_fill(output <= 0, 0)


def _factors_to_keep(ctx: Any, inputs: tuple[Any, ...]) -> tuple[Tensor | None, Tensor | None]:
    """Input and weight, each only if the other one's derivative needs it."""
    input, weight, _ = inputs
    wants_input, wants_weight, _ = ctx.needs_input_grad
    if in_forward_mode():
        return input, weight
    return input if wants_weight else None, weight if wants_input else None


def _linear_jvp(
    input: Tensor,
    weight: Tensor,
    of_input: Tensor | None,
    of_weight: Tensor | None,
    of_bias: Tensor | None,
) -> Tensor:
    terms = []
    if of_input is not None:
        terms.append(of_input @ weight.T)
    if of_weight is not None:
        terms.append(input @ of_weight.T)
    if of_bias is not None:
        # Not a view of it, which PyTorch rejects as the tangent of an output.
        terms.append(of_bias + input.new_zeros(*input.shape[:-1], 1))
    return sum(terms[1:], terms[0])


class LogSoftmax(Operator):
    """``apply(input, dim, ..., dtype=None)``; see :func:`fastnn.functional.log_softmax`.

    Only the output is saved.

    >>> import torch, fastnn
    >>> fastnn.autograd.LogSoftmax.apply(torch.zeros(2), 0)
    tensor([-0.6931, -0.6931])
    """

    _stands_for = staticmethod(functional.log_softmax)

    @classmethod
    def apply(
        cls,
        input: Tensor,
        dim: int | None = None,
        _stacklevel: int = 3,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        if cls.steps_aside(input):
            return cls._stands_for(input, dim, _stacklevel + 1, dtype)
        check_tensor("log_softmax", "input", input)
        dim = index(log_softmax_dim(input, dim, _stacklevel + 1))
        if dtype is None:
            return cls.record(input, dim)
        with torch.autocast(input.device.type, enabled=False):  # dtype= outranks autocast
            return cls.record(input.to(dtype), dim)

    @staticmethod
    def autocast_dtype(device: str) -> torch.dtype | None:
        return torch.float32 if device == "cuda" else None

    @staticmethod
    def forward(input: Tensor, dim: int) -> Tensor:
        return operators_for(input).log_softmax(input, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        LogSoftmax.keep(ctx, output)
        _, ctx.dim = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        if grad is None:
            return None, None
        (output,) = ctx.saved_tensors
        return operators_for(output).log_softmax_backward(grad, output, ctx.dim), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        (output,) = ctx.saved_tensors
        return tangent - (output.exp() * tangent).sum(ctx.dim, keepdim=True)


class NLLLoss(Loss):
    """``apply(input, target, weight=None, ...)``; see :func:`fastnn.functional.nll_loss`.

    ``forward`` also returns the total weight of the rows, by which ``'mean'`` divides.

    >>> import torch, fastnn
    >>> fastnn.autograd.NLLLoss.apply(torch.tensor([[-1.0, -2.0]]), torch.tensor([1]))
    tensor(2.)
    """

    _stands_for = staticmethod(functional.nll_loss)

    @classmethod
    def apply(
        cls,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        return cls.call(input, target, weight, size_average, ignore_index, reduce, reduction)

    @staticmethod
    def forward(
        input: Tensor, target: Tensor, weight: Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor]:
        operators = operators_for(input, target, weight)
        return operators.nll_loss_forward(input, target, weight, *options.values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, options = inputs
        _, total_weight = output
        ctx.options = options.values
        ctx.mark_non_differentiable(total_weight)
        NLLLoss.keep(ctx, *tensors, total_weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        input, target, *_ = tensors = ctx.saved_tensors
        check_weight(target, ctx.needs_input_grad[2])
        grad_input = operators_for(input).nll_loss_backward(grad, *tensors, *ctx.options)
        return grad_input, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        of_input, _, of_weight, _ = tangents
        _, target, weight, _ = ctx.saved_tensors
        check_weight(target, of_weight is not None)
        return reference.nll_loss(of_input, target, weight, *ctx.options), None  # it is linear


class CrossEntropy(Loss):
    """``apply(input, target, weight=None, ...)``; see :func:`fastnn.functional.cross_entropy`.

    ``forward`` also returns what it saves of the input for the backward, in two parts, and the
    total weight of the rows. The first part is differentiable, for derivatives of higher orders.

    >>> import torch, fastnn
    >>> fastnn.autograd.CrossEntropy.apply(torch.zeros(1, 2), torch.tensor([1]))
    tensor(0.6931)
    """

    _stands_for = staticmethod(functional.cross_entropy)

    @classmethod
    def apply(
        cls,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        check_label_smoothing("cross_entropy", label_smoothing)
        options = (size_average, ignore_index, reduce, reduction, label_smoothing)
        return cls.call(input, target, weight, *options)

    @staticmethod
    def forward(
        input: Tensor, target: Tensor, weight: Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        # The reference saves the logits, while a kernel may save only the gradient.
        operators = reference if options.keep_logits else operators_for(input, target, weight)
        return operators.cross_entropy_forward(input, target, weight, *options.values, options.keep)

    @staticmethod
    def setup_context(
        ctx: Any,
        inputs: tuple[Any, ...],
        output: tuple[Tensor, Tensor | None, Tensor | None, Tensor],
    ) -> None:
        _, target, weight, options = inputs
        _, kept, lse, total_weight = output
        ctx.options = options.values
        ctx.mark_non_differentiable(*(part for part in (lse, total_weight) if part is not None))
        CrossEntropy.keep(ctx, kept, target, weight, lse, total_weight)

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_kept: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        kept, target, weight, _, total_weight = saved = ctx.saved_tensors
        wants_input, wants_target, wants_weight, _ = ctx.needs_input_grad
        check_weight(target, wants_weight)
        grad_input = grad_target = grad_weight = None
        if wants_input and grad is not None:
            operators = _operators_for_kept(*saved)
            grad_input = operators.cross_entropy_backward(grad, *saved, *ctx.options)
        if wants_input and grad_kept is not None:
            through_kept = reference.cross_entropy_kept_backward(grad_kept, *saved, *ctx.options)
            grad_input = through_kept if grad_input is None else grad_input + through_kept
        if (wants_target or wants_weight) and grad is not None:
            _, *options = ctx.options
            grad_target, grad_weight = reference.cross_entropy_target_backward(
                grad, kept, target, weight, total_weight, *options
            )
        return grad_input, grad_target, grad_weight, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Any, Tensor, None, None]:
        of_input, of_target, of_weight, _ = tangents
        kept, target, weight, _, total_weight = saved = ctx.saved_tensors
        ignore_index, reduction, label_smoothing = ctx.options
        check_weight(target, of_weight is not None)
        of_kept = torch.zeros_like(kept)  # autograd doesn't accept None here
        terms = []
        if of_input is not None:
            of_kept = reference.cross_entropy_kept_backward(of_input, *saved, *ctx.options)
            class_dim = min(kept.dim() - 1, 1)
            ones = torch.ones_like(kept.sum(class_dim) if reduction == "none" else total_weight)
            gradient = reference.cross_entropy_backward(ones, *saved, *ctx.options)
            rows = (gradient * of_input).sum(class_dim)
            terms.append(rows if reduction == "none" else rows.sum())
        # The loss is linear in the probabilities, up to the share of smoothing, and in the weights.
        if of_target is not None:
            loss = reference.cross_entropy(kept, of_target, weight, ignore_index, reduction)
            terms.append((1 - label_smoothing) * loss)
        if of_weight is not None:
            terms.append(reference.cross_entropy(kept, target, of_weight, *ctx.options))
        return sum(terms), of_kept, None, None


def _operators_for_kept(
    kept: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor | None, total_weight: Tensor
) -> Any:
    """The operators whose backward accepts what was saved."""
    # The kernels save the gradient, without a log-sum-exp, of logits in the dtype of the sums.
    if lse is not None and kept.dtype == total_weight.dtype:
        return reference
    return operators_for(kept, target, weight)


class LinearCrossEntropy(Operator):
    """``apply(input, linear_weight, target, *, linear_bias=None, ...)``; see
    :func:`fastnn.functional.linear_cross_entropy`.

    ``forward`` takes the operator's arguments, and also returns what the backward needs: the
    gradients of a reduced loss, or each row's log-sum-exp. For derivatives of higher orders the
    backward recomputes all the logits.

    >>> import torch, fastnn
    >>> x, w = torch.ones(1, 2), torch.zeros(2, 2)
    >>> fastnn.autograd.LinearCrossEntropy.apply(x, w, torch.tensor([1]))
    tensor(0.6931)
    """

    _stands_for = staticmethod(functional.linear_cross_entropy)

    @classmethod
    def apply(
        cls,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        *_operands: Any,
        linear_bias: Tensor | None = None,
        weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: object = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        z_loss: float = 0.0,
        normalizer: Tensor | float | None = None,
    ) -> Any:
        if _operands:  # a transform passes them
            return cls.record(input, linear_weight, target, *_operands)
        of_loss = LinearLossOptions(
            *(weight, reduction, ignore_index, label_smoothing),
            *(softcap, logit_scale, z_loss, normalizer),
        )
        head = input, linear_weight, target, linear_bias
        # Derivatives by class probabilities, weights and the normalizer are the function's.
        is_partial = (target.is_floating_point() and may_be_differentiated(target)) or any(
            isinstance(other, Tensor) and other.requires_grad for other in (weight, normalizer)
        )
        if is_partial or cls.steps_aside(*head, weight):
            return cls._stands_for(*head[:3], linear_bias=linear_bias, **of_loss._asdict())
        check_linear_cross_entropy_arguments(*head, of_loss)
        return head_loss(cls._call, *head, of_loss)

    @classmethod
    def _call(cls, *operands: Any) -> Tensor:
        """Implements the call, with the operator's arguments."""
        *tensors, reduction, ignore_index, label_smoothing, softcap, scale, z, normalizer, _ = (
            operands
        )
        input, linear_weight, target, linear_bias, weight = tensors
        device = input.device.type
        dtype = None
        if under_autocast(device):
            low, dtype = torch.get_autocast_dtype(device), torch.float32
            input, linear_weight, linear_bias = (
                cast(each, low) for each in (input, linear_weight, linear_bias)
            )
            target, weight = cast(target, dtype), cast(weight, dtype)
        mask = [may_be_differentiated(each) for each in (input, linear_weight, linear_bias)]
        return cls.record(
            *(input, linear_weight, target, linear_bias, weight, reduction, ignore_index),
            *(float(label_smoothing), softcap, scale, z, normalizer, dtype, mask),
        )[0]

    @staticmethod
    def autocast_dtype(device: str) -> None:
        return None

    @staticmethod
    def forward(*operands: Any) -> tuple[Tensor | None, ...]:
        operators = operators_for(*(each for each in operands[:5] if each is not None))
        return operators.linear_cross_entropy_forward(*operands)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        *tensors, reduction, ignored, smoothing, softcap, scale, z, normalizer, dtype, _ = inputs
        ctx.reduction, ctx.dtype = reduction, dtype
        ctx.numbers = ignored, smoothing, softcap, scale, z
        _, *kept = output
        ctx.mark_non_differentiable(*(part for part in kept if part is not None))
        LinearCrossEntropy.keep(ctx, *tensors, normalizer, *kept)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        wanted, none = ctx.needs_input_grad, [None] * 9
        if grad is None:
            return None, None, None, None, None, *none
        *head, normalizer, kept_input, kept_weight, kept_bias, lse = ctx.saved_tensors
        input, linear_weight, *_ = head
        mask = wanted[0], wanted[1], wanted[3]
        operators = operators_for(input, linear_weight)
        if ctx.reduction == "none":
            grads = operators.linear_cross_entropy_backward(
                grad, *head, lse, *ctx.numbers, ctx.dtype, mask
            )
        elif operators is reference:
            arguments: Any = (grad, *head, ctx.reduction, *ctx.numbers, normalizer, mask)
            grads = reference.linear_cross_entropy_gradients(*arguments)
        else:
            grads = (
                (kept * grad.to(kept.dtype)).to(input.dtype) if wants else None
                for kept, wants in zip((kept_input, kept_weight, kept_bias), mask, strict=True)
            )
        grad_input, grad_weight, grad_bias = grads
        return grad_input, grad_weight, None, grad_bias, None, *none

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        of_input, of_weight, _, of_bias, *_ = tangents
        *head, normalizer, _, _, _, _ = ctx.saved_tensors
        input, linear_weight, *_ = head
        logits = input @ linear_weight.T
        tangent = torch.zeros_like(logits)
        if of_input is not None:
            tangent = tangent + of_input @ linear_weight.T
        if of_weight is not None:
            tangent = tangent + input @ of_weight.T
        if of_bias is not None:
            tangent = tangent + of_bias
        ones = logits.new_ones(logits.shape[:-1] if ctx.reduction == "none" else ())
        arguments: Any = (ones, *head, ctx.reduction, *ctx.numbers, normalizer)
        grad_logits = reference.linear_cross_entropy_logits_backward(*arguments)
        rows = (grad_logits * tangent).sum(-1)
        dtype = input.dtype if ctx.dtype is None else ctx.dtype
        return (rows if ctx.reduction == "none" else rows.sum()).to(dtype), None, None, None, None

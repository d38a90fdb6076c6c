"""``cross_entropy``."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from fastnn.reference._dtypes import compute_dtype, widened
from fastnn.reference._log_softmax import log_softmax, max_and_sum_exp
from fastnn.reference._losses import (
    check_loss_arguments,
    class_dim_of,
    counts_and_index,
    gather_class,
    grad_per_row,
    is_class_of_row,
    nan_for_zero,
    per_class,
    reduce,
    weights_of_rows,
)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``-sum_c q_c * log_softmax(input)_c`` per row; see :func:`fastnn.functional.cross_entropy`.

    Args:
        dtype: of the loss, as if input, class probabilities and weights were cast to it first
            (default: the input's).

    >>> import torch
    >>> from fastnn import reference
    >>> reference.cross_entropy(torch.zeros(1, 2), torch.tensor([1]))
    tensor(0.6931)
    """
    options = (ignore_index, reduction, label_smoothing)
    return cross_entropy_forward(input, target, weight, *options, keep=False, dtype=dtype)[0]


def cross_entropy_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    keep: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """The loss, what the backward needs, and the total weight of the rows that count; see
    :func:`fastnn.functional.cross_entropy`.

    Args:
        keep: whether a backward will follow.
        dtype: of the loss, as if input, class probabilities and weights were cast to it first
            (default: the input's).

    Returns:
        The loss; for the backward a copy of the input and each row's log-sum-exp in two parts (the
        maximum, and the sum of ``exp(x - max)``), or two Nones; the total weight. A kernel that
        sums in the input's own dtype returns the loss's gradient instead of the copy, and None.

    >>> import torch
    >>> from fastnn import reference
    >>> arguments = torch.ones(1, 2), torch.tensor([1]), None, -100, "sum", 0.0
    >>> reference.cross_entropy_forward(*arguments, keep=True)
    (tensor(0.6931), tensor([[1., 1.]]), tensor([[1.],
            [2.]]), tensor(1.))
    """
    if input.dim() == 0:
        raise IndexError("Dimension out of range: input must have 1 or more dimensions, got 0")
    check_loss_arguments(input, weight, reduction)
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    class_dim = class_dim_of(input)
    loss_dtype = input.dtype if dtype is None else dtype
    if target.shape == input.shape:
        _check_class_probabilities(target, ignore_index)
        for other in (target, weight):
            if dtype is None and other is not None:
                loss_dtype = torch.promote_types(loss_dtype, other.dtype)
    else:
        arguments = (target, weight, operator.index(ignore_index), loss_dtype)
        counts, index = counts_and_index(input, *arguments)

    x = input.to(compute_dtype(input.dtype if dtype is None else dtype))
    shift, sum_exp = max_and_sum_exp(x, class_dim)
    log_probs = x - shift - sum_exp.log()
    if target.shape == input.shape:
        q = _smooth(target.to(compute_dtype(loss_dtype)), weight, label_smoothing)
        losses = -(q * log_probs).sum(class_dim)
        total_weight = x.new_full((), losses.numel() if input.numel() else torch.nan)
    else:
        row_weights = weights_of_rows(log_probs, counts, index, weight)
        losses = -row_weights * (1 - label_smoothing) * gather_class(log_probs, index)
        if label_smoothing > 0:
            smooth = log_probs if weight is None else log_probs * per_class(weight, input)
            losses = losses - _uniform(input, label_smoothing) * smooth.sum(class_dim)
        losses = losses.where(counts, 0)
        total_weight = row_weights.sum()
    loss = reduce(losses, total_weight, reduction).to(loss_dtype)
    if not keep:
        return loss, None, None, total_weight
    lse = torch.stack([shift.squeeze(class_dim), sum_exp.squeeze(class_dim)])
    return loss, input.clone(), lse, total_weight


def _check_class_probabilities(target: Tensor, ignore_index: int) -> None:
    if not target.is_floating_point():
        raise RuntimeError(
            f"Expected floating point type for target with class probabilities, got {target.dtype}"
        )
    if ignore_index >= 0:
        raise RuntimeError("ignore_index is not supported for floating point target")


def _uniform(input: Tensor, label_smoothing: float) -> float:
    """What label smoothing adds to each class."""
    return label_smoothing / max(input.shape[class_dim_of(input)], 1)


def _smooth(distribution: Tensor, weight: Tensor | None, label_smoothing: float) -> Tensor:
    """A distribution over the classes, mixed with the uniform one, times the class weights."""
    smooth = distribution * (1 - label_smoothing) + _uniform(distribution, label_smoothing)
    return smooth if weight is None else smooth * per_class(weight, distribution)


def distribution(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The distribution ``q`` over each row's classes, zero in ignored rows; and which rows count,
    shaped to broadcast against it."""
    if target.shape == input.shape:
        q = _smooth(widened(target, dtype), weight, label_smoothing)
        return q, torch.ones((), dtype=torch.bool, device=input.device)
    # The forward has checked that the weight has the loss's dtype.
    loss_dtype = None if weight is None else weight.dtype
    counts, index = counts_and_index(input, target, weight, ignore_index, loss_dtype)
    q = _smooth(is_class_of_row(input, counts, index).to(dtype), weight, label_smoothing)
    counts = counts.unsqueeze(class_dim_of(input))
    return q.where(counts, 0), counts


def _kept_softmax(
    kept: Tensor,
    lse: Tensor | None,
    q: Tensor,
    total: Tensor,
    total_weight: Tensor,
    reduction: str,
) -> Tensor:
    """The softmax of the logits, from what the forward kept: the logits may have changed since.

    Args:
        kept: the logits if there is an ``lse``, else the gradient ``softmax * total - q``, divided
            by ``total_weight`` for the mean.
        q: the target's distribution.
        total: the sum of ``q`` per row.
    """
    if lse is not None:
        return log_softmax(kept.to(total_weight.dtype), class_dim_of(kept)).exp()
    gradient = kept * total_weight if reduction == "mean" else kept
    # Where q sums to 0 the gradient neither determines the softmax nor depends on it.
    has_softmax = total != 0
    return ((gradient + q) / total.where(has_softmax, 1)).where(has_softmax, 0)


def cross_entropy_backward(
    grad_output: Tensor,
    kept: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor | None,
    total_weight: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    """``g * (softmax(input) * sum(q) - q)``, the gradient of the input of ``cross_entropy``; see
    :func:`fastnn.functional.cross_entropy`.

    Args:
        grad_output: the gradient ``g`` of the loss.
        kept, lse, total_weight: from a kernel's forward, or the reference's.

    >>> import torch
    >>> from fastnn import reference
    >>> input, targets, options = torch.zeros(1, 2), (torch.tensor([1]), None), (-100, "mean", 0.0)
    >>> _, kept, *others = reference.cross_entropy_forward(input, *targets, *options, keep=True)
    >>> reference.cross_entropy_backward(torch.tensor(1.0), kept, *targets, *others, *options)
    tensor([[ 0.5000, -0.5000]])
    """
    q, counts = distribution(
        kept, target, weight, ignore_index, label_smoothing, total_weight.dtype
    )
    total = q.sum(class_dim_of(kept), keepdim=True)
    softmax = _kept_softmax(kept, lse, q, total, total_weight, reduction)
    # The mean over no rows is NaN; differentiating the product would multiply zeros by it.
    grad_rows = grad_per_row(grad_output, kept, total_weight, reduction).where(counts, 0)
    return (grad_rows * (softmax * total - q)).where(counts, 0).to(kept.dtype)


def cross_entropy_kept_backward(
    grad_kept: Tensor,
    kept: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor | None,
    total_weight: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    """The gradient of ``cross_entropy``'s input from the gradient of ``kept``, for derivatives of
    higher order; see :func:`fastnn.functional.cross_entropy`. The Jacobian of ``kept`` is
    symmetric, so this also computes its tangent.

    Args:
        grad_kept: the gradient of ``kept``, or the tangent of the input.
        kept, lse, total_weight: from a kernel's forward, or the reference's.

    >>> import torch
    >>> from fastnn import reference
    >>> gradient, targets = torch.tensor([[0.5, -0.5]]), (torch.tensor([1]), None)
    >>> kept = gradient, *targets, None, torch.tensor(1.0), -100, "mean", 0.0
    >>> reference.cross_entropy_kept_backward(torch.tensor([[1.0, 0.0]]), *kept)
    tensor([[ 0.2500, -0.2500]])
    """
    if lse is not None:  # a copy of the input
        return grad_kept
    class_dim = class_dim_of(kept)
    q, counts = distribution(kept, target, weight, ignore_index, label_smoothing, kept.dtype)
    total = q.sum(class_dim, keepdim=True)
    softmax = _kept_softmax(kept, lse, q, total, total_weight, reduction)
    grad = softmax * (grad_kept - (softmax * grad_kept).sum(class_dim, keepdim=True)) * total
    grad = grad / nan_for_zero(total_weight) if reduction == "mean" else grad
    return grad.where(counts, 0)


def cross_entropy_target_backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    total_weight: Tensor,
    reduction: str,
    label_smoothing: float,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the class probabilities and class weights of ``cross_entropy``; see
    :func:`fastnn.functional.cross_entropy`.

    Args:
        grad_output: the gradient of the loss.
        total_weight: the forward's.

    >>> import torch
    >>> from fastnn import reference
    >>> arguments = torch.zeros(1, 2), torch.tensor([[0.5, 0.5]]), None, torch.tensor(1.0)
    >>> reference.cross_entropy_target_backward(torch.tensor(1.0), *arguments, "mean", 0.0)
    (tensor([[0.6931, 0.6931]]), None)
    """
    class_dim = class_dim_of(input)
    grad_rows = grad_per_row(grad_output, input, total_weight, reduction)
    grad_q = -grad_rows * log_softmax(input.to(total_weight.dtype), class_dim)
    if weight is None:
        return (grad_q * (1 - label_smoothing)).to(target.dtype), None
    grad_target = (grad_q * per_class(weight, input) * (1 - label_smoothing)).to(target.dtype)
    q = _smooth(widened(target, total_weight.dtype), None, label_smoothing)
    rows = [dim for dim in range(input.dim()) if dim != class_dim]
    grad_weight = grad_q * q
    grad_weight = grad_weight.sum(rows) if rows else grad_weight  # sum([]) sums over all
    return grad_target, grad_weight.to(weight.dtype)

"""``linear_cross_entropy``, with all logits in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnn.reference._cross_entropy import cross_entropy_forward, distribution
from fastnn.reference._dtypes import compute_dtype
from fastnn.reference._log_softmax import log_softmax
from fastnn.reference._losses import (
    check_reduction,
    class_dim_of,
    counts_and_index,
    grad_per_row,
    nan_for_zero,
    weights_of_rows,
)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    normalizer: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``cross_entropy(input @ linear_weight.T + linear_bias, target)``; see
    :func:`fastnn.functional.linear_cross_entropy`.

    Args:
        input: ``(D)`` or ``(N, D)``.
        linear_weight: ``(C, D)``.
        dtype: of the loss, and of ``weight`` and class probabilities (default: the input's).

    >>> import torch
    >>> from fastnn import reference
    >>> reference.linear_cross_entropy(torch.ones(1, 2), torch.zeros(2, 2), torch.tensor([1]))
    tensor(0.6931)
    """
    arguments = (input, linear_weight, target, linear_bias, weight, reduction, ignore_index)
    options = (label_smoothing, softcap, logit_scale, z_loss, normalizer, dtype)
    return linear_cross_entropy_forward(*arguments, *options, [False, False, False])[0]


def linear_cross_entropy_forward(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    z_loss: float,
    normalizer: Tensor | None,
    dtype: torch.dtype | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The loss, and what the backward needs; see :func:`fastnn.functional.linear_cross_entropy`.

    Args:
        dtype: of the loss, ``weight`` and class probabilities; None for the input's.
        output_mask: which gradients are wanted: of input, weight and bias.

    Returns:
        The loss; the gradients, each None if it is not wanted; and each row's log-sum-exp in two
        parts. Without a reduction there is a log-sum-exp and no gradients, otherwise the reverse.

    >>> import torch
    >>> from fastnn import reference
    >>> head = torch.ones(1, 2), torch.zeros(2, 2), torch.tensor([1]), None
    >>> options = None, "sum", -100, 0.0, None, 1.0, 0.0, None, None
    >>> reference.linear_cross_entropy_forward(*head, *options, [False, True, False])[2]
    tensor([[ 0.5000,  0.5000],
            [-0.5000, -0.5000]])
    """
    _check_head(input, linear_weight, linear_bias)
    check_reduction(reduction, normalizer)
    loss_dtype = input.dtype if dtype is None else dtype
    logits, _ = _logits_and_slope(input, linear_weight, linear_bias, softcap, logit_scale)
    is_index = target.shape != logits.shape
    if is_index and weight is not None and weight.dtype != loss_dtype:
        raise RuntimeError(f"expected weight to have dtype {loss_dtype}, but got {weight.dtype}")
    options = (ignore_index, "none", label_smoothing)
    widened = None if weight is None else weight.to(logits.dtype)
    losses, _, lse, total = cross_entropy_forward(logits, target, widened, *options, keep=True)
    assert lse is not None
    lse = torch.stack([lse[0], lse[1].log()])
    if z_loss != 0:
        squares = z_loss * lse.sum(0).square()
        if is_index:
            squares = squares.where(_counts(logits, target, ignore_index), 0)
        losses = losses + squares
    if reduction == "none":
        return losses.to(loss_dtype), None, None, None, lse
    if normalizer is not None:
        total = normalizer.to(logits.dtype)
    elif reduction == "mean":
        total = nan_for_zero(total)
    else:
        total = torch.ones_like(total)
    if not any(output_mask):
        return (losses.sum() / total).to(loss_dtype), None, None, None, None
    grad_logits = linear_cross_entropy_logits_backward(
        *(torch.ones_like(total), input, linear_weight, target, linear_bias, weight, reduction),
        *(ignore_index, label_smoothing, softcap, logit_scale, z_loss, normalizer),
    )
    gradients = _gradients_of_head(grad_logits, input, linear_weight, output_mask)
    return (losses.sum() / total).to(loss_dtype), *gradients, None


def linear_cross_entropy_backward(
    grad_output: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    z_loss: float,
    dtype: torch.dtype | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of input, weight and bias of an unreduced ``linear_cross_entropy``; see
    :func:`fastnn.functional.linear_cross_entropy`.

    Args:
        grad_output: the gradient of each row's loss.
        lse: the forward's; unused here.
        dtype: the forward's.
        output_mask: which gradients are wanted: of input, weight and bias.

    >>> import torch
    >>> from fastnn import reference
    >>> head = torch.ones(1, 2), torch.zeros(2, 2), torch.tensor([1]), None
    >>> rest = None, torch.zeros(2, 1), -100, 0.0, None, 1.0, 0.0, None, [False, True, False]
    >>> reference.linear_cross_entropy_backward(torch.ones(1), *head, *rest)[1]
    tensor([[ 0.5000,  0.5000],
            [-0.5000, -0.5000]])
    """
    options = (ignore_index, label_smoothing, softcap, logit_scale, z_loss, None, output_mask)
    return linear_cross_entropy_gradients(
        grad_output, input, linear_weight, target, linear_bias, weight, "none", *options
    )


def linear_cross_entropy_gradients(
    grad_output: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    z_loss: float,
    normalizer: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of input, weight and bias of ``linear_cross_entropy``; see
    :func:`fastnn.functional.linear_cross_entropy`.

    Args:
        grad_output: the gradient of the loss.
        output_mask: which gradients are wanted: of input, weight and bias.

    >>> import torch
    >>> from fastnn import reference
    >>> head = torch.ones(1, 2), torch.zeros(2, 2), torch.tensor([1]), None
    >>> rest = None, "sum", -100, 0.0, None, 1.0, 0.0, None, [False, True, False]
    >>> reference.linear_cross_entropy_gradients(torch.tensor(1.0), *head, *rest)[1]
    tensor([[ 0.5000,  0.5000],
            [-0.5000, -0.5000]])
    """
    grad_logits = linear_cross_entropy_logits_backward(
        *(grad_output, input, linear_weight, target, linear_bias, weight, reduction),
        *(ignore_index, label_smoothing, softcap, logit_scale, z_loss, normalizer),
    )
    gradients = _gradients_of_head(grad_logits, input, linear_weight, output_mask)
    grad_input, grad_weight, grad_bias = (
        None if gradient is None else gradient.to(input.dtype) for gradient in gradients
    )
    return grad_input, grad_weight, grad_bias


def linear_cross_entropy_logits_backward(
    grad_output: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    z_loss: float,
    normalizer: Tensor | None = None,
) -> Tensor:
    """The gradient of the logits ``input @ linear_weight.T + linear_bias`` before scale and cap, in
    the dtype of the computation; see :func:`fastnn.functional.linear_cross_entropy`.

    Args:
        grad_output: the gradient of the loss.

    >>> import torch
    >>> from fastnn import reference
    >>> head = torch.ones(1, 2), torch.zeros(2, 2), torch.tensor([1]), None
    >>> options = None, "sum", -100, 0.0, None, 1.0, 0.0
    >>> reference.linear_cross_entropy_logits_backward(torch.tensor(1.0), *head, *options)
    tensor([[ 0.5000, -0.5000]])
    """
    logits, slope = _logits_and_slope(input, linear_weight, linear_bias, softcap, logit_scale)
    class_dim = class_dim_of(logits)
    weight = None if weight is None else weight.to(logits.dtype)
    q, counts = distribution(logits, target, weight, ignore_index, label_smoothing, logits.dtype)
    total = q.sum(class_dim, keepdim=True)
    if z_loss != 0:
        total = total + 2 * z_loss * logits.logsumexp(class_dim, keepdim=True)
    derivative = log_softmax(logits, class_dim).exp() * total - q
    divisor = logits.new_ones(())
    if normalizer is not None:
        divisor, reduction = normalizer.to(logits.dtype), "sum"
    elif reduction == "mean" and target.shape == logits.shape:
        divisor = logits.new_full((), logits.numel() // max(logits.shape[class_dim], 1))
    elif reduction == "mean":
        divisor = weights_of_rows(
            logits, *counts_and_index(logits, target, None, ignore_index), weight
        )
        divisor = divisor.sum()
    grad_rows = grad_per_row(grad_output, logits, divisor, reduction)
    if reduction == "sum":
        grad_rows = grad_rows / divisor
    # The mean over no rows is NaN; differentiating the product would multiply zeros by it.
    return (grad_rows.where(counts, 0) * derivative).where(counts, 0) * slope


def _check_head(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    if input.dim() not in (1, 2):
        raise RuntimeError(f"expected input with dimensionality 1 or 2, got {input.dim()}")
    if linear_weight.dim() != 2:
        raise RuntimeError(
            f"expected linear_weight with dimensionality 2, got {linear_weight.dim()}"
        )
    for name, other in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if other is not None and other.dtype != input.dtype:
            raise RuntimeError(
                f"expected {name} to have dtype {input.dtype}, but got {other.dtype}"
            )


def _counts(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Which rows count, for class indices."""
    counts = target != ignore_index
    return counts.reshape(()) if logits.dim() == 1 else counts


def _logits_and_slope(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor | float]:
    """The logits, scaled and capped, and their derivative with respect to the layer's output."""
    dtype = compute_dtype(input.dtype)
    bias = None if linear_bias is None else linear_bias.to(dtype)
    logits = torch.nn.functional.linear(input.to(dtype), linear_weight.to(dtype), bias)
    if logit_scale != 1:
        logits = logits * logit_scale
    if softcap is None:
        return logits, logit_scale
    tanh = (logits / softcap).tanh()
    return tanh * softcap, (1 - tanh * tanh) * logit_scale


def _gradients_of_head(
    grad_logits: Tensor, input: Tensor, linear_weight: Tensor, output_mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of a linear layer's input, weight and bias, in the dtype of ``grad_logits``."""
    x, w = input.to(grad_logits.dtype), linear_weight.to(grad_logits.dtype)
    rows, inputs = (t.unsqueeze(0) if t.dim() == 1 else t for t in (grad_logits, x))
    return (
        grad_logits @ w if output_mask[0] else None,
        rows.T @ inputs if output_mask[1] else None,
        rows.sum(0) if output_mask[2] else None,
    )

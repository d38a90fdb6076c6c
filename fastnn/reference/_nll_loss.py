"""``nll_loss``."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from fastnn.reference._dtypes import compute_dtype
from fastnn.reference._losses import (
    check_loss_arguments,
    class_dim_of,
    counts_and_index,
    gather_class,
    grad_per_row,
    is_class_of_row,
    reduce,
    weights_of_rows,
)


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``-weight[target] * input[target]`` per row; see :func:`fastnn.functional.nll_loss`.

    Args:
        dtype: of the loss, as if input and weight were cast to it first (default: the input's).

    >>> import torch
    >>> from fastnn import reference
    >>> reference.nll_loss(torch.tensor([[-1.0, -2.0]]), torch.tensor([1]))
    tensor(2.)
    """
    return nll_loss_forward(input, target, weight, ignore_index, reduction, dtype)[0]


def nll_loss_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss, and the total weight of the rows that count, by which ``'mean'`` divides; see
    :func:`fastnn.functional.nll_loss`.

    Args:
        dtype: of the loss, as if input and weight were cast to it first (default: the input's).

    >>> import torch
    >>> from fastnn import reference
    >>> log_probs, target = torch.tensor([[-1.0, -2.0]] * 2), torch.tensor([1, -100])
    >>> reference.nll_loss_forward(log_probs, target, None, -100, "mean")
    (tensor(2.), tensor(1.))
    """
    check_loss_arguments(input, weight, reduction)
    loss_dtype = input.dtype if dtype is None else dtype
    arguments = (target, weight, operator.index(ignore_index), loss_dtype)
    counts, index = counts_and_index(input, *arguments)
    log_probs = input.to(compute_dtype(loss_dtype))
    row_weights = weights_of_rows(log_probs, counts, index, weight)
    losses = (-row_weights * gather_class(log_probs, index)).where(counts, 0)
    total_weight = row_weights.sum()
    return reduce(losses, total_weight, reduction).to(loss_dtype), total_weight


def nll_loss_backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    total_weight: Tensor,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """The gradient of the input of ``nll_loss``; see :func:`fastnn.functional.nll_loss`.

    Args:
        grad_output: the gradient of the loss.
        total_weight: the forward's.

    >>> import torch
    >>> from fastnn import reference
    >>> arguments = torch.tensor([[-1.0, -2.0]]), torch.tensor([1]), None
    >>> _, total = reference.nll_loss_forward(*arguments, -100, "mean")
    >>> reference.nll_loss_backward(torch.tensor(1.0), *arguments, total, -100, "mean")
    tensor([[ 0., -1.]])
    """
    counts, index = counts_and_index(input, target, weight, ignore_index, grad_output.dtype)
    row_weights = weights_of_rows(total_weight, counts, index, weight).unsqueeze(
        class_dim_of(input)
    )
    grad_rows = -row_weights * grad_per_row(grad_output, input, total_weight, reduction)
    # These zeros depend on the input for autograd, as those of PyTorch's gradient do.
    zeros = input.masked_fill(torch.ones((), dtype=torch.bool, device=input.device), 0)
    return grad_rows.where(is_class_of_row(input, counts, index), zeros).to(input.dtype)

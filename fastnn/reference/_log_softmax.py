"""``log_softmax``."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from fastnn.reference._dtypes import compute_dtype


def log_softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """``x - max - log(sum(exp(x - max)))``; see :func:`fastnn.functional.log_softmax`.

    Args:
        dtype: of the output, as if the input were cast to it first (default: the input's).

    >>> import torch
    >>> from fastnn import reference
    >>> reference.log_softmax(torch.zeros(2), 0).exp()
    tensor([0.5000, 0.5000])
    """
    dim = operator.index(dim)  # torch 2.9 reduces over all dimensions if it is a tensor
    if not input.is_floating_point():
        raise NotImplementedError(f'"log_softmax" not implemented for {input.dtype}')
    dtype = input.dtype if dtype is None else dtype
    x = input.to(compute_dtype(dtype))
    shift, sum_exp = max_and_sum_exp(x, dim)
    return (x - shift - sum_exp.log()).to(dtype).contiguous()


def log_softmax_backward(
    grad_output: Tensor, output: Tensor, dim: int, dtype: torch.dtype | None = None
) -> Tensor:
    """``g - exp(output) * sum(g)``, the gradient of ``log_softmax``; see
    :func:`fastnn.functional.log_softmax`.

    Args:
        grad_output: the gradient ``g`` of the output.
        output: the forward's.
        dtype: of the input (default: the output's).

    >>> import torch
    >>> from fastnn import reference
    >>> output = reference.log_softmax(torch.zeros(2), 0)
    >>> reference.log_softmax_backward(torch.tensor([1.0, 0.0]), output, 0)
    tensor([ 0.5000, -0.5000])
    """
    sums = compute_dtype(output.dtype)
    grad = grad_output.to(sums)
    grad_input = grad - output.to(sums).exp() * grad.sum(dim, keepdim=True)
    return grad_input.to(output.dtype if dtype is None else dtype)


def max_and_sum_exp(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The maximum along a dimension, and ``sum(exp(x - max))``."""
    # The maximum cancels in the formula and needs no gradient; amax() over nothing raises.
    shift = x.detach().amax(dim, keepdim=True) if x.numel() else x.detach().sum(dim, keepdim=True)
    return shift, (x - shift).exp().sum(dim, keepdim=True)

"""``linear`` and ``linear_relu``."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from fastnn.reference._dtypes import compute_dtype


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``input @ weight.T + bias``; see :func:`fastnn.functional.linear`.

    >>> import torch
    >>> from fastnn import reference
    >>> reference.linear(torch.ones(1, 2), torch.tensor([[1.0, 2.0], [-1.0, 0.0]]))
    tensor([[ 3., -1.]])
    """
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and other.dtype != input.dtype:
            raise RuntimeError(
                f"expected {name} to have dtype {input.dtype}, but got {other.dtype}"
            )
    dtype = compute_dtype(input.dtype)
    bias = bias if bias is None else bias.to(dtype)
    output = torch.nn.functional.linear(input.to(dtype), weight.to(dtype), bias)
    return output.to(input.dtype).contiguous()


def linear_backward(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the three arguments of ``linear``; see :func:`fastnn.functional.linear`.

    Args:
        grad_output: the gradient of the output.
        input: the forward's; None is allowed if the gradient of ``weight`` is not wanted.
        weight: the forward's; None is allowed if the gradient of ``input`` is not wanted.
        output_mask: which of the three gradients are wanted; None is returned for the others.

    >>> import torch
    >>> from fastnn import reference
    >>> x, w = torch.ones(1, 2), torch.tensor([[1.0, 2.0], [-1.0, 0.0]])
    >>> reference.linear_backward(torch.ones(1, 2), x, w, [True, False, False])
    (tensor([[0., 2.]]), None, None)
    """
    dtype = compute_dtype(grad_output.dtype)
    grad = grad_output.to(dtype)
    rows = _matrix_of_rows(grad)
    grad_input = grad_weight = grad_bias = None
    if output_mask[0] and weight is not None:
        grad_input = (grad @ weight.to(dtype)).to(grad_output.dtype)
    if output_mask[1] and input is not None:
        grad_weight = (rows.T @ _matrix_of_rows(input).to(dtype)).to(grad_output.dtype)
    if output_mask[2]:
        grad_bias = rows.sum(0).to(grad_output.dtype)
    return grad_input, grad_weight, grad_bias


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``max(input @ weight.T + bias, 0)``; see :func:`fastnn.functional.linear_relu`.

    >>> import torch
    >>> from fastnn import reference
    >>> reference.linear_relu(torch.ones(1, 2), torch.tensor([[1.0, 2.0], [-1.0, 0.0]]))
    tensor([[3., 0.]])
    """
    return linear(input, weight, bias).relu()


def linear_relu_backward(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    output: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the three arguments of ``linear_relu``; see
    :func:`fastnn.functional.linear_relu`.

    Args:
        grad_output: the gradient of the output.
        input: the forward's; None is allowed if the gradient of ``weight`` is not wanted.
        weight: the forward's; None is allowed if the gradient of ``input`` is not wanted.
        output: the forward's.
        output_mask: which of the three gradients are wanted; None is returned for the others.

    >>> import torch
    >>> from fastnn import reference
    >>> x, w = torch.ones(1, 2), torch.tensor([[1.0, 2.0], [-1.0, 0.0]])
    >>> y = reference.linear_relu(x, w)
    >>> reference.linear_relu_backward(torch.ones(1, 2), x, w, y, [True, False, False])
    (tensor([[1., 2.]]), None, None)
    """
    # The gradient passes where the output is NaN, as in torch.
    grad_linear = grad_output.masked_fill(output <= 0, 0)
    return linear_backward(grad_linear, input, weight, output_mask)


def _matrix_of_rows(tensor: Tensor) -> Tensor:
    """Flattens all leading dimensions into one."""
    # Sizes are given, not inferred: reshape(-1, 0) is ambiguous.
    return tensor.reshape(prod(tensor.shape[:-1]), tensor.shape[-1])

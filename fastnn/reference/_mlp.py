"""``mlp``, a chain of linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from fastnn.reference._linear import linear, linear_backward, linear_relu


def mlp(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    relu: Sequence[bool],
) -> Tensor:
    """Linear layers in a row; see :func:`fastnn.functional.mlp`.

    Args:
        input: the first layer's input.
        weights: each layer's weight.
        biases: each layer's bias, or None.
        relu: whether each layer has a ReLU after it.

    >>> import torch
    >>> from fastnn import reference
    >>> w = torch.tensor([[1.0, 2.0], [-1.0, 0.0]])
    >>> reference.mlp(torch.ones(1, 2), [w, w], [None, None], [True, False])
    tensor([[ 3., -3.]])
    """
    return mlp_forward(input, weights, biases, relu)[-1]


def mlp_forward(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    relu: Sequence[bool],
) -> list[Tensor]:
    """The outputs of all layers; for the arguments see :func:`fastnn.reference.mlp`.

    >>> import torch
    >>> from fastnn import reference
    >>> w = torch.tensor([[1.0, 2.0], [-1.0, 0.0]])
    >>> reference.mlp_forward(torch.ones(1, 2), [w, w], [None, None], [True, False])
    [tensor([[3., 0.]]), tensor([[ 3., -3.]])]
    """
    outputs: list[Tensor] = []
    for weight, bias, has_relu in zip(weights, biases, relu, strict=True):
        layer = linear_relu if has_relu else linear
        outputs.append(layer(outputs[-1] if outputs else input, weight, bias))
    return outputs


def mlp_backward(
    grad_output: Tensor,
    inputs: Sequence[Tensor | None],
    weights: Sequence[Tensor | None],
    output: Tensor | None,
    relu: Sequence[bool],
    output_mask: Sequence[bool],
) -> list[Tensor]:
    """The gradients of ``mlp``; see :func:`fastnn.functional.mlp`.

    Args:
        grad_output: the gradient of the output.
        inputs: each layer's input; None if neither the gradient of its weight nor the mask of the
            ReLU before it is needed.
        weights: each layer's weight; None if the gradient goes no further.
        output: the last layer's output; None if no ReLU follows it.
        relu: whether each layer has a ReLU after it.
        output_mask: which gradients are wanted: of the input, of each weight, of each bias.

    Returns:
        The wanted gradients, in that order.

    >>> import torch
    >>> from fastnn import reference
    >>> x, w = torch.ones(1, 2), torch.tensor([[1.0, 2.0], [-1.0, 0.0]])
    >>> hidden = reference.linear_relu(x, w)
    >>> mask = [True, False, False, False, False]
    >>> reference.mlp_backward(torch.ones(1, 2), [x, hidden], [w, w], None, [True, False], mask)
    [tensor([[0., 0.]])]
    """
    layers = len(weights)
    of_input, *of_parameters = output_mask
    of_weights, of_biases = of_parameters[:layers], of_parameters[layers:]
    wanted = [w or b for w, b in zip(of_weights, of_biases, strict=True)]
    first = 0 if of_input else [*wanted, True].index(True)
    outputs = [*inputs[1:], output]
    grad, weight_grads, bias_grads = grad_output, [], []
    for i in reversed(range(first, layers)):
        mask = [of_input or i > first, of_weights[i], of_biases[i]]
        if relu[i]:
            grad = grad.masked_fill(cast(Tensor, outputs[i]) <= 0, 0)
        of_layer = linear_backward(grad, inputs[i], weights[i], mask)
        weight_grads += [of_layer[1]] * of_weights[i]
        bias_grads += [of_layer[2]] * of_biases[i]
        grad = cast(Tensor, of_layer[0])
    grads = [*[grad] * of_input, *reversed(weight_grads), *reversed(bias_grads)]
    return cast("list[Tensor]", grads)

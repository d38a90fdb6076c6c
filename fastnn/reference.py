"""Each operator in plain PyTorch, written from its formula: the tests' oracle, and the fallback if
the extension is not built.

The functions have the signatures and semantics of the operators (``torch.ops.fastnn.*``), for any
floating-point dtype: float16 and bfloat16 are computed in float32 and rounded once. The backward
functions are differentiable themselves, and all support :func:`torch.vmap`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from math import prod
from typing import cast

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastnn._torch import running_transform

__all__ = [
    "cross_entropy",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "cross_entropy_kept_backward",
    "cross_entropy_target_backward",
    "linear",
    "linear_backward",
    "linear_cross_entropy",
    "linear_cross_entropy_backward",
    "linear_cross_entropy_forward",
    "linear_cross_entropy_gradients",
    "linear_cross_entropy_logits_backward",
    "linear_relu",
    "linear_relu_backward",
    "log_softmax",
    "log_softmax_backward",
    "mlp",
    "mlp_backward",
    "mlp_forward",
    "nll_loss",
    "nll_loss_backward",
    "nll_loss_forward",
    "sgd_step_",
]

_COMPUTE_DTYPE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return _COMPUTE_DTYPE.get(dtype, dtype)


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
    dtype = _compute_dtype(input.dtype)
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
    dtype = _compute_dtype(grad_output.dtype)
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
        inputs: each layer's input; None if neither the gradient of its weight is wanted nor the
            mask of the ReLU before it.
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


def _matrix_of_rows(tensor: Tensor) -> Tensor:
    """Flattens all leading dimensions into one."""
    # Sizes are given, not inferred: reshape(-1, 0) is ambiguous.
    return tensor.reshape(prod(tensor.shape[:-1]), tensor.shape[-1])


def log_softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """``x - max - log(sum(exp(x - max)))``; see :func:`fastnn.functional.log_softmax`.

    Args:
        dtype: of the output, as if the input were cast to it first (default: the input's).

    >>> import torch
    >>> from fastnn import reference
    >>> reference.log_softmax(torch.zeros(2), 0).exp()
    tensor([0.5000, 0.5000])
    """
    dim = operator.index(dim)  # torch 2.9 reduces over everything if it is a tensor
    if not input.is_floating_point():
        raise NotImplementedError(f'"log_softmax" not implemented for {input.dtype}')
    dtype = input.dtype if dtype is None else dtype
    x = input.to(_compute_dtype(dtype))
    shift, sum_exp = _max_and_sum_exp(x, dim)
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
    sums = _compute_dtype(output.dtype)
    grad = grad_output.to(sums)
    grad_input = grad - output.to(sums).exp() * grad.sum(dim, keepdim=True)
    return grad_input.to(output.dtype if dtype is None else dtype)


def _max_and_sum_exp(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The maximum along a dimension, by index, and ``sum(exp(x - max))``."""
    # The maximum cancels in the formula and needs no gradient; amax() over nothing raises.
    shift = x.detach().amax(dim, keepdim=True) if x.numel() else x.detach().sum(dim, keepdim=True)
    return shift, (x - shift).exp().sum(dim, keepdim=True)


def _class_dim(input: Tensor) -> int:
    return 0 if input.dim() == 1 else 1


def _per_class(weight: Tensor, input: Tensor) -> Tensor:
    """The class weights, shaped to broadcast against the input."""
    shape = [1] * input.dim()
    shape[_class_dim(input)] = -1
    return weight.view(shape)


def _check_loss_arguments(input: Tensor, weight: Tensor | None, reduction: str) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if input.dim() < 1:
        raise ValueError("Expected 1 or more dimensions in input (got 0)")
    if not input.is_floating_point():
        raise NotImplementedError(f"input must be floating-point, got {input.dtype}")
    classes = input.shape[_class_dim(input)]
    if weight is not None and weight.shape != (classes,):
        raise RuntimeError(
            f"weight tensor should be defined either for all {classes} classes or no classes "
            f"but got weight tensor of shape: {list(weight.shape)}"
        )


def _check_class_indices(
    input: Tensor, target: Tensor, weight: Tensor | None, loss_dtype: torch.dtype
) -> None:
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"expected target dtype to be Long or Byte, but got {target.dtype}")
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("weight of class indices is not differentiable: it requires a gradient")
    if weight is not None and weight.dtype != loss_dtype:
        raise RuntimeError(f"expected weight to have dtype {loss_dtype}, but got {weight.dtype}")
    if input.dim() == 1:
        if tuple(target.shape) not in ((), (1,)):
            raise ValueError(f"Expected target size [], got {list(target.shape)}")
        return
    if target.dim() == 0 or target.shape[0] != input.shape[0]:
        raise ValueError(
            f"Expected input batch_size ({input.shape[0]}) to match target batch_size "
            f"({target.shape[0] if target.dim() else 0})."
        )
    if target.shape[1:] != input.shape[2:]:
        expected = [input.shape[0], *input.shape[2:]]
        raise RuntimeError(f"Expected target size {expected}, got {list(target.shape)}")


def _counts_and_index(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    loss_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Which rows count, and a valid class index for every row."""
    _check_class_indices(input, target, weight, input.dtype if loss_dtype is None else loss_dtype)
    target = target.long()
    if input.dim() == 1:
        target = target.reshape(())
    counts = target != ignore_index
    # On another device this would synchronise; there torch's gather or index_select asserts.
    has_values = target.is_cpu and not is_compiling() and running_transform() is None
    if not has_values:
        return counts, target.where(counts, 0)
    classes = input.shape[_class_dim(input)]
    bad = target[counts & ((target < 0) | (target >= classes))]
    if bad.numel():
        raise IndexError(
            f"Target {int(bad[0])} is out of bounds: input has {classes} classes, so that a "
            f"target must be in [0, {classes}) or equal ignore_index ({ignore_index})."
        )
    return counts, target.where(counts, 0)


def _reduce(losses: Tensor, total_weight: Tensor, reduction: str) -> Tensor:
    """The losses per row, their sum, or their sum divided by ``total_weight``."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / _nan_for_zero(total_weight)


def _grad_per_row(
    grad_output: Tensor, input: Tensor, total_weight: Tensor, reduction: str
) -> Tensor:
    """The gradient of each row's loss, shaped to broadcast against the input."""
    grad = grad_output.to(total_weight.dtype)
    if reduction == "none":
        return grad.unsqueeze(_class_dim(input))
    return grad / _nan_for_zero(total_weight) if reduction == "mean" else grad


def _nan_for_zero(total_weight: Tensor) -> Tensor:
    """NaN for a mean over nothing: the label-smoothing share of its sum needn't be zero."""
    return total_weight.where(total_weight != 0, torch.nan)


def _gather(input: Tensor, index: Tensor) -> Tensor:
    """The input's value at each row's class; zeros if there are no classes."""
    class_dim = _class_dim(input)
    if input.shape[class_dim] == 0:
        return input.sum(class_dim)
    return input.gather(class_dim, index.unsqueeze(class_dim)).squeeze(class_dim)


def _row_weights(input: Tensor, counts: Tensor, index: Tensor, weight: Tensor | None) -> Tensor:
    """The weight of each row's class, zero for ignored rows."""
    if weight is None or weight.numel() == 0:
        return counts.to(input.dtype)
    weights = weight.to(input.dtype).index_select(0, index.flatten())
    return weights.view(index.shape).where(counts, 0)


def _is_class(input: Tensor, counts: Tensor, index: Tensor) -> Tensor:
    """A mask in the input's shape: whether an element is its row's class and the row counts."""
    class_dim = _class_dim(input)
    classes = torch.arange(input.shape[class_dim], device=input.device)
    is_class = index.unsqueeze(class_dim) == _per_class(classes, input)
    return is_class & counts.unsqueeze(class_dim)


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
    _check_loss_arguments(input, weight, reduction)
    loss_dtype = input.dtype if dtype is None else dtype
    arguments = (target, weight, operator.index(ignore_index), loss_dtype)
    counts, index = _counts_and_index(input, *arguments)
    log_probs = input.to(_compute_dtype(loss_dtype))
    row_weights = _row_weights(log_probs, counts, index, weight)
    losses = (-row_weights * _gather(log_probs, index)).where(counts, 0)
    total_weight = row_weights.sum()
    return _reduce(losses, total_weight, reduction).to(loss_dtype), total_weight


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
    counts, index = _counts_and_index(input, target, weight, ignore_index, grad_output.dtype)
    row_weights = _row_weights(total_weight, counts, index, weight).unsqueeze(_class_dim(input))
    grad_rows = -row_weights * _grad_per_row(grad_output, input, total_weight, reduction)
    # These zeros depend on the input for autograd, as those of PyTorch's gradient do.
    zeros = input.masked_fill(torch.ones((), dtype=torch.bool, device=input.device), 0)
    return grad_rows.where(_is_class(input, counts, index), zeros).to(input.dtype)


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
        maximum, and the sum of ``exp(x - max)``), or None twice; the total weight. A kernel that
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
    _check_loss_arguments(input, weight, reduction)
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    class_dim = _class_dim(input)
    loss_dtype = input.dtype if dtype is None else dtype
    if target.shape == input.shape:
        _check_class_probabilities(target, ignore_index)
        for other in (target, weight):
            if dtype is None and other is not None:
                loss_dtype = torch.promote_types(loss_dtype, other.dtype)
    else:
        arguments = (target, weight, operator.index(ignore_index), loss_dtype)
        counts, index = _counts_and_index(input, *arguments)

    x = input.to(_compute_dtype(input.dtype if dtype is None else dtype))
    shift, sum_exp = _max_and_sum_exp(x, class_dim)
    log_probs = x - shift - sum_exp.log()
    if target.shape == input.shape:
        q = _smooth(target.to(_compute_dtype(loss_dtype)), weight, label_smoothing)
        losses = -(q * log_probs).sum(class_dim)
        total_weight = x.new_full((), losses.numel() if input.numel() else torch.nan)
    else:
        row_weights = _row_weights(log_probs, counts, index, weight)
        losses = -row_weights * (1 - label_smoothing) * _gather(log_probs, index)
        if label_smoothing > 0:
            smooth = log_probs if weight is None else log_probs * _per_class(weight, input)
            losses = losses - _uniform(input, label_smoothing) * smooth.sum(class_dim)
        losses = losses.where(counts, 0)
        total_weight = row_weights.sum()
    loss = _reduce(losses, total_weight, reduction).to(loss_dtype)
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
    return label_smoothing / max(input.shape[_class_dim(input)], 1)


def _smooth(distribution: Tensor, weight: Tensor | None, label_smoothing: float) -> Tensor:
    """A distribution over the classes, mixed with the uniform one, times the class weights."""
    smooth = distribution * (1 - label_smoothing) + _uniform(distribution, label_smoothing)
    return smooth if weight is None else smooth * _per_class(weight, distribution)


def _widened(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts to the wider of its own dtype and another."""
    return tensor.to(torch.promote_types(tensor.dtype, dtype))


def _distribution(
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
        q = _smooth(_widened(target, dtype), weight, label_smoothing)
        return q, torch.ones((), dtype=torch.bool, device=input.device)
    # The forward has looked at the weight's dtype, which is the loss's.
    loss_dtype = None if weight is None else weight.dtype
    counts, index = _counts_and_index(input, target, weight, ignore_index, loss_dtype)
    q = _smooth(_is_class(input, counts, index).to(dtype), weight, label_smoothing)
    counts = counts.unsqueeze(_class_dim(input))
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
        return log_softmax(kept.to(total_weight.dtype), _class_dim(kept)).exp()
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
    q, counts = _distribution(
        kept, target, weight, ignore_index, label_smoothing, total_weight.dtype
    )
    total = q.sum(_class_dim(kept), keepdim=True)
    softmax = _kept_softmax(kept, lse, q, total, total_weight, reduction)
    # The mean over no rows is NaN; differentiating the product would multiply zeros by it.
    grad_rows = _grad_per_row(grad_output, kept, total_weight, reduction).where(counts, 0)
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
    class_dim = _class_dim(kept)
    q, counts = _distribution(kept, target, weight, ignore_index, label_smoothing, kept.dtype)
    total = q.sum(class_dim, keepdim=True)
    softmax = _kept_softmax(kept, lse, q, total, total_weight, reduction)
    grad = softmax * (grad_kept - (softmax * grad_kept).sum(class_dim, keepdim=True)) * total
    grad = grad / _nan_for_zero(total_weight) if reduction == "mean" else grad
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
    class_dim = _class_dim(input)
    grad_rows = _grad_per_row(grad_output, input, total_weight, reduction)
    grad_q = -grad_rows * log_softmax(input.to(total_weight.dtype), class_dim)
    if weight is None:
        return (grad_q * (1 - label_smoothing)).to(target.dtype), None
    grad_target = (grad_q * _per_class(weight, input) * (1 - label_smoothing)).to(target.dtype)
    q = _smooth(_widened(target, total_weight.dtype), None, label_smoothing)
    rows = [dim for dim in range(input.dim()) if dim != class_dim]
    grad_weight = grad_q * q
    grad_weight = grad_weight.sum(rows) if rows else grad_weight  # sum([]) sums over all
    return grad_target, grad_weight.to(weight.dtype)


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
        each row's log-sum-exp instead, in two parts.

    >>> import torch
    >>> from fastnn import reference
    >>> head = torch.ones(1, 2), torch.zeros(2, 2), torch.tensor([1]), None
    >>> options = None, "sum", -100, 0.0, None, 1.0, 0.0, None, None
    >>> reference.linear_cross_entropy_forward(*head, *options, [False, True, False])[2]
    tensor([[ 0.5000,  0.5000],
            [-0.5000, -0.5000]])
    """
    _check_head(input, linear_weight, linear_bias)
    if reduction == "none" and normalizer is not None:
        raise ValueError("normalizer takes reduction='mean' or 'sum', but reduction is 'none'")
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
        total = _nan_for_zero(total)
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
    class_dim = _class_dim(logits)
    weight = None if weight is None else weight.to(logits.dtype)
    q, counts = _distribution(logits, target, weight, ignore_index, label_smoothing, logits.dtype)
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
        divisor = _row_weights(
            logits, *_counts_and_index(logits, target, None, ignore_index), weight
        )
        divisor = divisor.sum()
    grad_rows = _grad_per_row(grad_output, logits, divisor, reduction)
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
    dtype = _compute_dtype(input.dtype)
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


def _check_sgd_lists(params: list[Tensor], **lists: list[Tensor]) -> None:
    """Raises unless all parameters are floating-point and each list matches them."""
    for i, param in enumerate(params):
        if not param.is_floating_point():
            raise RuntimeError(f"expected params[{i}] to be floating-point, but got {param.dtype}")
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise RuntimeError(
                f"expected as many {name} as params ({len(params)}), but got {len(tensors)}"
            )
        for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            dtypes = [param.dtype]
            if name == "momentum_buffers" and _compute_dtype(param.dtype) != param.dtype:
                dtypes.append(_compute_dtype(param.dtype))
            if tensor.shape != param.shape or tensor.dtype not in dtypes:
                raise RuntimeError(
                    f"expected {name}[{i}] to have its parameter's dtype "
                    f"{' or '.join(map(str, dtypes))} and shape {list(param.shape)}, but got "
                    f"{tensor.dtype} and {list(tensor.shape)}"
                )


def sgd_step_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    is_first_step: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One in-place SGD step over a list of tensors, by the formula in :class:`torch.optim.SGD`'s
    documentation.

    Args:
        params, grads: floating-point tensors of equal dtypes and shapes; ``params`` is modified.
        momentum_buffers: as ``params``, modified; those of bfloat16 and float16 parameters may be
            float32. Empty if ``momentum`` is zero.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in :class:`torch.optim.SGD`.
        is_first_step: write the buffers without reading them, and apply no dampening.
        grad_scale: one-element tensor by which the gradients are first divided in place.
        found_inf: one-element tensor; if it is nonzero, nothing is changed.

    >>> import torch
    >>> from fastnn import reference
    >>> param = torch.ones(2)
    >>> reference.sgd_step_([param], [torch.ones(2)], [], lr=0.5)
    >>> param
    tensor([0.5000, 0.5000])
    """
    _check_sgd_lists(params, grads=grads)
    if momentum != 0:
        _check_sgd_lists(params, momentum_buffers=momentum_buffers)
    if found_inf is not None and bool(found_inf):
        return
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        dtype = _compute_dtype(param.dtype)
        if grad_scale is not None:
            grad.div_(grad_scale)
        d = -grad.to(dtype) if maximize else grad.to(dtype)
        if weight_decay != 0:  # 0 * inf would be NaN
            d = d + weight_decay * param.to(dtype)
        if momentum != 0:
            buffer = momentum_buffers[i]
            b = d if is_first_step else momentum * buffer.to(dtype) + (1 - dampening) * d
            buffer.copy_(b)
            d = d + momentum * b if nesterov else b
        param.copy_(param.to(dtype) - lr * d)

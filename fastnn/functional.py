"""The operators as functions, with the signatures and semantics of :mod:`torch.nn.functional`.

All take float64, float32, bfloat16 or float16 tensors in any memory layout. Sums are carried in
float32 (float64 for float64 inputs) and the result is rounded once to the input's dtype. Each is
differentiable any number of times with respect to its floating-point input.

Under :class:`torch.autocast` they follow torch's rules: ``linear``, ``linear_relu`` and ``mlp`` run
in autocast's dtype, ``nll_loss`` and ``cross_entropy`` in float32, ``log_softmax`` in float32 on
CUDA and in its input's dtype on the CPU.

A tensor of a class with a ``__torch_dispatch__`` of its own (quantised weights,
:class:`torch.distributed.tensor.DTensor`), or of one whose ``__torch_function__`` refuses these
functions (the weights of per-sample gradients), takes torch's own: ``F.relu(F.linear(...))``.

An argument that is no tensor raises ``TypeError``, one of another dtype, shape or device than the
operator takes ``RuntimeError`` or ``ValueError``, as in torch; the message names the argument.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_unary, has_torch_function_variadic

from fastnn import _tensor_classes
from fastnn._arguments import (
    check_label_smoothing,
    check_linear_arguments,
    check_loss_arguments,
    check_tensor,
    log_softmax_dim,
    loss_reduction,
    mlp_layers,
)
from fastnn._extension import is_tracing, operators
from fastnn._tensor_classes import PLAIN, PLAIN_OR_NONE, ask_classes, call_torch, need_torch

__all__ = ["cross_entropy", "linear", "linear_relu", "log_softmax", "mlp", "nll_loss"]


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""``input @ weight.T + bias``: :func:`torch.nn.functional.linear`.

    The backward computes only the gradients asked for. Autograd keeps what torch keeps: the input
    where the weight wants a gradient, the weight where the input does.

    Args:
        input: ``(*, in_features)``.
        weight: ``(out_features, in_features)``, of the input's dtype and device.
        bias: ``(out_features)``, likewise; or None.

    Returns:
        ``(*, out_features)``, of the input's dtype.

    Raises:
        TypeError: an argument is no tensor.
        RuntimeError: dtypes or devices differ, or the shapes don't fit.

    >>> import torch, fastnn
    >>> x, w, b = torch.randn(4, 3), torch.randn(2, 3), torch.randn(2)
    >>> torch.allclose(fastnn.functional.linear(x, w, b), x @ w.T + b)
    True
    """
    if has_torch_function_variadic(input, weight, bias):
        return ask_classes(linear, F.linear, (input, weight, bias), input, weight, bias=bias)
    if not (type(input) in PLAIN and type(weight) in PLAIN and type(bias) in PLAIN_OR_NONE):
        check_linear_arguments("linear", input, weight, bias)
        if need_torch(input, weight, bias):
            return call_torch(F.linear, input, weight, bias=bias)
    return operators().linear(input, weight, bias)


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""``relu(input @ weight.T + bias)`` in one operator: :func:`torch.nn.functional.linear`
    followed by :func:`torch.nn.functional.relu`.

    The backward takes its mask from the sign of the output, and computes only the gradients asked
    for. Beside the output autograd keeps what torch's linear keeps: the input where the weight
    wants a gradient, the weight where the input does. NaNs pass through.

    Args:
        input: ``(*, in_features)``.
        weight: ``(out_features, in_features)``, of the input's dtype and device.
        bias: ``(out_features)``, likewise; or None.

    Returns:
        ``(*, out_features)``, of the input's dtype.

    Raises:
        TypeError: an argument is no tensor.
        RuntimeError: dtypes or devices differ, or the shapes don't fit.

    >>> import torch, fastnn
    >>> x, w, b = torch.randn(4, 3), torch.randn(2, 3), torch.randn(2)
    >>> torch.allclose(fastnn.functional.linear_relu(x, w, b), torch.relu(x @ w.T + b))
    True
    """
    if has_torch_function_variadic(input, weight, bias):
        tensors = (input, weight, bias)
        return ask_classes(
            linear_relu, _tensor_classes.linear_relu, tensors, input, weight, bias=bias
        )
    if not (type(input) in PLAIN and type(weight) in PLAIN and type(bias) in PLAIN_OR_NONE):
        check_linear_arguments("linear_relu", input, weight, bias)
        if need_torch(input, weight, bias):
            return call_torch(_tensor_classes.linear_relu, input, weight, bias=bias)
    return operators().linear_relu(input, weight, bias)


def mlp(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    activations: Sequence[str | None] | None = None,
) -> Tensor:
    r"""Linear layers in a row, each with a ReLU behind it or not, as one operator: a multilayer
    perceptron.

    Autograd has one node for all of them. Its backward computes only the gradients asked for, and
    hands the gradient from one layer's product to the next, which has the ReLU's mask applied to
    it. It keeps what torch keeps: a layer's input where its weight wants a gradient, its weight
    where a layer before it does. Where the backward is differentiated itself, the layers' outputs
    are computed anew.

    Args:
        input: ``(*, in_features)``.
        weights: each layer's, ``(out_features, in_features)``, of the input's dtype and device;
            one or more.
        biases: each layer's, ``(out_features)``, likewise; or None (default: none has one).
        activations: ``"relu"`` or None for each layer (default: ReLU behind all but the last).

    Returns:
        ``(*, out_features)`` of the last layer, of the input's dtype.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: the lists are not of one length, or are empty; an activation is another.
        RuntimeError: dtypes or devices differ, or the shapes don't fit.

    >>> import torch, fastnn
    >>> x, w1, w2 = torch.randn(4, 3), torch.randn(8, 3), torch.randn(2, 8)
    >>> y = fastnn.functional.mlp(x, [w1, w2])
    >>> torch.allclose(y, torch.relu(x @ w1.T) @ w2.T, atol=1e-6)
    True
    """
    weights, biases = list(weights), None if biases is None else list(biases)
    if has_torch_function_variadic(input, *weights, *(biases or ())):
        tensors = (input, *weights, *(biases or ()))
        lists = {"biases": biases, "activations": activations}
        return ask_classes(mlp, _tensor_classes.mlp, tensors, input, weights, **lists)
    check_tensor("mlp", "input", input)
    weights, biases, relu = mlp_layers(weights, biases, activations)
    if need_torch(input, *weights, *biases):
        return call_torch(_tensor_classes.mlp, input, weights, biases, activations)
    if is_tracing():  # torch.jit.trace takes no operator over lists of what may be absent
        for weight, bias, has_relu in zip(weights, biases, relu, strict=True):
            input = (linear_relu if has_relu else linear)(input, weight, bias)
        return input
    return operators().mlp(input, weights, biases, relu)


def log_softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""``log(softmax(input))`` along ``dim``: :func:`torch.nn.functional.log_softmax`.

    Computed as ``(x - max) - log(sum(exp(x - max)))``, in that order, which neither overflows nor
    loses the small differences of large logits.

    Args:
        input: any shape, 0-d included.
        dim: the dimension whose slices are normalised; None chooses as torch does, with its
            deprecation warning.
        dtype: the input is cast to it first (default: the input's own).

    Returns:
        The input's shape, contiguous.

    Raises:
        TypeError: the input is no tensor.
        IndexError: ``dim`` is out of range.
        NotImplementedError: the dtype is no floating-point one.

    >>> import torch, fastnn
    >>> fastnn.functional.log_softmax(torch.zeros(2), dim=0).exp()
    tensor([0.5000, 0.5000])
    """
    if has_torch_function_unary(input):
        return ask_classes(
            log_softmax,
            F.log_softmax,
            (input,),
            input,
            dim=dim,
            _stacklevel=_stacklevel,
            dtype=dtype,
        )
    if type(input) not in PLAIN:
        check_tensor("log_softmax", "input", input)
        if need_torch(input):
            # Two frames further up is the line that calls this function.
            return call_torch(F.log_softmax, input, dim, _stacklevel + 2, dtype)
    if type(dim) is not int:
        dim = log_softmax_dim(input, dim, _stacklevel + 1)
    if dtype is not None:
        input = input.to(dtype)
        if input.is_cuda and torch.is_autocast_enabled("cuda"):
            # The dtype asked for outranks autocast's, as in torch.
            with torch.autocast("cuda", enabled=False):
                return operators().log_softmax(input, dim)
    return operators().log_softmax(input, dim)


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Negative log likelihood loss: :func:`torch.nn.functional.nll_loss`.

    Per row ``-weight[target] * input[target]``; rows whose target is ``ignore_index`` give zero.
    ``'mean'`` divides the sum by the summed weights of the rows kept (NaN where none is).

    Args:
        input: log-probabilities, ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``.
        target: class indices in [0, C), int64 or uint8; ``()``, ``(N)`` or ``(N, d1, ...)``.
        weight: ``(C)``, the weight of each class, of the input's dtype (default: 1).
        size_average, reduce: deprecated, as in torch; they override ``reduction``.
        ignore_index: the target value of rows that count for nothing.
        reduction: ``'none'``, ``'mean'`` or ``'sum'``.

    Returns:
        A scalar, or the target's shape with ``reduction='none'``; of the input's dtype.

    Raises:
        TypeError: an argument is no tensor.
        IndexError: a target is out of range; names it and the number of classes.
        ValueError: the batch sizes differ, or the reduction is none of the three.
        RuntimeError: other shapes, dtypes or devices that don't fit.

    >>> import torch, fastnn
    >>> log_probs = torch.log(torch.tensor([[0.5, 0.5], [0.1, 0.9]]))
    >>> fastnn.functional.nll_loss(log_probs, torch.tensor([0, 1]), reduction="none")
    tensor([0.6931, 0.1054])
    """
    if has_torch_function_variadic(input, target, weight):
        return ask_classes(
            nll_loss,
            F.nll_loss,
            (input, target, weight),
            input,
            target,
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
        )
    if not (
        type(input) in PLAIN
        and type(target) in PLAIN
        and type(weight) in PLAIN_OR_NONE
        and type(ignore_index) is int
    ):
        check_loss_arguments("nll_loss", input, target, weight, ignore_index)
        if need_torch(input, target, weight):
            return call_torch(
                F.nll_loss, input, target, weight, size_average, ignore_index, reduce, reduction
            )
    if size_average is not None or reduce is not None or type(reduction) is not str:
        reduction = loss_reduction(size_average, reduce, reduction)
    return operators().nll_loss(input, target, weight, ignore_index, reduction)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Cross entropy of logits and targets: :func:`torch.nn.functional.cross_entropy`.

    With ``q`` the target distribution (one-hot, mixed with ``label_smoothing / C`` of every
    class; times the class weights) and ``lse = log(sum(exp(input)))``, a row's loss is
    ``sum_c q_c * (lse - input_c)``. Where the input wants a gradient, the forward writes that too,
    ``softmax * sum(q) - q`` divided as the loss is, and the backward only multiplies it; of
    bfloat16 and float16, which that would round twice, it writes a copy of the logits. What happens
    to the logits after the forward changes no gradient. The label smoothing is that of Szegedy et
    al., "Rethinking the Inception Architecture for Computer Vision" (2016).

    Args:
        input: logits, ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``.
        target: class indices in [0, C), int64 or uint8, ``()``, ``(N)`` or ``(N, d1, ...)``; or
            class probabilities, floating-point, of the input's shape.
        weight: ``(C)``, the weight of each class, of the input's dtype (default: 1).
        size_average, reduce: deprecated, as in torch; they override ``reduction``.
        ignore_index: the target value of rows that count for nothing; for class indices only.
        reduction: ``'none'``, ``'mean'`` or ``'sum'``. ``'mean'`` divides by the summed weights of
            the rows kept (class indices; NaN where none is) or by their number (probabilities).
        label_smoothing: in [0, 1].

    Returns:
        A scalar, or one value per row with ``reduction='none'``; of the input's dtype.

    Raises:
        TypeError: an argument is no tensor.
        IndexError: a target is out of range; names it and the number of classes.
        ValueError: the batch sizes differ, or the reduction is none of the three.
        RuntimeError: other shapes, dtypes or devices that don't fit, a ``label_smoothing``
            outside [0, 1], an ``ignore_index`` >= 0 with class probabilities.

    >>> import torch, fastnn
    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    >>> fastnn.functional.cross_entropy(logits, torch.tensor([0, 1]))
    tensor(0.1269)
    """
    if has_torch_function_variadic(input, target, weight):
        return ask_classes(
            cross_entropy,
            F.cross_entropy,
            (input, target, weight),
            input,
            target,
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    if not (
        type(input) in PLAIN
        and type(target) in PLAIN
        and type(weight) in PLAIN_OR_NONE
        and type(ignore_index) is int
    ):
        check_loss_arguments("cross_entropy", input, target, weight, ignore_index)
        if need_torch(input, target, weight):
            options = (size_average, ignore_index, reduce, reduction, label_smoothing)
            return call_torch(F.cross_entropy, input, target, weight, *options)
    if type(label_smoothing) is not float:
        check_label_smoothing(label_smoothing)
    if size_average is not None or reduce is not None or type(reduction) is not str:
        reduction = loss_reduction(size_average, reduce, reduction)
    return operators().cross_entropy(
        input, target, weight, ignore_index, reduction, label_smoothing
    )

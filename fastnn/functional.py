"""The operators as functions, with the signatures and semantics of :mod:`torch.nn.functional`.

All accept float64, float32, bfloat16 or float16 tensors in any memory layout. Sums are accumulated
in float32 (float64 for float64 inputs), and the result is rounded once to the input's dtype. Each
function is differentiable any number of times with respect to its floating-point input.

Under :class:`torch.autocast` they follow torch's rules: ``linear``, ``linear_relu`` and ``mlp`` run
in autocast's dtype, ``nll_loss`` and ``cross_entropy`` in float32, ``log_softmax`` in float32 on
CUDA and in its input's dtype on the CPU; ``linear_cross_entropy`` computes the product in
autocast's dtype and the loss in float32.

Tensors of a class with its own ``__torch_dispatch__`` (quantised weights,
:class:`torch.distributed.tensor.DTensor`), or whose ``__torch_function__`` rejects these functions
(the weights of per-sample gradients), use torch's own: ``F.relu(F.linear(...))``.

An argument that is not a tensor raises ``TypeError``, one of an unsupported dtype, shape or device
``RuntimeError`` or ``ValueError``, as in torch; messages name the argument.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_unary, has_torch_function_variadic

from fastnn import _tensor_classes, _vocabulary_parallel
from fastnn._arguments import (
    LinearLossOptions,
    check_label_smoothing,
    check_linear_arguments,
    check_linear_cross_entropy_arguments,
    check_loss_arguments,
    check_tensor,
    log_softmax_dim,
    loss_reduction,
    mlp_layers,
)
from fastnn._extension import is_tracing, operators
from fastnn._head_loss import head_loss
from fastnn._head_statistics import (
    Head,
    LinearCrossEntropyOutput,
    LogProbs,
    check_returns,
    head_statistics,
)
from fastnn._tensor_classes import (
    PLAIN,
    PLAIN_OR_NONE,
    ask_classes,
    call_torch,
    need_torch,
)
from fastnn._vocabulary_parallel import is_split_by_classes

__all__ = [
    "cross_entropy",
    "linear",
    "linear_cross_entropy",
    "linear_logprobs",
    "linear_relu",
    "log_softmax",
    "mlp",
    "nll_loss",
]


# Dtypes that the kernels read without a conversion for a float32 result.
_READ_NARROW = frozenset({torch.bfloat16, torch.float16})


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""``input @ weight.T + bias``: :func:`torch.nn.functional.linear`.

    The backward only computes the gradients that are needed. Autograd saves what torch saves: the
    input if the weight requires a gradient, the weight if the input does.

    Args:
        input: ``(*, in_features)``.
        weight: ``(out_features, in_features)``, of the input's dtype and device.
        bias: ``(out_features)``, of the input's dtype and device; or None (default).

    Returns:
        ``(*, out_features)``, of the input's dtype.

    Raises:
        TypeError: an argument is not a tensor.
        RuntimeError: dtypes or devices differ, or the shapes don't match.

    >>> import torch, fastnn
    >>> x, w, b = torch.randn(4, 3), torch.randn(2, 3), torch.randn(2)
    >>> torch.allclose(fastnn.functional.linear(x, w, b), x @ w.T + b, atol=1e-6)
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

    The backward takes its mask from the sign of the output, and only computes the gradients that
    are needed. Besides the output autograd saves what it saves for torch's linear: the input if the
    weight requires a gradient, the weight if the input does. NaNs are propagated.

    Args:
        input: ``(*, in_features)``.
        weight: ``(out_features, in_features)``, of the input's dtype and device.
        bias: ``(out_features)``, of the input's dtype and device; or None (default).

    Returns:
        ``(*, out_features)``, of the input's dtype.

    Raises:
        TypeError: an argument is not a tensor.
        RuntimeError: dtypes or devices differ, or the shapes don't match.

    >>> import torch, fastnn
    >>> x, w, b = torch.randn(4, 3), torch.randn(2, 3), torch.randn(2)
    >>> torch.allclose(fastnn.functional.linear_relu(x, w, b), torch.relu(x @ w.T + b), atol=1e-6)
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
    r"""Linear layers in a row, each optionally followed by a ReLU, as one operator: a multilayer
    perceptron.

    Autograd records a single node for all. Its backward only computes the gradients that are
    needed, and passes the gradient from one layer's product, with the ReLU's mask applied, directly
    to the next. It saves what torch saves: a layer's input if its weight requires a gradient, its
    weight if anything before it does. If the backward itself is differentiated, the layers' outputs
    are recomputed.

    Args:
        input: ``(*, in_features)``.
        weights: each layer's, ``(out_features, in_features)``, of the input's dtype and device; at
            least one.
        biases: each layer's, ``(out_features)``, of the input's dtype and device, or None; None for
            no biases at all (default).
        activations: ``"relu"`` or None for each layer (default: ReLU after all but the last).

    Returns:
        The last layer's ``(*, out_features)``, of the input's dtype.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: the lists differ in length or are empty; an activation is unknown.
        RuntimeError: dtypes or devices differ, or the shapes don't match.

    >>> import torch, fastnn
    >>> x, w1, w2 = torch.randn(4, 3), torch.randn(8, 3), torch.randn(2, 8)
    >>> y = fastnn.functional.mlp(x, [w1, w2])
    >>> torch.allclose(y, torch.relu(x @ w1.T) @ w2.T, atol=1e-6)
    True
    """
    for name, value in (("weights", weights), ("biases", biases)):
        if isinstance(value, Tensor):
            raise TypeError(f"mlp(): argument '{name}' must be a list of Tensors, not a Tensor")
    weights, biases = list(weights), None if biases is None else list(biases)
    if has_torch_function_variadic(input, *weights, *(biases or ())):
        tensors = (input, *weights, *(biases or ()))
        lists = {"biases": biases, "activations": activations}
        return ask_classes(mlp, _tensor_classes.mlp, tensors, input, weights, **lists)
    check_tensor("mlp", "input", input)
    weights, biases, relu = mlp_layers(weights, biases, activations)
    if need_torch(input, *weights, *biases):
        return call_torch(_tensor_classes.mlp, input, weights, biases, activations)
    if is_tracing():  # torch.jit.trace can't record lists of optional tensors
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
    loses small differences between large logits.

    Args:
        input: any shape, 0-d included.
        dim: the dimension whose slices are normalised; None (default) chooses as torch does, with
            its deprecation warning.
        dtype: of the output, as if the input were cast to it first (default: the input's own).

    Returns:
        A contiguous tensor of the input's shape.

    Raises:
        TypeError: the input is not a tensor.
        IndexError: ``dim`` is out of range.
        NotImplementedError: the dtype is not floating-point.

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
            # The caller's line is two frames further up.
            return call_torch(F.log_softmax, input, dim, _stacklevel + 2, dtype)
    if type(dim) is not int:
        dim = log_softmax_dim(input, dim, _stacklevel + 1)
    if dtype is not None and (dtype != torch.float32 or input.dtype not in _READ_NARROW):
        input = input.to(dtype)
    return operators().log_softmax(input, dim, dtype)


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
    ``'mean'`` divides the sum by the total weight of the other rows (NaN if there are none).

    Args:
        input: log-probabilities, ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``.
        target: class indices in [0, C), int64 or uint8; ``()``, ``(N)`` or ``(N, d1, ...)``.
        weight: ``(C)``, the weight of each class, of the input's dtype (default: 1).
        size_average, reduce: deprecated, as in torch; they override ``reduction``.
        ignore_index: target value of rows to ignore (default -100).
        reduction: ``'none'``, ``'mean'`` (default) or ``'sum'``.

    Returns:
        A scalar, or with ``reduction='none'`` the target's shape; of the input's dtype.

    Raises:
        TypeError: an argument is not a tensor.
        IndexError: a target is out of range; the message names it and the number of classes.
            On a GPU a device-side assert reports it, as PyTorch's does.
        ValueError: the batch sizes differ, or the reduction is unknown.
        RuntimeError: other shapes, dtypes or devices don't match.

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
    return operators().nll_loss(input, target, weight, ignore_index, reduction, None)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
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
    returns: Collection[str] = (),
) -> Any:
    r"""Cross entropy of a linear layer's output, without ever storing all the logits:
    :func:`torch.nn.functional.linear_cross_entropy`.

    The logits are ``softcap * tanh(logit_scale * (input @ linear_weight.T + linear_bias) /
    softcap)``; a row's loss is that of :func:`cross_entropy`, plus ``z_loss * lse**2``. They are
    computed in blocks of rows; each block is replaced by its gradient, from which two products
    follow. If a mean or a sum requires a gradient, the forward computes those of input, weight and
    bias, and the backward only scales them. Without a reduction it saves each row's log-sum-exp,
    and the backward recomputes the blocks. On the CPU ignored rows take no part in the products.
    Derivatives of higher orders, and transforms, store all the logits.

    The z-loss is from Chowdhery et al., "PaLM" (2022), the softcap from Gemma 2 (2024).

    Args:
        input: ``(D)`` or ``(*, D)``.
        linear_weight: ``(C, D)``, of the input's dtype and device; or ``(C, d1, ..., dK, D)`` with
            an input ``(N, D)``: a classifier for each of the positions.
        target: class indices in [0, C), int64 or uint8, of the rows' shape ``*`` followed by
            ``(d1, ..., dK)``; or class probabilities, floating-point, ``(*, C)`` or
            ``(N, C, d1, ..., dK)``.
        linear_bias: ``(C)`` or ``(C, d1, ..., dK)``; or None (default).
        weight: ``(C)``, the weight of each class, of the input's dtype (default: 1).
        reduction: ``'none'``, ``'mean'`` (default) or ``'sum'``, as in :func:`cross_entropy`.
        ignore_index: target value of rows to ignore (default None: -100); for class indices only.
        label_smoothing: in [0, 1] (default 0).
        options: torch's choice of chunks (default None); ignored, since fastnn chooses its own.
        softcap: a positive cap on the logits; None (default) for no cap.
        logit_scale: factor of the logits: the reciprocal of a temperature (default 1).
        z_loss: factor of the squared log-sum-exp (default 0).
        normalizer: divisor of the sum of the losses, replacing that of ``'mean'``: for example the
            number of tokens in a step (default None).
        returns: any of ``'lse'``, ``'logprobs'`` (of the targets), ``'entropy'``, ``'accuracy'``
            and ``'predictions'``, to be returned in a named tuple with the loss (default: none).
            For class indices only; ignored rows have 0, but predictions are given for them. They
            are differentiable where possible, and cost one more product in each direction, also
            computed in blocks, by torch's operators.

    Returns:
        A scalar, or with ``reduction='none'`` one value per row; of the input's dtype (float32
        under autocast). With ``returns`` a named tuple of ``loss`` and all five, in the dtype of
        the sums; None for those not requested. ``accuracy`` is a single number.

    Raises:
        TypeError: an argument is not a tensor.
        IndexError: a target is out of range; the message names it and the number of classes.
            On a GPU a device-side assert reports it, as PyTorch's does.
        ValueError: the batch sizes differ, the reduction is unknown, ``softcap`` isn't positive,
            ``normalizer`` is combined with ``reduction='none'``, or ``returns`` has an unknown
            name.
        RuntimeError: other shapes, dtypes or devices don't match, ``label_smoothing`` is outside
            [0, 1], or ``ignore_index`` is combined with class probabilities.

    >>> import torch, fastnn
    >>> x, w = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    >>> fastnn.functional.linear_cross_entropy(x, w, torch.tensor([0, 1]))
    tensor(0.1269)
    """
    of_loss = LinearLossOptions(
        *(weight, reduction, ignore_index, label_smoothing),
        *(softcap, logit_scale, z_loss, normalizer),
    )
    head = input, linear_weight, target, linear_bias
    check_label_smoothing("linear_cross_entropy", label_smoothing)
    if has_torch_function_variadic(*head, weight):
        keywords = of_loss._asdict() | {"linear_bias": linear_bias, "returns": returns}
        torchs = _tensor_classes.linear_cross_entropy
        tensors = (*head, weight)
        return ask_classes(linear_cross_entropy, torchs, tensors, *head[:3], **keywords)
    check_linear_cross_entropy_arguments(*head, of_loss)
    if type(reduction) is not str:
        loss_reduction(None, None, reduction)
    if need_torch(*head, weight):
        if is_split_by_classes(linear_weight, target, linear_bias, of_loss):
            return _vocabulary_parallel.linear_cross_entropy(*head, of_loss, returns)
        keywords = of_loss._asdict() | {"linear_bias": linear_bias, "returns": returns}
        return call_torch(_tensor_classes.linear_cross_entropy, *head[:3], **keywords)
    loss = head_loss(operators().linear_cross_entropy, *head, of_loss)
    if not returns:
        return loss
    check_returns(returns, linear_weight, target)
    logits = Head(input, linear_weight, linear_bias, softcap, logit_scale)
    statistics = head_statistics(returns, logits, target, of_loss.ignored)
    return LinearCrossEntropyOutput(loss, **statistics)


def linear_logprobs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = None,
    entropy: bool = False,
) -> Any:
    r"""The log-probability of each row's target under a linear layer's softmax, as used in
    preference tuning and reinforcement learning, without storing all the logits.

    Differentiable; the backward recomputes the blocks of logits. For the arguments see
    :func:`linear_cross_entropy`.

    Args:
        input: ``(*, D)``.
        linear_weight: ``(C, D)``.
        target: class indices ``(*)``.
        linear_bias: ``(C)``; or None (default).
        logit_scale: factor of the logits: the reciprocal of a temperature (default 1).
        softcap: a positive cap on the logits; None (default) for no cap.
        ignore_index: target value of rows to ignore, which get 0 (default None: -100).
        entropy: also return the entropy of each row's distribution, which is differentiable too
            (default ``False``). Both are then computed by torch's operators.

    Returns:
        ``(*)``, in the dtype of the sums (float32 or float64); or a named tuple of ``logprobs`` and
        ``entropy``.

    Raises:
        TypeError, IndexError, ValueError, RuntimeError: as :func:`linear_cross_entropy`.

    >>> import torch, fastnn
    >>> x, w = torch.eye(2), torch.zeros(4, 2)
    >>> fastnn.functional.linear_logprobs(x, w, torch.tensor([0, 3]))
    tensor([-1.3863, -1.3863])
    """
    options = LinearLossOptions(
        reduction="none", ignore_index=ignore_index, softcap=softcap, logit_scale=logit_scale
    )
    check_linear_cross_entropy_arguments(input, linear_weight, target, linear_bias, options)
    check_returns((), linear_weight, target)
    if entropy:
        head = Head(input, linear_weight, linear_bias, softcap, logit_scale)
        return LogProbs(**head_statistics(LogProbs._fields, head, target, options.ignored))

    def losses(*arguments: Any) -> Tensor:
        *operands, _ = arguments
        wide = torch.promote_types(input.dtype, torch.float32)
        return operators().linear_cross_entropy(*operands, wide)

    return -head_loss(losses, input, linear_weight, target, linear_bias, options)


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

    With ``q`` the target distribution (one-hot, mixed with ``label_smoothing / C`` of every class;
    times the class weights) and ``lse = log(sum(exp(input)))``, a row's loss is
    ``sum_c q_c * (lse - input_c)``. If the input requires a gradient, the forward also writes
    ``softmax * sum(q) - q``, divided like the loss, and the backward only scales it; for bfloat16
    and float16, where that would round twice, it writes a copy of the logits instead. So changing
    the logits after the forward doesn't affect the gradient. Label smoothing is from Szegedy et
    al., "Rethinking the Inception Architecture for Computer Vision" (2016).

    Args:
        input: logits, ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``.
        target: class indices in [0, C), int64 or uint8, ``()``, ``(N)`` or ``(N, d1, ...)``; or
            class probabilities, floating-point, of the input's shape.
        weight: ``(C)``, the weight of each class, of the input's dtype (default: 1).
        size_average, reduce: deprecated, as in torch; they override ``reduction``.
        ignore_index: target value of rows to ignore (default -100); for class indices only.
        reduction: ``'none'``, ``'mean'`` (default) or ``'sum'``. ``'mean'`` divides by the total
            weight of the rows kept (class indices; NaN if there are none) or by the number of rows
            (probabilities).
        label_smoothing: in [0, 1] (default 0).

    Returns:
        A scalar, or with ``reduction='none'`` one value per row; of the input's dtype.

    Raises:
        TypeError: an argument is not a tensor.
        IndexError: a target is out of range; the message names it and the number of classes.
            On a GPU a device-side assert reports it, as PyTorch's does.
        ValueError: the batch sizes differ, or the reduction is unknown.
        RuntimeError: other shapes, dtypes or devices don't match, ``label_smoothing`` is outside
            [0, 1], or ``ignore_index`` >= 0 is combined with class probabilities.

    >>> import torch, fastnn
    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    >>> fastnn.functional.cross_entropy(logits, torch.tensor([0, 1]))
    tensor(0.1269)
    """
    if has_torch_function_variadic(input, target, weight):
        check_label_smoothing("cross_entropy", label_smoothing)
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
            check_label_smoothing("cross_entropy", label_smoothing)
            options = (size_average, ignore_index, reduce, reduction, label_smoothing)
            return call_torch(F.cross_entropy, input, target, weight, *options)
    if type(label_smoothing) is not float:
        check_label_smoothing("cross_entropy", label_smoothing)
    if size_average is not None or reduce is not None or type(reduction) is not str:
        reduction = loss_reduction(size_average, reduce, reduction)
    return operators().cross_entropy(
        input, target, weight, ignore_index, reduction, label_smoothing, None
    )

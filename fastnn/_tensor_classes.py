"""Arguments of tensor classes that know PyTorch's functions or operators but not ours.

Quantised weights, the weights of per-sample gradients, DTensors and the like handle ``F.linear`` in
``__torch_function__``, or aten's operators in ``__torch_dispatch__``. They get PyTorch's own
functions. A class first sees our function; if it passes that on, our operators run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter
from torch.overrides import handle_torch_function

from fastnn._arguments import default_activations
from fastnn._torch import TRACING_CLASSES, enable_torch_function

# Classes that never intervene. A look-up is cheaper than isinstance(), and every call makes one.
PLAIN = frozenset({Tensor, Parameter})
PLAIN_OR_NONE = PLAIN | {type(None)}


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """PyTorch's own functions for this operator; most others have a single one in PyTorch."""
    return F.relu(F.linear(input, weight, bias))


def mlp(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    activations: Sequence[str | None] | None = None,
) -> Tensor:
    """PyTorch's own functions for this operator, layer by layer."""
    if activations is None:
        activations = default_activations(len(weights))
    for weight, bias, activation in zip(
        weights, biases or [None] * len(weights), activations, strict=True
    ):
        input = (linear_relu if activation == "relu" else F.linear)(input, weight, bias)
    return input


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
) -> Tensor:
    """PyTorch's own functions for this operator, with the arguments that PyTorch's lacks."""
    if returns:
        raise NotImplementedError(f"returns is not supported for {type(linear_weight).__name__}")
    *outputs, features = linear_weight.shape
    if len(outputs) > 1:  # the positions of a K-dimensional loss
        linear_weight = linear_weight.reshape(-1, features)
        linear_bias = None if linear_bias is None else linear_bias.reshape(-1)
    logits = F.linear(input, linear_weight, linear_bias)
    if logit_scale != 1:
        logits = logits * logit_scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if len(outputs) > 1:
        logits = logits.reshape(*input.shape[:-1], *outputs)
    is_index = target.shape != logits.shape
    if logits.dim() > 2 and len(outputs) == 1:  # cross_entropy's classes are in dimension 1
        logits = logits.movedim(-1, 1)
        target = target if is_index else target.movedim(-1, 1)
    ignored = -100 if ignore_index is None else ignore_index
    is_plain = z_loss == 0 and normalizer is None
    losses = F.cross_entropy(
        logits,
        target,
        weight=weight,
        ignore_index=ignored,
        reduction=reduction if is_plain else "none",
        label_smoothing=label_smoothing,
    )
    if is_plain:
        return losses
    if z_loss != 0:
        squares = torch.logsumexp(logits, min(logits.dim() - 1, 1)).square()
        losses = losses + z_loss * (squares.where(target != ignored, 0) if is_index else squares)
    if reduction == "none":
        return losses
    if normalizer is None and reduction == "mean":
        normalizer = mean_divisor(target, weight, ignored if is_index else None, losses.numel())
    return losses.sum() if normalizer is None else losses.sum() / normalizer


def mean_divisor(
    target: Tensor, weight: Tensor | None, ignore_index: int | None, rows: int
) -> Tensor:
    """The divisor of a mean loss; ``ignore_index`` is None for class probabilities."""
    if ignore_index is None:
        return torch.full((), rows, device=target.device)
    counts = target != ignore_index
    if weight is None:
        return counts.sum()
    weights = weight[target.long().where(counts, 0)].where(counts, 0)
    total = weights.sum(dtype=torch.promote_types(weight.dtype, torch.float32))
    return total.where(total != 0, torch.nan)


def need_torch(*tensors: Tensor | None) -> bool:
    """Whether a tensor's class has its own ``__torch_dispatch__``, which may not know ours.

    The classes of tracers know every operator and should see ours.
    """
    return any(
        isinstance(tensor, Tensor)
        and type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
        and not isinstance(tensor, TRACING_CLASSES)
        for tensor in tensors
    )


def have_no_say(*tensors: Tensor | None) -> bool:
    """Whether all are of classes that leave functions and operators alone."""
    return all(
        type(tensor) in PLAIN_OR_NONE or isinstance(tensor, TRACING_CLASSES) for tensor in tensors
    )


def call_torch(torchs: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Calls PyTorch's function so that the arguments' classes see it.

    A class that has passed our function on has disabled its ``__torch_function__`` before.
    """
    if is_dynamo_compiling():  # can't be traced, and isn't needed after ask_classes
        return torchs(*args, **kwargs)
    with enable_torch_function():
        return torchs(*args, **kwargs)


def ask_classes(
    ours: Callable[..., Tensor],
    torchs: Callable[..., Tensor],
    tensors: tuple[Tensor | None, ...],
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Calls our function through the modes and classes that want to see it.

    Args:
        ours: the public function.
        torchs: PyTorch's function with the same arguments, for classes that reject ours.
        tensors: the arguments that may be of such a class.
        *args, **kwargs: all arguments.

    Returns:
        The mode's or class's result for ``ours``; if that raises, the result of ``torchs``.

    Raises:
        Exception: what ``torchs`` raises; if only a mode is involved, what it or ``ours`` raises.
    """
    if all(type(tensor) in PLAIN_OR_NONE for tensor in tensors):
        return handle_torch_function(ours, tensors, *args, **kwargs)
    if is_dynamo_compiling() and need_torch(*tensors):
        # Dynamo can't trace a class's rejection; here the class still sees PyTorch's function.
        return torchs(*args, **kwargs)
    try:
        return handle_torch_function(ours, tensors, *args, **kwargs)
    except Exception:
        pass  # torchs runs outside this block, so that its own error is not chained to this one
    return torchs(*args, **kwargs)

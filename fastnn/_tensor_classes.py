"""Arguments of classes that know PyTorch's functions or operators, and not ours.

Quantised weights, the weights of per-sample gradients, DTensors and the like know ``F.linear`` by
``__torch_function__``, or aten's operators by ``__torch_dispatch__``. They get PyTorch's own
functions. A class is asked with our function first, and one that hands it on keeps our operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter
from torch.overrides import handle_torch_function

from fastnn._torch import TRACING_CLASSES, enable_torch_function

# The classes without a say. A look-up costs less than isinstance(): it is part of every call.
PLAIN = frozenset({Tensor, Parameter})
PLAIN_OR_NONE = PLAIN | {type(None)}


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """PyTorch's own functions for this operator; each of the others has one in PyTorch."""
    return F.relu(F.linear(input, weight, bias))


def mlp(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    activations: Sequence[str | None] | None = None,
) -> Tensor:
    """Likewise, layer by layer."""
    if activations is None:
        activations = ["relu"] * (len(weights) - 1) + [None]
    for weight, bias, activation in zip(
        weights, biases or [None] * len(weights), activations, strict=True
    ):
        input = (linear_relu if activation == "relu" else F.linear)(input, weight, bias)
    return input


def need_torch(*tensors: Tensor | None) -> bool:
    """Whether a tensor's class has a ``__torch_dispatch__``, which needn't know our operators.

    The classes that trace know every operator, and are to see ours.
    """
    return any(
        isinstance(tensor, Tensor)
        and type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
        and not isinstance(tensor, TRACING_CLASSES)
        for tensor in tensors
    )


def have_no_say(*tensors: Tensor | None) -> bool:
    """Whether all are of classes that leave each function and operator as it is."""
    return all(
        type(tensor) in PLAIN_OR_NONE or isinstance(tensor, TRACING_CLASSES) for tensor in tensors
    )


def call_torch(torchs: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Calls PyTorch's function so that the arguments' classes see it.

    A class that has handed our function on has turned its ``__torch_function__`` off before.
    """
    if is_dynamo_compiling():  # it can't trace the context, and ask_classes leaves no need of it
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
        ours: the function for users.
        torchs: PyTorch's function of the same arguments, for classes that refuse ours.
        tensors: the arguments that may be of such a class.
        *args, **kwargs: all arguments.

    Returns:
        What the mode or the class makes of ``ours``; where that raises, the result of ``torchs``.

    Raises:
        Exception: what ``torchs`` raises; where a mode alone looks on, what it or ``ours`` raises.
    """
    if all(type(tensor) in PLAIN_OR_NONE for tensor in tensors):
        return handle_torch_function(ours, tensors, *args, **kwargs)
    if is_dynamo_compiling() and need_torch(*tensors):
        # It can't trace how a class refuses; here the class still sees PyTorch's function.
        return torchs(*args, **kwargs)
    try:
        return handle_torch_function(ours, tensors, *args, **kwargs)
    except Exception:
        pass  # torchs runs outside of this block, so that its own error stands alone
    return torchs(*args, **kwargs)

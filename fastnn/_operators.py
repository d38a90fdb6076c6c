"""The table of operators: one record each, with all that PyTorch and its tools need to know.

The rest of the package and the tests derive their lists from it: PyTorch's counterpart of an
operator, the shapes for ``torch.compile`` and ``torch.export``, its FLOPs, its ONNX translation.
The table exists without the extension, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import register_fake

from fastnn import _tensor_classes, reference
from fastnn._when_imported import when_imported


class Operator(NamedTuple):
    """A public operator, with its forward and backward operators in ``torch.ops.fastnn``.

    Args:
        name: of the operator, and of its function in fastnn.functional and fastnn.reference.
        module: the name of its class in fastnn.nn.
        stock: PyTorch's counterpart: a function with the same arguments and values.
        onnx: the operator in terms of torch operators that the ONNX exporters translate.
        fakes: fake kernels by operator name: shapes, dtypes and devices of the results.
            Operators that only call others need none.
        flops: FLOP formulas by name of the operators that multiply matrices; functions of shapes,
            as :class:`torch.utils.flop_counter.FlopCounterMode` calls them (default: none).
        stock_module: the class of torch.nn whose instances ``fuse`` gives the module's class
            (default: None).
    """

    name: str
    module: str
    stock: Callable[..., Tensor]
    onnx: Callable[..., Tensor]
    fakes: Mapping[str, Callable[..., object]]
    flops: Mapping[str, Callable[..., int]] = MappingProxyType({})
    stock_module: type[torch.nn.Module] | None = None


class Optimizer(NamedTuple):
    """An optimizer.

    Args:
        name: of its class in fastnn.optim and in torch.optim.
        fakes: fake kernels by operator name, as for :class:`Operator`; they return nothing.
    """

    name: str
    fakes: Mapping[str, Callable[..., None]]


# ---- linear and linear_relu ----------------------------------------------------------------------


def _linear_fake(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(input, weight, bias).contiguous()


def _linear_backward_fake(
    grad_output: Tensor, input: Tensor | None, weight: Tensor | None, output_mask: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    *batch, out_features = grad_output.shape
    wants_input, wants_weight, wants_bias = output_mask
    grad_input = grad_weight = None
    if wants_input and weight is not None:
        grad_input = grad_output.new_empty((*batch, weight.shape[1]))
    if wants_weight and input is not None:
        grad_weight = grad_output.new_empty((out_features, input.shape[-1]))
    grad_bias = grad_output.new_empty((out_features,)) if wants_bias else None
    return grad_input, grad_weight, grad_bias


def _linear_relu_backward_fake(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    output: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return _linear_backward_fake(grad_output, input, weight, output_mask)


def _linear_flops(
    input_shape: torch.Size, weight_shape: torch.Size, *args: Any, **kwargs: Any
) -> int:
    return 2 * prod(input_shape) * weight_shape[0]


def _linear_backward_flops(
    grad_output_shape: torch.Size,
    input_shape: torch.Size | None,
    weight_shape: torch.Size | None,
    output_mask: list[bool],
    **kwargs: Any,
) -> int:
    """The gradients of input and weight each take as many FLOPs as the product itself."""
    flops = 2 * prod(grad_output_shape)
    wants_input, wants_weight, _ = output_mask
    for_input = flops * weight_shape[1] if wants_input and weight_shape is not None else 0
    for_weight = flops * input_shape[-1] if wants_weight and input_shape is not None else 0
    return for_input + for_weight


def _linear_relu_backward_flops(
    grad_output_shape: torch.Size,
    input_shape: torch.Size | None,
    weight_shape: torch.Size | None,
    output_shape: torch.Size,
    output_mask: list[bool],
    **kwargs: Any,
) -> int:
    return _linear_backward_flops(grad_output_shape, input_shape, weight_shape, output_mask)


def _mlp_forward_fake(
    input: Tensor, weights: list[Tensor], biases: list[Tensor | None], relu: list[bool]
) -> list[Tensor]:
    outputs: list[Tensor] = []
    for weight, bias in zip(weights, biases, strict=True):
        outputs.append(_linear_fake(outputs[-1] if outputs else input, weight, bias))
    return outputs


def _mlp_backward_fake(
    grad_output: Tensor,
    inputs: list[Tensor | None],
    weights: list[Tensor | None],
    output: Tensor | None,
    relu: list[bool],
    output_mask: list[bool],
) -> list[Tensor]:
    layers = len(weights)
    *batch, features = grad_output.shape
    of_weights, of_biases, of_input = [], [], []
    for i in reversed(range(layers)):
        layer_input, weight = inputs[i], weights[i]
        if output_mask[1 + i] and layer_input is not None:
            of_weights.append(grad_output.new_empty((features, layer_input.shape[-1])))
        if output_mask[1 + layers + i]:
            of_biases.append(grad_output.new_empty((features,)))
        if weight is None:  # the gradient goes no further
            break
        features = weight.shape[1]
    if output_mask[0]:
        of_input.append(grad_output.new_empty((*batch, features)))
    return [*of_input, *reversed(of_weights), *reversed(of_biases)]


def _mlp_flops(
    input_shape: torch.Size, weights_shape: list[torch.Size], *args: Any, **kwargs: Any
) -> int:
    return 2 * prod(input_shape[:-1]) * sum(map(prod, weights_shape))


def _mlp_backward_flops(
    grad_output_shape: torch.Size,
    inputs_shape: list[torch.Size | None],
    weights_shape: list[torch.Size | None],
    output_shape: torch.Size | None,
    relu: list[bool],
    output_mask: list[bool],
    **kwargs: Any,
) -> int:
    rows, features, products = prod(grad_output_shape[:-1]), grad_output_shape[-1], 0
    wanted = [w or b for w, b in zip(output_mask[1:], output_mask[1 + len(relu) :], strict=False)]
    first = 0 if output_mask[0] else [*wanted, True].index(True)
    for i in reversed(range(first, len(relu))):
        input_shape, weight_shape = inputs_shape[i], weights_shape[i]
        if output_mask[1 + i] and input_shape is not None:
            products += features * input_shape[-1]
        if weight_shape is None or not (i > first or output_mask[0]):
            break
        products += prod(weight_shape)
        features = weight_shape[1]
    return 2 * rows * products


LINEAR = Operator(
    name="linear",
    module="Linear",
    stock=F.linear,
    onnx=F.linear,
    fakes={"linear": _linear_fake, "linear_backward": _linear_backward_fake},
    flops={"linear": _linear_flops, "linear_backward": _linear_backward_flops},
)

LINEAR_RELU = Operator(
    name="linear_relu",
    module="LinearReLU",
    stock=_tensor_classes.linear_relu,
    onnx=_tensor_classes.linear_relu,
    fakes={
        "linear_relu": _linear_fake,
        "linear_relu_backward": _linear_relu_backward_fake,
    },
    flops={
        "linear_relu": _linear_flops,
        "linear_relu_backward": _linear_relu_backward_flops,
    },
)


# ---- log_softmax ---------------------------------------------------------------------------------


def _log_softmax_fake(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    return input.new_empty(input.shape, dtype=dtype)


def _log_softmax_backward_fake(
    grad_output: Tensor, output: Tensor, dim: int, dtype: torch.dtype | None = None
) -> Tensor:
    return output.new_empty(output.shape, dtype=dtype)


def _log_softmax_onnx(input: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    return F.log_softmax(input, dim, dtype=dtype)


LOG_SOFTMAX = Operator(
    name="log_softmax",
    module="LogSoftmax",
    stock=F.log_softmax,
    onnx=_log_softmax_onnx,
    fakes={
        "log_softmax": _log_softmax_fake,
        "log_softmax_backward": _log_softmax_backward_fake,
    },
    stock_module=torch.nn.LogSoftmax,
)


# ---- what the losses share -----------------------------------------------------------------------


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype the kernels sum in: float64 for float64, float32 for narrower ones."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _per_row_shape(input: Tensor) -> torch.Size:
    """The input's shape without its class dimension."""
    return input.shape[:1] + input.shape[2:] if input.dim() > 1 else torch.Size()


def _loss(input: Tensor, reduction: str, dtype: torch.dtype | None = None) -> Tensor:
    return input.new_empty(_per_row_shape(input) if reduction == "none" else (), dtype=dtype)


def _total_weight(input: Tensor) -> Tensor:
    return input.new_empty((), dtype=_accumulate_dtype(input.dtype))


# ---- nll_loss ------------------------------------------------------------------------------------


def _nll_loss_forward_fake(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    return _loss(input, reduction, dtype), _total_weight(input)


def _nll_loss_backward_fake(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    total_weight: Tensor,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    return input.new_empty(input.shape)


def _nll_loss_onnx(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    dtype: torch.dtype | None = None,
) -> Tensor:
    log_probs = input if dtype is None else input.to(dtype)
    return F.nll_loss(
        log_probs, target.long(), weight, ignore_index=ignore_index, reduction=reduction
    )


NLL_LOSS = Operator(
    name="nll_loss",
    module="NLLLoss",
    stock=F.nll_loss,
    onnx=_nll_loss_onnx,
    fakes={
        "nll_loss_forward": _nll_loss_forward_fake,
        "nll_loss_backward": _nll_loss_backward_fake,
    },
    stock_module=torch.nn.NLLLoss,
)


# ---- cross_entropy -------------------------------------------------------------------------------


def _laid_out_as_logits(logits: Tensor) -> Tensor:
    """An empty tensor, contiguous or with the classes last in memory, like the logits."""
    if logits.dim() > 2 and logits.movedim(1, -1).is_contiguous():
        return logits.new_empty(logits.movedim(1, -1).shape).movedim(-1, 1)
    return logits.new_empty(logits.shape)


def _cross_entropy_forward_fake(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    keep: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    sums = _accumulate_dtype(input.dtype)
    has_lse = keep and sums != input.dtype
    return (
        _loss(input, reduction, dtype),
        _laid_out_as_logits(input) if keep else None,
        input.new_empty((2, *_per_row_shape(input)), dtype=sums) if has_lse else None,
        _total_weight(input),
    )


def _cross_entropy_backward_fake(grad_output: Tensor, kept: Tensor, *others: object) -> Tensor:
    return _laid_out_as_logits(kept)


def _returns_nothing(*arguments: object) -> None:
    return None


def _cross_entropy_onnx(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    if label_smoothing or target.is_floating_point():
        # The exporters silently drop label smoothing, and take class indices only.
        return reference.cross_entropy(
            input, target, weight, ignore_index, reduction, label_smoothing, dtype
        )
    return F.cross_entropy(
        input if dtype is None else input.to(dtype),
        target.long(),
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
    )


CROSS_ENTROPY = Operator(
    name="cross_entropy",
    module="CrossEntropyLoss",
    stock=F.cross_entropy,
    onnx=_cross_entropy_onnx,
    fakes={
        "cross_entropy_forward": _cross_entropy_forward_fake,
        "cross_entropy_backward": _cross_entropy_backward_fake,
        "cross_entropy_backward_": _returns_nothing,
    },
    stock_module=torch.nn.CrossEntropyLoss,
)


# ---- linear_cross_entropy ------------------------------------------------------------------------


def _gradients_of_head(
    input: Tensor,
    linear_weight: Tensor,
    dtype: torch.dtype,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    shapes = (input.shape, linear_weight.shape, linear_weight.shape[:1])
    grad_input, grad_weight, grad_bias = (
        input.new_empty(shape, dtype=dtype) if wanted else None
        for shape, wanted in zip(shapes, output_mask, strict=True)
    )
    return grad_input, grad_weight, grad_bias


def _linear_cross_entropy_forward_fake(
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
    output_mask: list[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    sums = _accumulate_dtype(input.dtype)
    loss_dtype = input.dtype if dtype is None else dtype
    rows = input.shape[:-1]
    if reduction == "none":
        loss = input.new_empty(rows, dtype=loss_dtype)
        return loss, None, None, None, input.new_empty((2, *rows), dtype=sums)
    gradients = _gradients_of_head(input, linear_weight, sums, output_mask)
    return input.new_empty((), dtype=loss_dtype), *gradients, None


def _linear_cross_entropy_backward_fake(
    grad_output: Tensor, input: Tensor, linear_weight: Tensor, *others: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return _gradients_of_head(input, linear_weight, input.dtype, others[-1])


def _linear_cross_entropy_flops(
    input_shape: torch.Size, weight_shape: torch.Size, output_mask: list[bool]
) -> int:
    """Counts the logits, and as much for each of the two products with their gradient."""
    wants_input, wants_weight, _ = output_mask
    return 2 * prod(input_shape) * weight_shape[0] * (1 + wants_input + wants_weight)


def _linear_cross_entropy_forward_flops(
    input_shape: torch.Size, weight_shape: torch.Size, *others: Any, **kwargs: Any
) -> int:
    reduction = others[3]
    wanted = [False] * 3 if reduction == "none" else others[-1]
    return _linear_cross_entropy_flops(input_shape, weight_shape, wanted)


def _linear_cross_entropy_backward_flops(
    grad_output_shape: torch.Size,
    input_shape: torch.Size,
    weight_shape: torch.Size,
    *others: Any,
    **kwargs: Any,
) -> int:
    return _linear_cross_entropy_flops(input_shape, weight_shape, others[-1])


LINEAR_CROSS_ENTROPY = Operator(
    name="linear_cross_entropy",
    module="LinearCrossEntropyLoss",
    stock=getattr(F, "linear_cross_entropy", _tensor_classes.linear_cross_entropy),
    onnx=reference.linear_cross_entropy,
    fakes={
        "linear_cross_entropy_forward": _linear_cross_entropy_forward_fake,
        "linear_cross_entropy_backward": _linear_cross_entropy_backward_fake,
    },
    flops={
        "linear_cross_entropy_forward": _linear_cross_entropy_forward_flops,
        "linear_cross_entropy_backward": _linear_cross_entropy_backward_flops,
    },
    stock_module=getattr(torch.nn, "LinearCrossEntropyLoss", None),
)


# ---- SGD -----------------------------------------------------------------------------------------


def _sgd_step_fake(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    **options: object,
) -> None:
    # A single meta tensor among others dispatches here, which would skip the step silently.
    lists = {"params": params, "grads": grads, "momentum_buffers": momentum_buffers}
    tensors = {
        f"{name}[{i}]": tensor for name, list_ in lists.items() for i, tensor in enumerate(list_)
    }
    tensors.update({name: value for name, value in options.items() if isinstance(value, Tensor)})
    on_meta = [name for name, tensor in tensors.items() if tensor.device.type == "meta"]
    if 0 < len(on_meta) < len(tensors):
        raise RuntimeError(
            f"sgd_step_: expected all tensors or none on the meta device, but {on_meta[0]} is there"
        )


SGD = Optimizer("SGD", fakes={"sgd_step_": _sgd_step_fake, "sgd_step_.tensor_lr": _sgd_step_fake})


# ---- the table -----------------------------------------------------------------------------------

# Operators over lists of layers: `onnx` takes them like reference.mlp, `stock` like functional.mlp.
MLP = Operator(
    name="mlp",
    module="MLP",
    stock=_tensor_classes.mlp,
    onnx=reference.mlp,
    fakes={"mlp_forward": _mlp_forward_fake, "mlp_backward": _mlp_backward_fake},
    flops={"mlp": _mlp_flops, "mlp_forward": _mlp_flops, "mlp_backward": _mlp_backward_flops},
)
CHAINS = (MLP,)

OPERATORS = (LINEAR, LINEAR_RELU, LOG_SOFTMAX, NLL_LOSS, CROSS_ENTROPY, LINEAR_CROSS_ENTROPY)
OPTIMIZERS = (SGD,)

# The operators for an ONNX export, called like those of torch.ops.fastnn.
ONNX = SimpleNamespace(**{operator.name: operator.onnx for operator in (*OPERATORS, *CHAINS)})


def register() -> None:
    """Registers fake kernels and FLOP formulas with PyTorch; the extension must be loaded."""
    for record in (*OPERATORS, *CHAINS, *OPTIMIZERS):
        for name, fake in record.fakes.items():
            register_fake(f"fastnn::{name}")(fake)
    when_imported("torch.utils.flop_counter", _register_flops)


def _register_flops(counter: ModuleType) -> None:
    for operator in (*OPERATORS, *CHAINS):
        for name, formula in operator.flops.items():
            counter.register_flop_formula(getattr(torch.ops.fastnn, name))(formula)

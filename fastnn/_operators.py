"""Fake kernels: the shapes, dtypes and devices of each operator's outputs, for torch.compile,
torch.export and the meta device. ``nll_loss`` and ``cross_entropy`` need none: their kernels only
call ``*_forward``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import register_fake


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype the kernels sum in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@register_fake("fastnn::linear_relu")
def _linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(input, weight, bias).contiguous()


@register_fake("fastnn::linear_relu_backward")
def _linear_relu_backward(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    output: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    *batch, out_features = output.shape
    wants_input, wants_weight, wants_bias = output_mask
    grad_input = grad_weight = None
    if wants_input and weight is not None:
        grad_input = output.new_empty((*batch, weight.shape[1]))
    if wants_weight and input is not None:
        grad_weight = output.new_empty((out_features, input.shape[-1]))
    return grad_input, grad_weight, output.new_empty((out_features,)) if wants_bias else None


@register_fake("fastnn::log_softmax")
def _log_softmax(input: Tensor, dim: int) -> Tensor:
    return input.new_empty(input.shape)


@register_fake("fastnn::log_softmax_backward")
def _log_softmax_backward(grad_output: Tensor, output: Tensor, dim: int) -> Tensor:
    return output.new_empty(output.shape)


def _per_row_shape(input: Tensor) -> torch.Size:
    """The shape of one value per row of classes: the input's without its class dimension."""
    return input.shape[:1] + input.shape[2:] if input.dim() > 1 else torch.Size()


def _loss(input: Tensor, reduction: str) -> Tensor:
    return input.new_empty(_per_row_shape(input) if reduction == "none" else ())


def _total_weight(input: Tensor) -> Tensor:
    return input.new_empty((), dtype=accumulate_dtype(input.dtype))


@register_fake("fastnn::nll_loss_forward")
def _nll_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str
) -> tuple[Tensor, Tensor]:
    return _loss(input, reduction), _total_weight(input)


@register_fake("fastnn::nll_loss_backward")
def _nll_loss_backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    total_weight: Tensor,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    return input.new_empty(input.shape)


def _laid_out_as_logits(logits: Tensor) -> Tensor:
    """Contiguous, or as the logits where the classes lie last, as in channels_last."""
    if logits.dim() > 2 and logits.movedim(1, -1).is_contiguous():
        return logits.new_empty(logits.movedim(1, -1).shape).movedim(-1, 1)
    return logits.new_empty(logits.shape)


@register_fake("fastnn::cross_entropy_forward")
def _cross_entropy_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    dtype = accumulate_dtype(input.dtype)
    has_lse = keep and dtype != input.dtype
    return (
        _loss(input, reduction),
        _laid_out_as_logits(input) if keep else None,
        input.new_empty((2, *_per_row_shape(input)), dtype=dtype) if has_lse else None,
        _total_weight(input),
    )


@register_fake("fastnn::cross_entropy_backward")
def _cross_entropy_backward(grad_output: Tensor, kept: Tensor, *others: object) -> Tensor:
    return _laid_out_as_logits(kept)


@register_fake("fastnn::cross_entropy_backward_")
def _cross_entropy_backward_(*arguments: object) -> None:
    return None


@register_fake("fastnn::sgd_step_")
@register_fake("fastnn::sgd_step_.tensor_lr")
def _sgd_step_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    **options: object,
) -> None:
    # One meta tensor among others brings the call here, where nothing would be stepped.
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

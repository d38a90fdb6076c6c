"""linear_cross_entropy with the weight's classes sharded over processes: each computes the logits
of its classes, block by block. They exchange three numbers per row, and the input's gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastnn import reference
from fastnn._arguments import LinearLossOptions
from fastnn._dtensor import is_dtensor, local_part
from fastnn._extension import extension
from fastnn._tensor_classes import mean_divisor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_split_by_classes(
    linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, label_smoothing: float
) -> bool:
    """Whether this implementation applies: weight and bias sharded by classes over a mesh of one
    dimension, and class indices as targets. Label smoothing would need sums over all logits."""
    if linear_weight.dim() != 2 or target.is_floating_point() or label_smoothing != 0:
        return False
    return all(
        is_dtensor(each) and each.device_mesh.ndim == 1 and each.placements[0].is_shard(0)
        for each in (linear_weight, *([] if linear_bias is None else [linear_bias]))
    )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    options: LinearLossOptions,
) -> Tensor:
    """:func:`fastnn.functional.linear_cross_entropy` with a weight that is sharded by classes.

    Args:
        input: whole in each process: a tensor, or a DTensor, whose loss is a DTensor, too.
        target: class indices; whole in each process, a tensor or a DTensor.
    """
    mesh = cast("DTensor", linear_weight).device_mesh
    classes, processes = linear_weight.shape[0], mesh.size()
    first = min(classes, mesh.get_local_rank() * -(-classes // processes))
    ignored = options.ignored
    weight, reduction, _, _, softcap, logit_scale, z_loss, normalizer = options
    numbers = (first, classes, ignored, softcap, logit_scale, mesh.get_group())
    rows, targets = _whole(input), _whole(target)
    bias = None if linear_bias is None else local_part(linear_bias)
    losses, lse = _VocabularyParallel.apply(
        rows.flatten(0, -2) if rows.dim() > 1 else rows[None],
        local_part(linear_weight),
        targets.reshape(-1),
        bias,
        numbers,
    )
    losses, lse = losses.reshape(rows.shape[:-1]), lse.reshape(rows.shape[:-1])
    counts = targets != ignored
    if weight is not None:
        losses = losses * _whole(weight)[targets.where(counts, 0)]
    if z_loss != 0:
        losses = losses + z_loss * lse.square().where(counts, 0)
    if reduction != "none":
        if normalizer is None and reduction == "mean":
            whole_weight = None if weight is None else _whole(weight)
            normalizer = mean_divisor(targets, whole_weight, ignored, 0)
        losses = losses.sum() if normalizer is None else losses.sum() / normalizer
    losses = losses.to(input.dtype)
    if not is_dtensor(input):
        return losses
    replicate = torch.distributed.tensor.Replicate()
    return torch.distributed.tensor.DTensor.from_local(losses, mesh, [replicate])


def _whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be a DTensor."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


class _VocabularyParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        numbers: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor]:
        first, classes, ignore_index, softcap, scale, group = numbers
        counts = target != ignore_index
        bad = target[counts & ((target < 0) | (target >= classes))]
        if target.is_cpu and bad.numel():
            raise IndexError(f"Target {int(bad[0])} is out of bounds: there are {classes} classes.")
        index = target.long() - first
        is_mine = counts & (index >= 0) & (index < len(weight))
        index = index.where(is_mine, 0)
        wide = torch.promote_types(input.dtype, torch.float32)
        options = (None, "none", -1, 0.0, softcap, scale, 0.0, None, wide, [False] * 3)
        if len(weight):
            losses, *_, lse = _operators().linear_cross_entropy_forward(
                input, weight, index, bias, *options
            )
            of_target = (lse.sum(0) - losses).where(is_mine, 0)
        else:
            lse = input.new_full((2, len(input)), -torch.inf, dtype=wide)
            of_target = lse.new_zeros(len(input))
        # The processes' numbers in rank order: every process computes the same bits.
        parts = [torch.empty_like(torch.cat([lse, of_target[None]])) for _ in range(group.size())]
        torch.distributed.all_gather(parts, torch.cat([lse, of_target[None]]), group=group)
        maximum, log_sum, of_target = torch.stack(parts).unbind(1)
        shift = maximum.amax(0)
        log_total = torch.exp(maximum + log_sum - shift).sum(0).log()
        loss = (log_total - (of_target.sum(0) - shift)).where(counts, 0)
        ctx.save_for_backward(input, weight, index, bias, is_mine, counts)
        ctx.lse = torch.stack([shift, log_total])
        ctx.numbers = softcap, scale, wide, group
        return loss, ctx.lse.sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, index, bias, is_mine, counts = ctx.saved_tensors
        softcap, scale, wide, group = ctx.numbers
        wants_input, wants_weight, _, wants_bias, _ = ctx.needs_input_grad
        of_target = grad_loss.where(counts, 0)
        of_softmax = (of_target + grad_lse).contiguous()
        grads: list[Tensor | None] = [None, None, None]
        if len(weight):
            mask = [wants_input, wants_weight, wants_bias]
            options = (None, ctx.lse, -1, 0.0, softcap, scale, 0.0, wide, mask)
            grads = list(
                _operators().linear_cross_entropy_backward(
                    of_softmax, input, weight, index, bias, *options
                )
            )
            # The operator subtracted `of_softmax` at each row's class, instead of `of_target`.
            correction = of_softmax - of_target.where(is_mine, 0)
            if softcap is not None or scale != 1:
                correction = correction * _slope(input, weight[index], bias, index, softcap, scale)
            _add_at_class(grads, correction.to(input.dtype), input, weight, index)
        if wants_input:
            whole_gradient = torch.zeros_like(input) if grads[0] is None else grads[0]
            torch.distributed.all_reduce(whole_gradient, group=group)
            grads[0] = whole_gradient
        if wants_weight and grads[1] is None:
            grads[1] = torch.zeros_like(weight)
        return grads[0], grads[1], None, grads[2], None


def _add_at_class(
    grads: list[Tensor | None], factor: Tensor, input: Tensor, weight: Tensor, index: Tensor
) -> None:
    """Adds the part of the gradient that comes from the logit of one class per row."""
    grad_input, grad_weight, grad_bias = grads
    if grad_input is not None:
        grad_input += factor[:, None] * weight[index]
    if grad_weight is not None:
        grad_weight.index_add_(0, index, factor[:, None] * input)
    if grad_bias is not None:
        grad_bias.index_add_(0, index, factor)


def _slope(
    input: Tensor,
    weight_rows: Tensor,
    bias: Tensor | None,
    index: Tensor,
    softcap: float | None,
    scale: float,
) -> Tensor | float:
    """The derivative of the adjusted logit of one class per row."""
    if softcap is None:
        return scale
    logit = (input * weight_rows).sum(1) + (0 if bias is None else bias[index])
    return (1 - torch.tanh(logit * scale / softcap).square()) * scale


def _operators() -> Any:
    return reference if extension is None else torch.ops.fastnn

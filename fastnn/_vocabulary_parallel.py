"""linear_cross_entropy with the weight's classes sharded over processes: each computes the logits
of its classes, block by block. They exchange a few numbers per row, and the input's gradient."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastnn._arguments import LinearLossOptions, check_rows_of_target
from fastnn._dtensor import is_dtensor, local_part
from fastnn._head_statistics import (
    Head,
    LinearCrossEntropyOutput,
    RowStatistics,
    check_returns,
    named_statistics,
    row_statistics,
)
from fastnn._tensor_classes import mean_divisor
from fastnn.reference._losses import check_reduction

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def is_split_by_classes(
    linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, options: LinearLossOptions
) -> bool:
    """Whether this implementation applies: weight and bias sharded by classes over a mesh of one
    dimension, and targets without a gradient. Smoothing and probabilities need sums over all
    logits, which without a softcap are products with sums of the weight."""
    is_spread = target.is_floating_point() or options.label_smoothing != 0
    if linear_weight.dim() != 2 or target.requires_grad or (is_spread and options.softcap):
        return False
    return all(
        is_dtensor(each) and each.device_mesh.ndim == 1 and each.placements[0].is_shard(0)
        for each in (linear_weight, *([] if linear_bias is None else [linear_bias]))
    )


class _Distribution(NamedTuple):
    """Factors of each row's log-probabilities: ``at_class`` for one class, ``spread`` for all."""

    counts: Tensor  # (N)
    classes: Tensor  # (N); 0 in ignored rows
    at_class: Tensor  # (N)
    spread: Tensor | None  # (C) or (N, C)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    options: LinearLossOptions,
    returns: Collection[str],
) -> Any:
    """:func:`fastnn.functional.linear_cross_entropy` with a weight that is sharded by classes.

    Args:
        input: whole in each process: a tensor, or a DTensor, whose loss is a DTensor, too.
        target: class indices or probabilities; whole in each process, a tensor or a DTensor.
    """
    mesh = cast("DTensor", linear_weight).device_mesh
    group, classes = mesh.get_group(), len(linear_weight)
    rows, target = _whole(input), _whole(target)
    _check(rows, target, classes, options)
    if returns:
        check_returns(returns, linear_weight, target)
    head = Head(
        _Shared.apply(rows.reshape(-1, rows.shape[-1]), group),
        local_part(linear_weight),
        None if linear_bias is None else local_part(linear_bias),
        options.softcap,
        options.logit_scale,
    )
    dtype = torch.promote_types(rows.dtype, torch.float32)
    class_weight = rows.new_ones(classes) if options.weight is None else _whole(options.weight)
    class_weight = class_weight.to(dtype)
    q = _distribution(target, class_weight, options)
    first = min(classes, mesh.get_local_rank() * -(-classes // mesh.size()))
    of_rows, spread_logits = _joined(head, q, first, group)
    losses = q.at_class * -of_rows.logprobs
    if q.spread is not None:
        losses = losses + q.spread.sum(-1) * of_rows.lse - spread_logits
    losses = losses + options.z_loss * of_rows.lse.square()
    losses = losses.where(q.counts, 0).reshape(rows.shape[:-1])
    loss = _reduced(losses, target, class_weight, options).to(input.dtype)
    statistics = named_statistics(returns, of_rows, target, options.ignored) if returns else {}
    if is_dtensor(input):
        loss, statistics = (
            _replicated(loss, mesh),
            {name: _replicated(value, mesh) for name, value in statistics.items()},
        )
    return LinearCrossEntropyOutput(loss, **statistics) if returns else loss


def _whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be a DTensor."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def _replicated(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    placements = [torch.distributed.tensor.Replicate()]
    return torch.distributed.tensor.DTensor.from_local(tensor, mesh, placements)


def _check(rows: Tensor, target: Tensor, classes: int, options: LinearLossOptions) -> None:
    """Raises the operator's errors for arguments that this implementation uses itself."""
    check_reduction(options.reduction, options.normalizer)
    is_index = not target.is_floating_point()
    check_rows_of_target(target, rows.shape[:-1], is_index)
    if is_index:
        bad = target[(target != options.ignored) & ((target < 0) | (target >= classes))]
        if target.is_cpu and bad.numel():
            raise IndexError(f"Target {int(bad[0])} is out of bounds: there are {classes} classes.")
    elif options.ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    elif target.shape != (*rows.shape[:-1], classes):
        expected = [*rows.shape[:-1], classes]
        raise RuntimeError(f"Expected target size {expected}, got {list(target.shape)}")


def _distribution(
    target: Tensor, class_weight: Tensor, options: LinearLossOptions
) -> _Distribution:
    smoothing, classes = options.label_smoothing, len(class_weight)
    if target.is_floating_point():
        probabilities = target.reshape(-1, classes).to(class_weight.dtype)
        spread = ((1 - smoothing) * probabilities + smoothing / classes) * class_weight
        zeros = torch.zeros_like(probabilities[:, 0])
        return _Distribution(zeros == 0, zeros.long(), zeros, spread)
    counts = (target != options.ignored).reshape(-1)
    index = target.reshape(-1).long().where(counts, 0)
    uniform = class_weight * smoothing / classes if smoothing else None
    return _Distribution(counts, index, (1 - smoothing) * class_weight[index], uniform)


def _joined(
    head: Head, q: _Distribution, first: int, group: ProcessGroup
) -> tuple[RowStatistics, Tensor]:
    """The statistics over all classes, and the sum of all logits times ``q.spread``.

    Args:
        head: with this process's classes, starting at ``first``.
    """
    index = q.classes - first
    is_own = (index >= 0) & (index < len(head.weight))
    own = row_statistics(head, index.where(is_own, 0))
    spread = None if q.spread is None else q.spread[..., first : first + len(head.weight)]
    numbers = torch.stack([
        own.lse.clamp_min(torch.finfo(own.lse.dtype).min / 2),  # a process may have no classes
        (own.lse + own.logprobs).where(is_own, 0),
        (own.lse - own.entropy).where(own.lse.isfinite(), 0),
        torch.zeros_like(own.lse) if spread is None else _expected_logit(head, spread),
    ])  # fmt: skip
    lse, logits, mean_logits, spread_logits = _Gathered.apply(numbers, group).unbind(1)
    shift = lse.detach().amax(0)
    log_total = (lse - shift).logsumexp(0)
    total = shift + log_total
    share = (lse - total).exp()
    maximum, predictions = _gathered(own.maximum, group), _gathered(own.predictions + first, group)
    largest, winner = maximum.max(0)
    joined = RowStatistics(
        lse=total,
        logprobs=logits.sum(0) - shift - log_total,
        entropy=total - (share * mean_logits).sum(0),
        maximum=largest,
        predictions=predictions.gather(0, winner[None])[0],
    )
    return joined, spread_logits.sum(0)


def _expected_logit(head: Head, spread: Tensor) -> Tensor:
    """``sum_c spread_c logit_c`` of each row, without the logits."""
    wide = head.widened()
    logits = ((spread @ wide.weight) * wide.input).sum(-1)
    if wide.bias is not None:
        logits = logits + spread @ wide.bias
    return logits * head.logit_scale


def _reduced(
    losses: Tensor, target: Tensor, class_weight: Tensor, options: LinearLossOptions
) -> Tensor:
    if options.reduction == "none":
        return losses
    divisor = options.normalizer
    if divisor is None and options.reduction == "mean":
        ignored = None if target.is_floating_point() else options.ignored
        divisor = mean_divisor(target, class_weight, ignored, losses.numel())
    return losses.sum() if divisor is None else losses.sum() / divisor


def _gathered(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """The processes' tensors in rank order: every process gets the same bits."""
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    torch.distributed.all_gather(parts, tensor.contiguous(), group=group)
    return torch.stack(parts)


class _Gathered(torch.autograd.Function):
    """:func:`_gathered` for results that every process uses in the same way."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.rank = group.rank()
        return _gathered(tensor, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.rank], None


class _Shared(torch.autograd.Function):
    """A tensor that each process has whole and uses for its own classes: gradients are summed."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous(memory_format=torch.contiguous_format).clone()
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None

"""The loss of a classifier's last layer, from operators that take a matrix or a single row."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from fastnn._arguments import (
    LinearLossOptions,
    check_linear_cross_entropy_shapes,
    check_rows_of_target,
)
from fastnn._function import under_autocast
from fastnn._tensor_classes import mean_divisor


def head_loss(
    operator: Callable[..., Tensor],
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    options: LinearLossOptions,
) -> Tensor:
    """Calls the operator of ``linear_cross_entropy`` for arguments of any shape that it takes."""
    classes, *positions = check_linear_cross_entropy_shapes(input, linear_weight, linear_bias)
    rows = tuple(input.shape[:-1])
    is_index = target.shape != (*rows, classes, *positions)
    if not is_index and options.ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    normalizer = options.normalizer
    if positions:
        check_rows_of_target(target, (*rows, *positions), is_index)
        if normalizer is None and options.reduction == "mean":
            ignored = options.ignored if is_index else None
            count = prod((*rows, *positions))
            normalizer = mean_divisor(target, options.weight, ignored, count)
    elif len(rows) > 1:
        check_rows_of_target(target, rows, is_index)
    if normalizer is not None and not isinstance(normalizer, Tensor):
        normalizer = input.new_full((), normalizer, dtype=torch.float64)
    options = options._replace(ignore_index=options.ignored, normalizer=normalizer)
    if positions:
        head = input, linear_weight, target, linear_bias
        return _loss_at_positions(operator, head, options, is_index)
    if len(rows) <= 1:
        return operator(input, linear_weight, target, linear_bias, *options, None)
    targets = target.flatten() if is_index else target.flatten(0, -2)
    losses = operator(input.flatten(0, -2), linear_weight, targets, linear_bias, *options, None)
    return losses.reshape(rows) if options.reduction == "none" else losses


def _loss_at_positions(
    operator: Callable[..., Tensor],
    head: tuple[Tensor, Tensor, Tensor, Tensor | None],
    options: LinearLossOptions,
    is_index: bool,
) -> Tensor:
    """The loss of a classifier for each of the positions ``(d1, ..., dK)``."""
    input, linear_weight, target, linear_bias = head
    # The input's gradients at all positions are added in the wide dtype, to be rounded once.
    dtype = torch.promote_types(input.dtype, torch.float32)
    if options.weight is not None:
        options = options._replace(weight=options.weight.to(dtype))
    if not is_index:
        target = target.to(dtype)
    wide_input = input.to(dtype)
    weights = linear_weight.flatten(1, -2).unbind(1)
    targets = target.flatten(1 if is_index else 2).unbind(-1)
    biases = [None] * len(weights) if linear_bias is None else linear_bias.flatten(1).unbind(1)
    losses = [
        operator(wide_input, w.to(dtype), t, None if b is None else b.to(dtype), *options, None)
        for w, t, b in zip(weights, targets, biases, strict=True)
    ]
    if options.reduction == "none":
        positions = linear_weight.shape[1:-1]
        loss = torch.stack(losses, 1).reshape(*input.shape[:-1], *positions)
    else:
        loss = torch.stack(losses).sum()
    return loss if under_autocast(input.device.type) else loss.to(input.dtype)

"""Shared by the losses: the checks of their arguments, rows that count, the reductions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastnn._torch import running_transform


def class_dim_of(input: Tensor) -> int:
    return 0 if input.dim() == 1 else 1


def per_class(weight: Tensor, input: Tensor) -> Tensor:
    """The class weights, shaped to broadcast against the input."""
    shape = [1] * input.dim()
    shape[class_dim_of(input)] = -1
    return weight.view(shape)


def check_reduction(reduction: str, normalizer: object = None) -> None:
    """Raises ValueError for an unknown reduction, or a normalizer without a sum to divide."""
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if reduction == "none" and normalizer is not None:
        raise ValueError("normalizer takes reduction='mean' or 'sum', but reduction is 'none'")


def check_loss_arguments(input: Tensor, weight: Tensor | None, reduction: str) -> None:
    check_reduction(reduction)
    if input.dim() < 1:
        raise ValueError("Expected 1 or more dimensions in input (got 0)")
    if not input.is_floating_point():
        raise NotImplementedError(f"input must be floating-point, got {input.dtype}")
    classes = input.shape[class_dim_of(input)]
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


def counts_and_index(
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
    classes = input.shape[class_dim_of(input)]
    bad = target[counts & ((target < 0) | (target >= classes))]
    if bad.numel():
        raise IndexError(
            f"Target {int(bad[0])} is out of bounds: input has {classes} classes, so that a "
            f"target must be in [0, {classes}) or equal ignore_index ({ignore_index})."
        )
    return counts, target.where(counts, 0)


def reduce(losses: Tensor, total_weight: Tensor, reduction: str) -> Tensor:
    """The losses per row, their sum, or their sum divided by ``total_weight``."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / nan_for_zero(total_weight)


def grad_per_row(
    grad_output: Tensor, input: Tensor, total_weight: Tensor, reduction: str
) -> Tensor:
    """The gradient of each row's loss, shaped to broadcast against the input."""
    grad = grad_output.to(total_weight.dtype)
    if reduction == "none":
        return grad.unsqueeze(class_dim_of(input))
    return grad / nan_for_zero(total_weight) if reduction == "mean" else grad


def nan_for_zero(total_weight: Tensor) -> Tensor:
    """Makes a mean over nothing NaN: the label-smoothing share of its sum needn't be zero."""
    return total_weight.where(total_weight != 0, torch.nan)


def gather_class(input: Tensor, index: Tensor) -> Tensor:
    """The input's value at each row's class; zeros if there are no classes."""
    class_dim = class_dim_of(input)
    if input.shape[class_dim] == 0:
        return input.sum(class_dim)
    return input.gather(class_dim, index.unsqueeze(class_dim)).squeeze(class_dim)


def weights_of_rows(input: Tensor, counts: Tensor, index: Tensor, weight: Tensor | None) -> Tensor:
    """The weight of each row's class, zero for ignored rows."""
    if weight is None or weight.numel() == 0:
        return counts.to(input.dtype)
    weights = weight.to(input.dtype).index_select(0, index.flatten())
    return weights.view(index.shape).where(counts, 0)


def is_class_of_row(input: Tensor, counts: Tensor, index: Tensor) -> Tensor:
    """A mask in the input's shape: whether an element is its row's class and the row counts."""
    class_dim = class_dim_of(input)
    classes = torch.arange(input.shape[class_dim], device=input.device)
    is_class = index.unsqueeze(class_dim) == per_class(classes, input)
    return is_class & counts.unsqueeze(class_dim)

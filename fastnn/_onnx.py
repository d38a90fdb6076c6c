"""The operators in those of torch's that its ONNX exporters translate; nothing runs them but an
export (see :func:`fastnn._extension.operators`)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from fastnn import reference

__all__ = ["cross_entropy", "linear_relu", "log_softmax", "nll_loss"]


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.relu(functional.linear(input, weight, bias))


def log_softmax(input: Tensor, dim: int) -> Tensor:
    return functional.log_softmax(input, dim)


def nll_loss(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str
) -> Tensor:
    return functional.nll_loss(
        input, target.long(), weight, ignore_index=ignore_index, reduction=reduction
    )


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    if label_smoothing or target.is_floating_point():
        # The exporters drop the smoothing without a word, and take class indices only.
        return reference.cross_entropy(
            input, target, weight, ignore_index, reduction, label_smoothing
        )
    return functional.cross_entropy(
        input, target.long(), weight, ignore_index=ignore_index, reduction=reduction
    )

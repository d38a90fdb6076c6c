"""What a classifier's last layer says of each row beside its loss: block by block, in torch's own
operators, so that the logits of one block alone exist. The backward computes them once more."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastnn._torch import in_forward_mode, running_transform

# Elements of a block's logits.
_ELEMENTS = 2**23

STATISTICS = ("lse", "logprobs", "entropy", "accuracy", "predictions")


class LinearCrossEntropyOutput(NamedTuple):
    """The loss, and what was asked for of the rest; None where it wasn't."""

    loss: Tensor
    lse: Tensor | None = None
    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    accuracy: Tensor | None = None
    predictions: Tensor | None = None


class LogProbs(NamedTuple):
    """The log-probability of each row's target, and the entropy of its distribution."""

    logprobs: Tensor
    entropy: Tensor


def head_statistics(
    names: Collection[str],
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
) -> dict[str, Tensor]:
    """The statistics of those names, of the shape of the rows; ``accuracy`` is one number.

    Args:
        input: ``(*, D)``.
        linear_weight: ``(C, D)``.
        target: class indices ``(*)``; those of rows that count for nothing are ``ignore_index``.
    """
    rows = input.shape[:-1]
    matrix, targets = input.reshape(-1, input.shape[-1]), target.reshape(-1).long()
    size = max(1, _ELEMENTS // max(1, len(linear_weight)))
    # A transform records what it needs itself.
    recomputes = torch.is_grad_enabled() and not in_forward_mode() and running_transform() is None
    parts = []
    for x, t in zip(matrix.split(size), targets.split(size), strict=True):
        arguments = (x, linear_weight, t, linear_bias, ignore_index, softcap, logit_scale)
        if recomputes:
            parts.append(checkpoint(_block_statistics, *arguments, use_reentrant=False))
        else:
            parts.append(_block_statistics(*arguments))
    all_rows = [torch.cat(part).reshape(rows) for part in zip(*parts, strict=True)]
    results = dict(zip(("lse", "logprobs", "entropy", "predictions"), all_rows, strict=True))
    counts = target != ignore_index
    is_right = (results["predictions"] == target) & counts
    results["accuracy"] = is_right.sum() / counts.sum()
    return {name: results[name] for name in names}


def _block_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(input.dtype, torch.float32)
    bias = None if linear_bias is None else linear_bias.to(dtype)
    # Under autocast the product is one of its dtype, and what follows is not.
    logits = F.linear(input.to(dtype), linear_weight.to(dtype), bias).to(dtype) * logit_scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    counts = target != ignore_index
    log_probs = logits.log_softmax(-1)
    of_target = log_probs.gather(-1, target.where(counts, 0).unsqueeze(-1)).squeeze(-1)
    # 0 log 0 is 0; its derivative too.
    entropy = -(log_probs.exp() * log_probs.clamp_min(torch.finfo(dtype).min)).sum(-1)
    lse = logits.logsumexp(-1)
    return (
        lse.where(counts, 0),
        of_target.where(counts, 0),
        entropy.where(counts, 0),
        logits.detach().argmax(-1),
    )

"""Statistics of each row besides the loss of a classifier's last layer: computed in blocks, so that
only one block's logits exist at a time. The backward recomputes them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnn._extension import operators
from fastnn._function import cast, under_autocast
from fastnn._torch import in_forward_mode, running_transform

# Logits per block, which takes two or three times their memory: more with more features, as each
# block reads the weight.
_FEWEST, _MOST = 2**19, 2**21

# The probability of such a class is 0 in float64, too.
_LEAST_LOG_PROB = -1000.0


class Head(NamedTuple):
    """A classifier's last layer, its input ``(N, D)``, and the adjustments of its logits."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float

    def cast(self, dtype: torch.dtype) -> Head:
        input, weight, bias = (cast(each, dtype) for each in self[:3])
        return Head(input, weight, bias, self.softcap, self.logit_scale)

    def widened(self) -> Head:
        """The same in the dtype of sums."""
        return self.cast(torch.promote_types(self.input.dtype, torch.float32))


class LinearCrossEntropyOutput(NamedTuple):
    """The loss, and the statistics that were requested; None for the others."""

    loss: Tensor
    lse: Tensor | None = None
    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    accuracy: Tensor | None = None
    predictions: Tensor | None = None


STATISTICS = LinearCrossEntropyOutput._fields[1:]


class LogProbs(NamedTuple):
    """The log-probability of each row's target, and the entropy of its distribution."""

    logprobs: Tensor
    entropy: Tensor


class RowStatistics(NamedTuple):
    """Numbers per row: the log-sum-exp of its logits, the log-probability of a class, the entropy,
    the largest logit, and its class."""

    lse: Tensor
    logprobs: Tensor
    entropy: Tensor
    maximum: Tensor
    predictions: Tensor


def check_returns(returns: Collection[str], linear_weight: Tensor, target: Tensor) -> None:
    """Raises for unknown statistics, and for a weight or targets that have none."""
    if isinstance(returns, str) or not set(returns) <= set(STATISTICS):
        raise ValueError(f"returns must be a tuple of {', '.join(STATISTICS)}, got {returns!r}")
    if linear_weight.dim() != 2:
        raise ValueError(
            "expected linear_weight with dimensionality 2 for each row's log-probability, "
            f"got {linear_weight.dim()}"
        )
    if target.is_floating_point():
        raise ValueError("what returns names needs class indices as target, got probabilities")


def head_statistics(
    names: Collection[str], head: Head, target: Tensor, ignore_index: int
) -> dict[str, Tensor]:
    """The named statistics, in the shape of the rows; ``accuracy`` is a single number.

    Args:
        head: the last layer; its input may have any leading shape.
        target: class indices of that shape; ``ignore_index`` in rows to ignore.
    """
    index = target.long().where(target != ignore_index, 0).reshape(-1)
    matrix = head._replace(input=head.input.reshape(-1, head.input.shape[-1]))
    return named_statistics(names, row_statistics(matrix, index), target, ignore_index)


def named_statistics(
    names: Collection[str], rows: RowStatistics, target: Tensor, ignore_index: int
) -> dict[str, Tensor]:
    """The named statistics, in the target's shape."""
    counts = target != ignore_index
    predictions = rows.predictions.reshape(target.shape)
    values = {
        "lse": rows.lse.reshape(target.shape).where(counts, 0),
        "logprobs": rows.logprobs.reshape(target.shape).where(counts, 0),
        "entropy": rows.entropy.reshape(target.shape).where(counts, 0),
        "accuracy": ((predictions == target) & counts).sum() / counts.sum(),
        "predictions": predictions,
    }
    return {name: values[name] for name in names}


def row_statistics(head: Head, index: Tensor) -> RowStatistics:
    """The statistics of each row; ``logprobs`` is that of the class given by ``index``."""
    device = head.input.device.type
    if under_autocast(device):
        with torch.autocast(device, enabled=False):
            return row_statistics(head.cast(torch.get_autocast_dtype(device)), index)
    # A transform differentiates by itself, and only supports torch's operators.
    is_plain = running_transform() is None and not in_forward_mode()
    return RowStatistics(*(_Statistics.apply if is_plain else _statistics_at_once)(index, *head))


class _Statistics(torch.autograd.Function):
    """:func:`_statistics_at_once`, computed in blocks."""

    @staticmethod
    def forward(ctx: Any, index: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        head = Head(*arguments)
        dtype = torch.promote_types(head.input.dtype, torch.float32)
        logprobs, entropy = (torch.zeros_like(index, dtype=dtype) for _ in range(2))
        lse, maximum = (torch.full_like(entropy, -torch.inf) for _ in range(2))
        predictions = torch.zeros_like(index)
        for rows, _, logits, terms, _ in _blocks(head.widened()):
            maximum[rows], predictions[rows] = logits.max(1)
            shift = maximum[rows].where(maximum[rows].isfinite(), 0)  # inf - inf is NaN
            of_index = logits.gather(1, index[rows, None]).squeeze(1) - shift
            logits.sub_(shift[:, None]).clamp_min_(_LEAST_LOG_PROB)
            total = torch.exp(logits, out=terms).sum(1)
            log_total = total.log()
            lse[rows] = shift + log_total
            logprobs[rows] = of_index - log_total
            entropy[rows] = log_total - terms.mul_(logits).sum(1) / total
        ctx.mark_non_differentiable(maximum, predictions)
        ctx.save_for_backward(head.input, head.weight, head.bias, index, lse, entropy)
        ctx.adjustment = head.softcap, head.logit_scale
        return lse, logprobs, entropy, maximum, predictions

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, index, lse, entropy = ctx.saved_tensors
        head = Head(*tensors, *ctx.adjustment)
        _, *wanted, _, _ = ctx.needs_input_grad
        grads = grads[:3]  # the others have no gradient
        if torch.is_grad_enabled():  # these gradients will be differentiated
            outputs = _statistics_at_once(index, *head)[:3]
            inputs = [each for each, wants in zip(tensors, wanted, strict=True) if wants]
            found = iter(torch.autograd.grad(outputs, inputs, grads, create_graph=True))
            return None, *(next(found) if wants else None for wants in wanted), None, None
        of_input, of_weight, of_bias = sums = [
            torch.zeros_like(each, dtype=lse.dtype) if wants else None
            for each, wants in zip(tensors, wanted, strict=True)
        ]
        wide = head.widened()
        for rows, input, logits, grad, slope in _blocks(wide, with_slope=True):
            of_lse, of_logprobs, of_entropy = (each[rows, None] for each in grads)
            log_probs = logits.sub_(lse[rows, None]).clamp_min_(_LEAST_LOG_PROB)
            torch.exp(log_probs, out=grad)
            log_probs.add_(entropy[rows, None]).mul_(-of_entropy).add_(of_lse - of_logprobs)
            grad.mul_(log_probs).scatter_add_(1, index[rows, None], of_logprobs).mul_(slope)
            if of_input is not None:
                torch.mm(grad, wide.weight, out=of_input[rows])
            if of_weight is not None:
                of_weight.addmm_(grad.t(), input)
            if of_bias is not None:
                of_bias.add_(grad.sum(0))
        rounded = (None if each is None else each.to(head.input.dtype) for each in sums)
        return None, *rounded, None, None


def _blocks(
    head: Head, *, with_slope: bool = False
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor | float]]:
    """A block of rows at a time: the rows, their input, their logits, memory of the same size, and
    the logits' derivative with respect to the layer's output. No blocks without classes."""
    with_slope = with_slope and head.softcap is not None
    count, classes = len(head.input), len(head.weight)
    across = max(1, classes)
    size = max(1, _FEWEST // across, min(head.weight.shape[1], _MOST // across))
    memory = head.input.new_empty(2 if with_slope else 1, min(size, count), classes)
    for begin in range(0, count if classes else 0, size):
        rows = slice(begin, begin + size)
        input = head.input[rows]
        logits = operators().linear(input, head.weight, head.bias)
        free, *slope = memory[:, : len(input)]
        if head.logit_scale != 1:
            logits.mul_(head.logit_scale)
        if head.softcap is not None:
            logits.div_(head.softcap).tanh_()
            for each in slope:
                torch.mul(logits, logits, out=each)
                each.sub_(1).mul_(-head.logit_scale)
            logits.mul_(head.softcap)
        yield rows, input, logits, free, slope[0] if slope else head.logit_scale


def _statistics_at_once(index: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """:class:`RowStatistics` from all logits at once."""
    head = Head(*arguments).widened()
    logits = F.linear(head.input, head.weight, head.bias) * head.logit_scale
    if head.softcap is not None:
        logits = torch.tanh(logits / head.softcap) * head.softcap
    log_probs = logits.log_softmax(-1)
    of_index = log_probs.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    # 0 log 0 is 0, and so is its derivative.
    entropy = -(log_probs.exp() * log_probs.clamp_min(_LEAST_LOG_PROB)).sum(-1)
    return logits.logsumexp(-1), of_index, entropy, *logits.detach().max(-1)

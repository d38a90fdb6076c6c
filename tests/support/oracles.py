"""The operators' expected results: float64 values and gradients, and the errors allowed.

The values follow from the formulas, in float64 and from the exact numbers that the operator gets
(narrow dtypes convert exactly); the gradients come from float64 autograd. Nothing here calls fastnn
or torch.nn.functional.

The errors allowed are derived, not tuned. An operator sums in its accumulation dtype with unit
roundoff u (float64's for float64, float32's for narrower ones) and rounds the result once to its
own dtype. Each bound is a sum of terms (roundings) x u x (magnitude that is rounded), where n
successive roundings count as ``growth(n)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_emulation.chosen import EMULATES_CUDA
from support.sample_inputs import Sample

# The arguments whose gradients the fused operators compute. (Class probabilities and class weights
# that want a gradient use torch's own path: test_gradients.py.)
DIFFERENTIABLE = {
    "linear": 3,
    "linear_relu": 3,
    "log_softmax": 1,
    "nll_loss": 1,
    "cross_entropy": 1,
    "linear_cross_entropy": 2,
}


@dataclass(frozen=True)
class Expected:
    """The exact value and gradients (None: not differentiable), each with its allowed error."""

    value: Tensor
    value_error: Tensor
    grads: list[Tensor]
    grad_errors: list[Tensor]


# --- the formulas -------------------------------------------------------------------------------


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    before = linear(input, weight, bias)
    return torch.where(before > 0, before, 0.0)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = input.double().reshape(-1, input.shape[-1]) if input.numel() else input.double()
    products = torch.tensordot(rows, weight.double(), dims=([-1], [1]))
    products = products.reshape(*input.shape[:-1], weight.shape[0])
    return products if bias is None else products + bias.double()


def log_softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    x = input.double()
    if dtype is not None:  # the cast rounds outside of autograd, which would round gradients, too
        x = x + (x.to(dtype).double() - x).detach()
    return _log_softmax_parts(x, dim)[2]


def _log_softmax_parts(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """x - max, log(sum(exp(x - max))), and their difference."""
    if x.numel() == 0:
        return x, x.sum(dim, keepdim=True), x
    shifted = x - x.detach().max(dim, keepdim=True).values
    log_sum = shifted.exp().sum(dim, keepdim=True).log()
    return shifted, log_sum, shifted - log_sum


@dataclass(frozen=True)
class _Loss:
    """A loss as sums over the classes: row r loses ``-sum_c q[r, c] * log_probs[r, c]``."""

    q: Tensor  # (rows, C), the target distribution times the class weights
    total_weight: Tensor  # the divisor of 'mean'
    reduction: str
    row_shape: torch.Size

    def like_input(self, values: Tensor, input: Tensor) -> Tensor:
        """(rows, C) to (N, C, d1, ...)."""
        class_dim = 0 if input.dim() == 1 else 1
        moved = input.movedim(class_dim, -1).shape
        return values.reshape(moved).movedim(-1, class_dim)

    def reduce(self, rows: Tensor) -> Tensor:
        if self.reduction == "none":
            return rows.reshape(self.row_shape)
        return rows.sum() / self.total_weight if self.reduction == "mean" else rows.sum()

    def scale_of_rows(self, grad_output: Tensor) -> Tensor:
        """d(sum(grad_output * loss)) / d(row's loss), as (rows, 1)."""
        if self.reduction == "none":
            return grad_output.reshape(-1, 1)
        return grad_output / self.total_weight if self.reduction == "mean" else grad_output


def _rows_of_classes(values: Tensor) -> Tensor:
    """(N, C, d1, ...) to (rows, C)."""
    class_dim = 0 if values.dim() == 1 else 1
    classes_last = values.movedim(class_dim, -1)
    rows = math.prod(classes_last.shape[:-1])
    return classes_last.reshape(rows, values.shape[class_dim])


def _make_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> _Loss:
    if size_average is not None or reduce is not None:  # the deprecated pair takes precedence
        reduction = "none" if reduce is False else "sum" if size_average is False else "mean"
    classes = input.shape[0 if input.dim() == 1 else 1]
    row_shape = input.shape[:1] + input.shape[2:] if input.dim() > 1 else torch.Size()
    w = torch.ones(classes).double() if weight is None else weight.double()

    if target.is_floating_point():
        p = _rows_of_classes(target.double())
        q = ((1 - label_smoothing) * p + label_smoothing / max(classes, 1)) * w
        rows = math.prod(row_shape)
        return _Loss(q, torch.tensor(float(rows)).double(), reduction, row_shape)

    index = target.long().reshape(-1, 1)
    kept = index != ignore_index
    one_hot = (index == torch.arange(classes)).double()
    row_weight = torch.where(kept, (one_hot * w).sum(1, keepdim=True), 0.0)
    smooth = label_smoothing / max(classes, 1) * w
    q = torch.where(kept, (1 - label_smoothing) * one_hot * w + smooth, 0.0)
    return _Loss(q, row_weight.sum(), reduction, row_shape)


def nll_loss(input: Tensor, *args, **kwargs) -> Tensor:
    loss = _make_loss(input, *args, **kwargs)
    return loss.reduce(-(loss.q * _rows_of_classes(input.double())).sum(1))


def cross_entropy(input: Tensor, *args, **kwargs) -> Tensor:
    loss = _make_loss(input, *args, **kwargs)
    log_probs = _log_softmax_parts(_rows_of_classes(input.double()), 1)[2]
    return loss.reduce(-(loss.q * log_probs).sum(1))


def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias=None, **kwargs
) -> Tensor:
    logits = _logits(input, linear_weight, linear_bias)
    return cross_entropy(logits, target, **kwargs)


def _logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    logits = torch.tensordot(input.double(), linear_weight.double(), dims=([-1], [-1]))
    return logits if linear_bias is None else logits + linear_bias.double()


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "linear": linear,
    "linear_relu": linear_relu,
    "log_softmax": log_softmax,
    "nll_loss": nll_loss,
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
}


# --- the errors allowed -------------------------------------------------------------------------


def growth(n: float) -> float:
    """The roundings of a sum of n terms and a few operations around it, in units of u.

    Independent roundings add up like a random walk, to about sqrt(n) / 2; four times sqrt(n) is
    eight standard deviations. The 8 covers single operations: an exp and a log of up to 1 ulp (2 u)
    each, a division, a product or two.
    """
    return 8 + 4 * math.sqrt(n)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding: half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def smallest_step(dtype: torch.dtype) -> float:
    """The distance between neighbouring subnormals, where errors are no longer relative."""
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps


def logit_gradient_roundoff(dtype: torch.dtype) -> float:
    """How far the gradient of linear_cross_entropy's logits is rounded for its two products.

    Tensor cores take operands of the input's dtype; the CPU multiplies in the accumulation dtype.
    """
    on_cuda_kernels = EMULATES_CUDA or torch.get_default_device().type == "cuda"
    return unit_roundoff(dtype) if on_cuda_kernels and dtype.itemsize == 2 else 0.0


def _linear_errors(sample: Sample, grad_output: Tensor) -> tuple[Tensor, list[Tensor]]:
    input, weight, *bias = (arg.double().abs() for arg in sample.args)
    u = unit_roundoff(accumulation_dtype(sample.args[0].dtype))
    features, outputs = input.shape[-1], weight.shape[0]
    grad = grad_output.abs().reshape(-1, outputs) if grad_output.numel() else None
    rows = input.reshape(-1, features) if input.numel() else None
    value = growth(features) * u * linear(input, weight, *bias) + _product_rounding(sample)
    if grad is None or rows is None:  # all products and sums are of zeros
        return value, [torch.zeros_like(arg) for arg in (input, weight, *bias)]
    count = growth(rows.shape[0]) * u
    errors = [
        growth(outputs) * u * (grad @ weight).reshape(input.shape),
        count * (grad.T @ rows),
    ]
    return value, errors + [count * grad.sum(0)] * len(bias)


def _product_rounding(sample: Sample) -> Tensor | float:
    """A GPU's library may round the product to the narrow dtype before adding the bias."""
    dtype = sample.args[0].dtype
    if torch.get_default_device().type != "cuda" or accumulation_dtype(dtype) == dtype:
        return 0.0
    return unit_roundoff(dtype) * linear(*sample.args[:2]).abs()


def _log_softmax_errors(sample: Sample, grad_output: Tensor) -> tuple[Tensor, list[Tensor]]:
    input, dim = sample.args
    dtype = sample.kwargs.get("dtype") or input.dtype
    accumulate = accumulation_dtype(dtype)
    u = unit_roundoff(accumulate)
    x = input.to(dtype).double()
    shifted, log_sum, log_probs = _log_softmax_parts(x, dim)
    size = x.shape[dim] if x.dim() else 1
    value = _log_prob_error(shifted, log_sum, size, u)
    # The backward computes the probability from the output, which has been rounded.
    prob_error = log_probs.exp() * (value + unit_roundoff(dtype) * log_probs.abs() + 8 * u)
    total = grad_output.sum(dim, keepdim=True).abs()
    total_error = growth(size) * u * grad_output.abs().sum(dim, keepdim=True)
    grad = prob_error * total + log_probs.exp() * total_error + 2 * u * grad_output.abs()
    grad = grad + torch.finfo(accumulate).smallest_normal * total  # a fast exp flushes subnormals
    if dtype != input.dtype:  # with dtype= results are rounded to it before the cast back
        grad = grad + unit_roundoff(dtype) * (grad_output.abs() + log_probs.exp() * total)
        grad = grad + smallest_step(dtype)
    return value, [grad]


def _log_prob_error(shifted: Tensor, log_sum: Tensor, size: int, u: float) -> Tensor:
    """The error of x - max - log(sum(exp(x - max))): both differences round, and so does the sum,
    whose relative error is the absolute error of its log (the sum is at least 1)."""
    return u * (2 * shifted.abs() + 2 * log_sum.abs() + growth(size))


def _nll_loss_errors(sample: Sample, grad_output: Tensor) -> tuple[Tensor, list[Tensor]]:
    input = sample.args[0]
    loss = _make_loss(*sample.args, **sample.kwargs)
    u = unit_roundoff(accumulation_dtype(input.dtype))
    rows = (loss.q * _rows_of_classes(input.double())).sum(1).abs()
    grad = (loss.scale_of_rows(grad_output) * loss.q).abs() * _scale_error(loss, u)
    return _reduction_error(loss, rows, rows * 2 * u, u), [loss.like_input(grad, input)]


def _row_sum_error(rows: int, u: float) -> float:
    """The error of a sum over the rows, relative to the sum of magnitudes.

    Class weights are a few numbers summed thousands of times: their roundings repeat and don't
    cancel. In float64 the bound is the worst case, rows * u. For narrower dtypes float64 sums or
    partial sums are possible, so a random walk's error is required.
    """
    return (rows + 8) * u if u == unit_roundoff(torch.float64) else growth(rows) * u


def _scale_error(loss: _Loss, u: float) -> float:
    """The relative error of a row's scale: 'mean' divides by a sum over the rows."""
    return growth(1) * u + (_row_sum_error(len(loss.q), u) if loss.reduction == "mean" else 0)


def _reduction_error(loss: _Loss, rows: Tensor, row_errors: Tensor, u: float) -> Tensor:
    """The error of a reduction over rows that already have the errors ``row_errors``."""
    if loss.reduction == "none":
        return loss.reduce(row_errors)
    # 'mean' has two: for the sum of the losses, and for the sum of weights that divides it
    return loss.reduce(row_errors) + 2 * _row_sum_error(len(rows), u) * loss.reduce(rows)


def _cross_entropy_errors(sample: Sample, grad_output: Tensor) -> tuple[Tensor, list[Tensor]]:
    input = sample.args[0]
    loss = _make_loss(*sample.args, **sample.kwargs)
    accumulate = accumulation_dtype(input.dtype)
    u = unit_roundoff(accumulate)
    shifted, log_sum, log_probs = _log_softmax_parts(_rows_of_classes(input.double()), 1)
    classes = loss.q.shape[1]
    log_prob_error = _log_prob_error(shifted, log_sum, classes, u)
    terms = loss.q * log_probs.abs()
    # A sum of products over the classes. With a class index and without label smoothing only one
    # term is nonzero, but the bound needn't know.
    rows = terms.sum(1)
    row_errors = (loss.q * log_prob_error).sum(1) + growth(classes) * u * rows
    value = _reduction_error(loss, rows, row_errors, u)

    # scale * (softmax * sum(q) - q)
    q_sum = loss.q.sum(1, keepdim=True)
    scale = loss.scale_of_rows(grad_output).abs()
    prob = log_probs.exp()
    grad = prob * q_sum * (log_prob_error + growth(classes) * u) + growth(1) * u * loss.q
    grad = grad + (prob * q_sum + loss.q) * _scale_error(loss, u)
    grad = scale * (grad + torch.finfo(accumulate).smallest_normal)  # a fast exp flushes subnormals
    return value, [loss.like_input(grad, input)]


def _linear_cross_entropy_errors(
    sample: Sample, grad_output: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The errors of the logits, which enter a loss with slopes of at most 1, and of the loss."""
    input, linear_weight, target = sample.args
    kwargs = dict(sample.kwargs)
    bias = kwargs.pop("linear_bias", None)
    u = unit_roundoff(accumulation_dtype(input.dtype))
    magnitudes = _logits(input.abs(), linear_weight.abs(), None if bias is None else bias.abs())
    logit_error = growth(input.shape[-1]) * u * magnitudes
    logits = _logits(input, linear_weight, bias)
    loss_sample = Sample(sample.name, (logits.to(accumulation_dtype(input.dtype)), target), kwargs)
    value, (grad,) = _cross_entropy_errors(loss_sample, grad_output)
    loss = _make_loss(logits, target, **kwargs)
    q_sum = loss.q.sum(1)
    # An error of e in each logit changes a row's log-probabilities by at most 2 e.
    of_logits = 2 * _rows_of_classes(logit_error).amax(1) if logits.numel() else q_sum
    value = value + loss.reduce(of_logits * q_sum)
    softmax = _log_softmax_parts(_rows_of_classes(logits), 1)[2].exp()
    scale = loss.scale_of_rows(grad_output).abs()
    exact = scale * (softmax * q_sum.unsqueeze(1) + loss.q)
    if roundoff := logit_gradient_roundoff(input.dtype):
        # In float16 it is relative to the largest multiplier of a row, so that few are subnormal.
        least = smallest_step(input.dtype) * (scale.amax() if scale.numel() else 0)
        grad = grad + loss.like_input(roundoff * exact + least, logits)
    grad = grad + loss.like_input(
        scale * softmax * (q_sum * of_logits).unsqueeze(1) + 2 * u * exact, logits
    )
    exact = loss.like_input(exact, logits)
    # The two products with that gradient, plus one rounding when it is scaled.
    outputs = list(range(input.dim() - 1, logits.dim()))
    rows = grad + growth(math.prod(linear_weight.shape[:-1])) * u * exact
    over_classes = torch.tensordot(
        rows, linear_weight.double().abs(), dims=(outputs, list(range(len(outputs))))
    )
    rows = grad + growth(math.prod(input.shape[:-1])) * u * exact
    if input.dim() == 1:
        over_rows = rows.unsqueeze(-1) * input.double().abs()
    else:
        over_rows = torch.tensordot(rows, input.double().abs(), dims=([0], [0]))
    return value, [over_classes, over_rows]


_ERRORS: dict[str, Callable[[Sample, Tensor], tuple[Tensor, list[Tensor]]]] = {
    "linear": _linear_errors,
    "linear_relu": _linear_errors,
    "log_softmax": _log_softmax_errors,
    "nll_loss": _nll_loss_errors,
    "cross_entropy": _cross_entropy_errors,
    "linear_cross_entropy": _linear_cross_entropy_errors,
}


# --- what the tests call ------------------------------------------------------------------------


def expected(op: str, sample: Sample, grad_output: Tensor) -> Expected:
    """The value, and the gradients of ``sum(grad_output * value)``."""
    leaves = [arg.detach().double() for arg in sample.args[: DIFFERENTIABLE[op]]]
    grads_wanted = sample.args[0].is_floating_point()
    with torch.enable_grad():
        leaves = [leaf.requires_grad_(grads_wanted) for leaf in leaves]
        value = _evaluate(op, sample, leaves)
        grads = (
            torch.autograd.grad(value, leaves, grad_output.double(), materialize_grads=True)
            if grads_wanted
            else ()
        )
    value_error, grad_errors = _ERRORS[op](sample, grad_output.double())
    return Expected(value.detach(), value_error, list(grads), grad_errors if grads else [])


def _evaluate(op: str, sample: Sample, leaves: list[Tensor]) -> Tensor:
    return FORMULAS[op](*leaves, *sample.args[len(leaves) :], **sample.kwargs)


def away_from_kink(sample: Sample, grad_output: Tensor) -> Tensor:
    """linear_relu's incoming gradient, zeroed where ``input @ weight.T + bias`` is within rounding
    of zero: there the gradient of either side is right. The bound is the worst case, n roundings in
    the same direction, to hold for torch's operators, too."""
    magnitude = linear(*(arg.double().abs() for arg in sample.args))
    u = unit_roundoff(accumulation_dtype(sample.args[0].dtype))
    doubtful = linear(*sample.args).abs() <= (
        (sample.args[0].shape[-1] + 2) * u * magnitude
        + smallest_step(sample.args[0].dtype)
        + _product_rounding(sample)
    )
    return grad_output.masked_fill(doubtful, 0)


def assert_within(
    what: str, actual: Tensor, exact: Tensor, error: Tensor, slack: float = 1.0
) -> None:
    """Fails unless ``actual`` equals ``exact`` within ``slack * error`` and one final rounding.

    NaN and infinity must be where they are in ``exact``.
    """
    __tracebackhide__ = True
    assert actual.shape == exact.shape, (
        f"{what}: shape {tuple(actual.shape)} is not {tuple(exact.shape)}"
    )
    dtype = actual.dtype
    value, exact = actual.detach().double(), exact.detach().double()
    allowed = slack * error + unit_roundoff(dtype) * (exact.abs() + slack * error)
    allowed = allowed + smallest_step(dtype)
    same = (value == exact) | (value.isnan() & exact.isnan())
    wrong = ~(same | ((value - exact).abs() <= allowed))
    if not wrong.any():
        return
    ratio = torch.where(wrong, (value - exact).abs() / allowed, -1.0).nan_to_num(nan=math.inf)
    at = tuple(int(i[0]) for i in torch.where(ratio == ratio.max())) if ratio.dim() else ()
    raise AssertionError(
        f"{what}: {int(wrong.sum())} of {wrong.numel()} values are off, the worst at {list(at)}: "
        f"{value[at].item()!r}, should be {exact[at].item()!r} within {allowed[at].item():.3g}"
    )

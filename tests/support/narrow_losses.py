"""Losses under autocast that read logits narrower than float32 without converting them first."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fastnn
from support.sample_inputs import Draws

# Rows processed several at once, rows processed along the classes, strided classes, channels_last.
SHAPES = {"short": (37, 9), "long": (7, 2100), "apart": (3, 11, 5, 2), "last": (3, 40, 5, 2)}
NARROW_LOSSES = [
    "nll_loss",
    "nll_loss, weight",
    "cross_entropy",
    "cross_entropy, weight",
    "cross_entropy, smoothing",
    "cross_entropy, weight, smoothing",
    "cross_entropy, probabilities",
    "cross_entropy, probabilities, weight, smoothing",
]

Loss = Callable[[Tensor], Tensor]


def narrow_logits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    layout = torch.channels_last if shape == SHAPES["last"] else torch.contiguous_format
    logits = 4 * Draws(1).normal(*shape)
    return logits.to(dtype, memory_format=layout).requires_grad_()


def narrow_loss(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, reduction: str = "mean"
) -> Loss:
    """One of NARROW_LOSSES as a function of the logits."""
    draw, (rows, classes, *others) = Draws(2), shape
    options: dict[str, object] = {"reduction": reduction}
    if "probabilities" in name:
        target = draw.normal(rows, classes, *others).softmax(1).to(dtype)
    else:
        target = draw.integers(0, classes, rows, *others)
        options["ignore_index"] = int(target.flatten()[0])
    if "weight" in name:
        options["weight"] = draw.uniform(classes)
    if "smoothing" in name:
        options["label_smoothing"] = 0.3
    function = getattr(fastnn.functional, name.split(",")[0])

    def loss(logits: Tensor) -> Tensor:
        with torch.autocast(target.device.type, dtype):
            return function(logits, target, **options)

    return loss


def check_bits_of_a_copy(loss: Loss, logits: Tensor) -> None:
    """Compares loss and gradient with those of float32 logits, as autocast would make them."""
    copied = logits.detach().clone().requires_grad_()
    expected = loss(copied.float())
    with torch.no_grad():
        assert torch.equal(loss(logits), loss(copied.float()))
    result = loss(logits)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)
    for grad in _incoming_gradients(expected):
        (exact,) = torch.autograd.grad(expected, copied, grad, retain_graph=True)
        (kept,) = torch.autograd.grad(result, logits, grad, retain_graph=True)
        # The graph is freed, so the gradient may reuse the memory of what was kept.
        (actual,) = torch.autograd.grad(loss(logits), logits, grad)
        assert actual.dtype == logits.dtype
        assert torch.equal(actual, exact), grad
        assert torch.equal(kept, exact), grad


def _incoming_gradients(loss: Tensor) -> list[Tensor]:
    """Gradients of 1, of a GradScaler, of a mean over batches; or a different one for each row."""
    if loss.dim():
        return [Draws(3).normal(*loss.shape)]
    return [loss.new_tensor(scale) for scale in (1.0, 2.0**16, -1 / 3)]

"""Losses under autocast that read logits narrower than float32 without converting them first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastnn
from support.sample_inputs import SEED, Draws

# Rows processed several at once, rows processed along the classes, strided classes, channels_last.
# Enough elements that a sum in another order shows in some: it does in one of hundreds.
SHAPES = {"short": (370, 9), "long": (17, 2101), "apart": (3, 33, 15, 10), "last": (3, 40, 25, 4)}
NARROW_LOSSES = [
    "nll_loss",
    "nll_loss, weight",
    "cross_entropy",
    "cross_entropy, weight",
    "cross_entropy, smoothing",
    "cross_entropy, weight, smoothing",
    "cross_entropy, probabilities",
    "cross_entropy, probabilities, weight",
    "cross_entropy, probabilities, smoothing",
    "cross_entropy, probabilities, weight, smoothing",
]

Loss = Callable[[Tensor], Tensor]


def narrow_logits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    layout = torch.channels_last if shape == SHAPES["last"] else torch.contiguous_format
    logits = 4 * Draws(SEED + 1).normal(*shape)
    return logits.to(dtype, memory_format=layout).requires_grad_()


def loss_arguments(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, reduction: str = "mean"
) -> dict[str, Any]:
    """The arguments of one of NARROW_LOSSES, except its logits."""
    draw, (rows, classes, *others) = Draws(SEED + 2), shape
    arguments: dict[str, Any] = {"reduction": reduction}
    if "probabilities" in name:
        arguments["target"] = draw.uniform(rows, classes, *others).to(dtype)
    else:
        arguments["target"] = draw.integers(0, classes, rows, *others)
        arguments["ignore_index"] = int(arguments["target"].flatten()[0])
    if "weight" in name:
        arguments["weight"] = draw.uniform(classes)
    if "smoothing" in name:
        arguments["label_smoothing"] = 0.3
    return arguments


def loss_under_autocast(name: str, arguments: dict[str, Any], dtype: torch.dtype) -> Loss:
    function = getattr(fastnn.functional, name.split(",")[0])

    def loss(logits: Tensor) -> Tensor:
        with torch.autocast(logits.device.type, dtype):
            return function(logits, **arguments)

    return loss


def loss_in_float32(name: str, arguments: dict[str, Any]) -> Loss:
    """The operator, as autocast calls it where no copy is made, and with the copy."""
    operator = getattr(torch.ops.fastnn, name.split(",")[0])

    def loss(logits: Tensor) -> Tensor:
        target = arguments["target"]
        if target.is_floating_point():
            target = target.to(logits.dtype)
        return operator(logits, **{**arguments, "target": target}, dtype=torch.float32)

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
        return [Draws(SEED + 3).normal(*loss.shape)]
    return [loss.new_tensor(scale) for scale in (1.0, 2.0**16, -1 / 3)]

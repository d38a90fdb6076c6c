"""A perceptron with all our layers and losses, and torch's equivalent: a model small enough to
compile, export and transform in many ways."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import fastnn
from support.sample_inputs import Draws

FEATURES, HIDDEN, CLASSES = 6, 8, 5
USES = ("linear_relu", "linear", "log_softmax", "nll_loss", "cross_entropy")


class LinearThenReLU(nn.Linear):
    """The equivalent of LinearReLU, with the same keys."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


OURS = fastnn.nn
STOCK = SimpleNamespace(
    Linear=nn.Linear,
    LinearReLU=LinearThenReLU,
    LogSoftmax=nn.LogSoftmax,
    NLLLoss=nn.NLLLoss,
    CrossEntropyLoss=nn.CrossEntropyLoss,
)


class Perceptron(nn.Module):
    """Returns log-probabilities, or with a target the sum of two losses."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.hidden = kind.LinearReLU(FEATURES, HIDDEN)
        self.output = kind.Linear(HIDDEN, CLASSES)
        self.log_softmax = kind.LogSoftmax(1)
        self.nll_loss = kind.NLLLoss(weight=torch.linspace(0.5, 1.5, CLASSES))
        self.cross_entropy = kind.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        logits = self.output(self.hidden(x))
        log_probs = self.log_softmax(logits)
        if target is None:
            return log_probs
        return self.nll_loss(log_probs, target) + self.cross_entropy(logits, target)


def make(kind: Any, dtype: torch.dtype = torch.float64) -> Perceptron:
    """The model with the same parameters every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Perceptron(kind).to(dtype)


def batch(rows: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs and targets, the same every time."""
    x = Draws(rows).normal(rows, FEATURES, dtype=torch.float64)
    return x.to(dtype), torch.arange(rows) % CLASSES


def loss_and_gradients(
    model: Perceptron, run: Callable[..., Tensor], *inputs: Tensor
) -> list[Tensor]:
    """The result of ``run`` (the model itself, compiled, exported, ...) and its gradients."""
    loss = run(*inputs)
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

"""A small float64 training for tests that repeat it in other processes or threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

import fastnn

# Odd sizes, so that two ranks get unequal parts of a tensor.
SIZES = (13, 9, 7, 5)
BATCH = 16
STEPS = 6
OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}

# The model's last layers, and the loss they are made for.
HEADS: dict[str, tuple[Callable[[], list[nn.Module]], Callable[[], nn.Module]]] = {
    "cross_entropy": (lambda: [], fastnn.nn.CrossEntropyLoss),
    "log_softmax+nll_loss": (lambda: [fastnn.nn.LogSoftmax(1)], fastnn.nn.NLLLoss),
}

# The largest difference between trainings that sum in different orders: some hundred roundings of
# 1e-16 each, of float64 values of order one. A wrong step is off by about 1e-2.
ATOL = 1e-13


def make_model(head: str = "cross_entropy") -> nn.Sequential:
    """The model, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    inputs, first, second, classes = SIZES
    model = nn.Sequential(
        fastnn.nn.LinearReLU(inputs, first),
        fastnn.nn.LinearReLU(first, second),
        nn.Linear(second, classes),
        *HEADS[head][0](),
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.5, 0.5, generator=generator)
    return model


def make_optimizer(parameters: Iterable[nn.Parameter]) -> fastnn.optim.SGD:
    return fastnn.optim.SGD(parameters, **OPTIONS)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The inputs and targets of a step, the same at every call."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(BATCH, SIZES[0], generator=generator, dtype=torch.float64)
    return inputs, torch.randint(SIZES[-1], (BATCH,), generator=generator)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    head: str = "cross_entropy",
    steps: Iterable[int] = range(STEPS),
    rows: slice = slice(None),
) -> None:
    """Takes steps on these rows of their batches."""
    criterion = HEADS[head][1]()
    for step in steps:
        inputs, targets = (tensor[rows] for tensor in batch(step))
        optimizer.zero_grad()
        criterion(model(inputs), targets).backward()
        optimizer.step()


def outcome(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The parameters and their momentum buffers, by name."""
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        values[f"{name}, momentum"] = optimizer.state[parameter]["momentum_buffer"]
    return values


def expected_outcome(head: str = "cross_entropy") -> dict[str, Tensor]:
    """The outcome of the training in one process, on whole batches."""
    model = make_model(head)
    optimizer = make_optimizer(model.parameters())
    train(model, optimizer, head)
    return outcome(model, optimizer)

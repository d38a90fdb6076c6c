"""Random but reproducible trainings (model, loss, optimizer and batches from a seed), and all that
a training changes, for comparison bit by bit."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastnn

FEATURES, CLASSES = 12, 5


class Residual(nn.Module):
    """A user-defined forward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.scale = nn.Linear(width, width), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * torch.tanh(self.inner(x))


class Shared(nn.Module):
    """One parameter shared by two modules, and one without a gradient."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


def layers(draw: random.Random, width: int) -> Iterator[nn.Module]:
    for _ in range(draw.randint(1, 3)):
        yield draw.choice(
            [
                lambda: nn.Sequential(nn.Linear(width, width), nn.ReLU()),
                lambda: fastnn.nn.LinearReLU(width, width),
                lambda: nn.BatchNorm1d(width),
                lambda: nn.Dropout(0.3),
                lambda: nn.LayerNorm(width),
                lambda: Residual(width),
                lambda: Shared(width),
            ]
        )()


LOSSES: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "nn.CrossEntropyLoss": lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
    "fastnn.nn.CrossEntropyLoss": fastnn.nn.CrossEntropyLoss,
    "F.cross_entropy": lambda: F.cross_entropy,
    "a weight": lambda: nn.CrossEntropyLoss(weight=torch.linspace(0.5, 1.5, CLASSES)),
    "a lambda": lambda: lambda output, target: F.nll_loss(F.log_softmax(output, 1), target),
}


def some_sgd(draw: random.Random) -> dict[str, Any]:
    momentum = draw.choice([0.0, 0.9])
    return {
        "lr": draw.choice([0.1, 0.01]),
        "momentum": momentum,
        "nesterov": momentum > 0 and draw.random() < 0.5,
        "weight_decay": draw.choice([0.0, 0.01]),
    }


OPTIMIZERS: list[tuple[type[torch.optim.Optimizer], Callable[[random.Random], dict[str, Any]]]] = [
    (fastnn.optim.SGD, some_sgd),
    (torch.optim.SGD, some_sgd),
    (torch.optim.Adam, lambda draw: {"lr": 0.01, "amsgrad": draw.random() < 0.5}),
    (torch.optim.AdamW, lambda draw: {"lr": 0.01}),
    (torch.optim.RMSprop, lambda draw: {"lr": 0.001, "momentum": 0.5}),
]


@dataclass
class Training:
    """A model, its loss and its optimizer."""

    model: nn.Module
    loss_fn: Callable[..., Tensor]
    optimizer: torch.optim.Optimizer
    options: dict[str, Any]

    def step(self, **options: Any) -> fastnn.TrainStep:
        return fastnn.train_step(
            self.model, self.loss_fn, self.optimizer, **{**self.options, **options}
        )

    def loop(self, index: int, input: Any, target: Any) -> Tensor:
        """A call of the step as a hand-written loop."""
        accumulate = self.options.get("accumulate", 1)
        if index % accumulate == 0:
            self.optimizer.zero_grad()
        loss = self.loss_fn(self.model(input), target)
        (loss / accumulate).backward()
        if (index + 1) % accumulate == 0:
            if (norm := self.options.get("clip_grad_norm")) is not None:
                stepped = [p for group in self.optimizer.param_groups for p in group["params"]]
                torch.nn.utils.clip_grad_norm_(stepped, norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()

    def everything(self) -> dict[str, Any]:
        """A copy of all that a step may change."""
        return everything(self.model, self.optimizer)


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    params += model.parameters()
    return copy.deepcopy(
        {
            "parameters": [param.detach() for param in params],
            "gradients": [param.grad for param in params],
            "buffers": dict(model.named_buffers()),
            "optimizer": optimizer.state_dict(),
        }
    )


def make_training(seed: int) -> Training:
    """The training of a seed, the same every time."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    width = draw.choice([4, 7, 16])
    model = nn.Sequential(nn.Linear(FEATURES, width), *layers(draw, width))
    model.append(nn.Linear(width, CLASSES))
    if draw.random() < 0.4:
        model = fastnn.fuse(model)
    if draw.random() < 0.3:
        model[0].weight.requires_grad_(False)
    loss_fn = LOSSES[draw.choice(sorted(LOSSES))]()
    kind, options = draw.choice(OPTIMIZERS)
    params: Any = list(model.parameters())
    if draw.random() < 0.4:
        params = [{"params": params[:1]}, {"params": params[1:], "lr": 0.05}]
    return Training(
        model,
        loss_fn,
        kind(params, **options(draw)),
        {
            "accumulate": draw.choice([1, 1, 2, 3]),
            "clip_grad_norm": draw.choice([None, None, 0.1]),
        },
    )


def batch(index: int) -> tuple[Tensor, Tensor]:
    """The batch of a call, each of another size; the same every time."""
    generator = torch.Generator().manual_seed(index)
    rows = 4 + index % 3
    input = torch.randn(rows, FEATURES, generator=generator)
    return input, torch.randint(CLASSES, (rows,), generator=generator)


def same(one: Any, other: Any) -> bool:
    """Compares bit by bit, except that any NaN equals any NaN."""
    if isinstance(one, Tensor):
        return (
            isinstance(other, Tensor)
            and one.dtype == other.dtype
            and one.shape == other.shape
            and torch.equal(one.isnan(), other.isnan())
            and torch.equal(one.nan_to_num(), other.nan_to_num())
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other

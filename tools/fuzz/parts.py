"""The parts of the programs. The source of each part that a program names goes into its text.

So a program needs nothing but torch and fastnn, and the linter reads this file.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

# --- what a program observes ----------------------------------------------------------------------


def snapshot(value: Any) -> Any:
    """The value as it is now, whatever the program goes on to do with it."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, list | tuple):
        return [snapshot(part) for part in value]
    if isinstance(value, dict):
        return {name: snapshot(part) for name, part in value.items()}
    return value


class Seen(list):
    """What a program observes, in order. The error that ends a ``with seen:`` is one of them."""

    def __call__(self, name: str, value: Any) -> None:
        self.append((name, snapshot(value)))

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> bool:
        if not isinstance(error, Exception):
            return False
        self("error", error.with_traceback(None))
        return True


def ramp(values: Tensor) -> Tensor:
    """Small integers, which every dtype holds, in the shape of the values."""
    return (torch.arange(values.numel()) % 5 - 1).view(values.shape).to(values)


# --- losses and functions -------------------------------------------------------------------------


def as_is(values: Tensor) -> Tensor:
    return values


# --- modules --------------------------------------------------------------------------------------


class Plain(nn.Linear):
    """A subclass that changes nothing."""


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Adapted(nn.Module):
    """What low-rank adapters put around a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, input: Tensor) -> Tensor:
        return self.layer(input) + input * self.scale


class Chain(nn.Sequential):
    """A subclass that changes nothing."""


class Residual(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input


class Loop(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        for layer in self:
            input = layer(input) + 1
        return input


def named(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict((f"part{i}", layer) for i, layer in enumerate(layers)))


def untouched(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Stands in for ``fuse`` and ``unfuse``."""
    return model


def nth(model: nn.Module, index: int, kind: type = nn.Module) -> nn.Module:
    """One of the model's modules of this class."""
    found = [module for module in model.modules() if isinstance(module, kind)]
    return found[index % len(found)]


def made(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module with parameters of the dtype; those of narrow ones are -1, 0 and 1.

    Their sums are then exact in any order, and no rounding moves a value across ReLU's corner.
    """
    for parameter in module.to(dtype).parameters():
        if dtype == torch.float64:
            parameter.data.normal_()
        else:
            parameter.data.random_(-1, 2)
    return module


def train(see: Seen, model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    x.grad = None
    output = model(x)
    see("output", output)
    output.backward(ramp(output))
    see("gradients", {name: value.grad for name, value in model.named_parameters()})
    see("input's gradient", x.grad)


def look_at(see: Seen, model: nn.Module) -> None:
    kinds = (nn.Sequential, nn.ModuleList, nn.Linear, nn.ReLU, nn.LogSoftmax)
    modules = [(name, module.training) for name, module in model.named_modules()]
    see("modules", modules)
    see("kinds", [[isinstance(module, kind) for kind in kinds] for module in model.modules()])
    see("state", dict(model.state_dict()))

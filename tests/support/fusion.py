"""Models to fuse, and questions to fused models."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.profiler_util import FunctionEvent

import fastnn
from support.sample_inputs import SEED, Draws


def pair(*, bias: bool = True, inplace: bool = False) -> list[nn.Module]:
    return [nn.Linear(6, 5, bias=bias), nn.ReLU(inplace=inplace)]


def fused_paths(model: nn.Module) -> set[str]:
    return {entry.path for entry in fastnn.fusion_report(model).fused}


def reason(model: nn.Module, path: str) -> str:
    fused = fastnn.fuse(model, inplace=True)
    return next(e.reason for e in fastnn.fusion_report(fused).left if e.path == path)


OURS = ("fastnn::linear", "fastnn::linear_relu", "fastnn::mlp")
_OPERATORS = (*OURS, "aten::linear", "aten::relu", "aten::relu_")


def operators_of(model: nn.Module, x: Tensor) -> list[str]:
    """The relevant operators that the model's call runs, without those that they run themselves."""
    with torch.profiler.profile() as profile:
        model(x)
    calls = [event for event in profile.events() if event.name in _OPERATORS]
    return [call.name for call in calls if not any(_is_within(call, other) for other in calls)]


def _is_within(call: FunctionEvent, other: FunctionEvent) -> bool:
    while call := call.cpu_parent:
        if call is other:
            return True
    return False


def input_of(model: nn.Module) -> Tensor:
    features = next(m.in_features for m in model.modules() if isinstance(m, nn.Linear))
    return Draws(SEED).normal(7, features)


def assert_same_results(fused: nn.Module, stock: nn.Module, x: Tensor) -> None:
    """Compares float32 outputs and gradients, up to the few roundings of another order of sums."""
    results = []
    for model in (fused, stock):
        inputs = x.clone().requires_grad_()
        output = model(inputs)
        weights = torch.linspace(-1, 1, output.numel()).view_as(output)
        gradients = torch.autograd.grad((output * weights).sum(), [inputs, *model.parameters()])
        results.append([output, *gradients])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def forward_hook(module: nn.Module, seen: list[Tensor]):
    return module.register_forward_hook(lambda m, args, output: seen.append(output.clone()))


def backward_hook(module: nn.Module, seen: list[Tensor]):
    return module.register_full_backward_hook(lambda m, g_in, g_out: seen.append(g_out[0].clone()))


class Doubling(nn.Sequential):
    """A Sequential with its stock forward and its own constructor arguments."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Linear(inputs, outputs), nn.ReLU(), nn.Linear(outputs, outputs))


class Backwards(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for module in reversed(self):
            x = module(x)
        return x

"""Our modules and torch's, made alike, and their inputs."""

from __future__ import annotations

import torch
from torch import Tensor

import fastnn
from support.sample_inputs import Draws

# Each module, the one that it replaces, and arguments for both.
MODULES = {
    "Linear": (fastnn.nn.Linear, torch.nn.Linear, {"in_features": 5, "out_features": 3}),
    "LinearReLU": (fastnn.nn.LinearReLU, torch.nn.Linear, {"in_features": 5, "out_features": 3}),
    "LogSoftmax": (fastnn.nn.LogSoftmax, torch.nn.LogSoftmax, {"dim": -1}),
    "NLLLoss": (fastnn.nn.NLLLoss, torch.nn.NLLLoss, {}),
    "CrossEntropyLoss": (fastnn.nn.CrossEntropyLoss, torch.nn.CrossEntropyLoss, {}),
    "LinearCrossEntropyLoss": (
        fastnn.nn.LinearCrossEntropyLoss,
        getattr(torch.nn, "LinearCrossEntropyLoss", fastnn.nn.LinearCrossEntropyLoss),
        {"in_features": 5, "num_classes": 5},
    ),
}
LOSSES = ["NLLLoss", "CrossEntropyLoss"]
CLASSES = 5


def make(name: str, **more) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Our module and torch's, with parameters from the same seed."""
    ours, stock, arguments = MODULES[name]
    modules = []
    for kind in (ours, stock):
        torch.manual_seed(0)
        modules.append(kind(**arguments, **more))
    return modules[0], modules[1]


def inputs_of(name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """The inputs of the module's ``forward``; the first one wants a gradient."""
    x = Draws(1).normal(4, 5, dtype=torch.float64)
    x = torch.log_softmax(x, -1) if name == "NLLLoss" else x
    x = x.to(dtype).requires_grad_()
    return (x, torch.tensor([0, 4, 2, 2])) if name.endswith("Loss") else (x,)


def assert_close(mine: Tensor, theirs: Tensor) -> None:
    """Equal up to the rounding of both sides: hence eps, twice the largest error of one.

    Every number here results from fewer than 32 products, sums, exponentials and logarithms (at
    most 5 features, 5 classes and 8 rows) of values from N(0, 1) and class weights below 8. In
    bfloat16 and float16 these are float32, and torch rounds to the narrow type at most 4 times
    (logits or product, log-probability, sum, mean).
    """
    roundings = 4 if theirs.dtype in (torch.bfloat16, torch.float16) else 32
    atol = roundings * torch.finfo(theirs.dtype).eps * 8
    torch.testing.assert_close(mine, theirs, rtol=0, atol=atol, equal_nan=True)

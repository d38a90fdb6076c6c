"""The overhead of a call: on eight elements, arithmetic takes next to no time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastnn
from benchmarks.case import Case, Contender, Inputs, classes, normal
from benchmarks.cases.sgd import (
    parameters_and_gradients,
    step_contenders,
    step_reference,
    zero_grad_contenders,
    zero_grad_reference,
)

SIZE = 8

#: A function and the modules whose parameters it uses.
Layer = tuple[Callable[..., Tensor], tuple[nn.Module, ...]]


def cases() -> list[Case]:
    layer = {"inputs": _row, "calls": _layers, "reference": _reference_layer}
    model = {"inputs": _row, "reference": _reference_model}
    fused, compiled = {**model, "calls": _fused_models}, {**model, "calls": _compiled_models}
    loss = {"inputs": _row_and_target, "calls": _losses, "reference": F.cross_entropy}
    return [
        _call_case("LinearReLU, no grad", grad_enabled=False, **layer),
        _call_case("LinearReLU", grad_enabled=True, **layer),
        _backward_case("LinearReLU backward", **layer),
        _call_case("fuse(Sequential), no grad", grad_enabled=False, **fused),
        _call_case("fuse(Sequential)", grad_enabled=True, **fused),
        _call_case("compile(Sequential)", grad_enabled=True, **compiled),
        _call_case("CrossEntropyLoss, no grad", grad_enabled=False, **loss),
        _call_case("CrossEntropyLoss", grad_enabled=True, **loss),
        _backward_case("CrossEntropyLoss backward", **loss),
        _optimizer_case("SGD.step", _eager_steps, step_reference()),
        _optimizer_case("SGD.zero_grad", zero_grad_contenders, zero_grad_reference()),
    ]


# ---- modules -------------------------------------------------------------------------------------


def _row(generator: torch.Generator) -> Inputs:
    row = normal(generator, 1, SIZE, dtype=torch.float32).requires_grad_()
    return Inputs((row,), normal(generator, 1, SIZE, dtype=torch.float32))


def _row_and_target(generator: torch.Generator) -> Inputs:
    return Inputs((*_row(generator).args, classes(generator, SIZE, 1)))


def _linear() -> nn.Linear:
    """Makes the same layer at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(SIZE, SIZE)


def _linear_relu() -> fastnn.nn.LinearReLU:
    fused = fastnn.nn.LinearReLU(SIZE, SIZE)
    fused.load_state_dict(_linear().state_dict())
    return fused


def _layers() -> dict[str, Layer]:
    linear, relu, fused = _linear(), nn.ReLU(), _linear_relu()
    return {
        "fastnn": (fused, (fused,)),
        "torch": (lambda input: relu(linear(input)), (linear,)),
    }


def _reference_layer(input: Tensor) -> Tensor:
    return F.relu(_linear().to(input)(input))


def _stock_model() -> nn.Sequential:
    return nn.Sequential(_linear(), nn.ReLU(), _linear(), nn.ReLU(), _linear())


def _fused_models() -> dict[str, Layer]:
    models = {
        "fastnn": fastnn.fuse(_stock_model()),
        "fastnn modules": nn.Sequential(_linear_relu(), _linear_relu(), _linear()),
        "torch": _stock_model(),
    }
    return {name: (model, (model,)) for name, model in models.items()}


def _compiled_models() -> dict[str, Layer]:
    """A compiled call includes Dynamo's guards, whatever the backend."""
    stock = _stock_model()
    return {
        "fastnn": (torch.compile(stock, backend="fastnn"), (stock,)),
        "eager": (torch.compile(stock, backend="eager"), (stock,)),
        "torch": (stock, (stock,)),
    }


def _reference_model(input: Tensor) -> Tensor:
    return _stock_model().to(input)(input)


def _losses() -> dict[str, Layer]:
    log_softmax, nll_loss = nn.LogSoftmax(dim=1), nn.NLLLoss()
    return {
        "fastnn": (fastnn.nn.CrossEntropyLoss(), ()),
        "torch": (nn.CrossEntropyLoss(), ()),
        "LogSoftmax+NLLLoss": (
            lambda logits, target: nll_loss(log_softmax(logits), target),
            (),
        ),
    }


def _call_case(
    label: str,
    inputs: Callable[[torch.Generator], Inputs],
    calls: Callable[[], dict[str, Layer]],
    reference: Callable[..., Tensor],
    grad_enabled: bool,
) -> Case:
    return Case(
        op="overhead",
        label=label,
        dtype=torch.float32,
        mode="call",
        inputs=inputs,
        contenders=lambda: [Call(name, *layer) for name, layer in calls().items()],
        reference=Call("reference", reference, ()),
        grad_enabled=grad_enabled,
    )


def _backward_case(
    label: str,
    inputs: Callable[[torch.Generator], Inputs],
    calls: Callable[[], dict[str, Layer]],
    reference: Callable[..., Tensor],
) -> Case:
    return Case(
        op="overhead",
        label=label,
        dtype=torch.float32,
        mode="call",
        inputs=inputs,
        contenders=lambda: [Backward(name, *layer) for name, layer in calls().items()],
        reference=Backward("reference", reference, ()),
    )


@dataclass
class Call(Contender):
    """Only the forward, whether or not autograd records it."""

    function: Callable[..., Tensor]
    modules: tuple[nn.Module, ...]

    def bind(self, inputs: Inputs) -> Callable[[], object]:
        for module in self.modules:
            module.to(inputs.args[0].device)
        return partial(self.function, *inputs.args)


@dataclass
class Backward(Call):
    """Only the backward, repeatedly over one graph."""

    def bind(self, inputs: Inputs) -> Callable[[], object]:
        output = super().bind(inputs)()
        parameters = (one for module in self.modules for one in module.parameters())
        leaves = (*inputs.leaves, *parameters)
        grad = inputs.grad if output.dim() else None
        return partial(torch.autograd.grad, output, leaves, grad, retain_graph=True)

    def check(self, inputs: Inputs) -> Tensor:
        return self.bind(inputs)()[0]  # the input's gradient


# ---- optimizer -----------------------------------------------------------------------------------


def _optimizer_case(
    label: str, contenders: Callable[[], list[Contender]], reference: Contender
) -> Case:
    return Case(
        op="overhead",
        label=label,
        dtype=torch.float32,
        mode="call",
        inputs=partial(parameters_and_gradients, shapes=[(SIZE,)]),
        contenders=contenders,
        reference=reference,
    )


def _eager_steps() -> list[Contender]:
    return [contender for contender in step_contenders() if not contender.compiled]

"""The whole training step of the MNIST MLP, in an ordinary loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

import fastnn
from benchmarks.case import Case, Contender, Inputs, Work, classes, normal
from benchmarks.cases.jax_step import JaxStep
from benchmarks.cases.sgd import OPTIONS, optimizers
from benchmarks.device import CPU

BATCH = 64
WIDTHS = (784, 128, 64, 10)
CHECKED_STEPS = 3
# float32 rounds a weight of 0.03 to 2e-9, which is 1e-4 of the 2e-5 that three steps move it.
TOLERANCE = 1e-3
LOSSES = {"CrossEntropyLoss": "cross_entropy", "LogSoftmax+NLLLoss": "nll"}


def cases() -> list[Case]:
    return [_case(label, loss) for label, loss in LOSSES.items()]


def cuda_cases() -> list[Case]:
    return cases()[:1]


def _case(label: str, loss: str) -> Case:
    return Case(
        op="MLP step",
        label=label,
        dtype=torch.float32,
        mode="step",
        inputs=_batch,
        contenders=partial(_contenders, loss),
        reference=TrainingStep("reference", partial(_stock_model, loss), optimizers()["SGD"]),
        work=Work(flops=_flops()),
        tolerance=TOLERANCE,
    )


def _flops() -> float:
    """Each layer's product and its two gradients; nobody asks for the images' gradient."""
    products = [2.0 * BATCH * ins * outs for ins, outs in pairwise(WIDTHS)]
    return 3 * sum(products) - products[0]


def _batch(generator: torch.Generator) -> Inputs:
    images = normal(generator, BATCH, WIDTHS[0], dtype=torch.float32)
    return Inputs((images, classes(generator, WIDTHS[-1], BATCH)))


def _contenders(loss: str) -> list[Contender]:
    made = optimizers()
    stock = partial(_stock_model, loss)
    return [
        TrainingStep("fastnn", partial(_fused_model, loss), made["fastnn"]),
        TrainingStep("torch", stock, made["SGD"]),
        TrainingStep("torch, SGD fused", stock, made["SGD fused"]),
        TrainingStep("torch.compile, SGD fused", stock, made["SGD fused"], compiled=True),
        JaxStep(
            "jax.jit",
            initial_weights,
            **OPTIONS,
            checked_steps=CHECKED_STEPS,
            devices=(CPU.name,),
        ),
    ]


def _stock_model(loss: str) -> tuple[nn.Sequential, nn.Module]:
    (a, b), (c, d), (e, f) = pairwise(WIDTHS)
    layers = [nn.Linear(a, b), nn.ReLU(), nn.Linear(c, d), nn.ReLU(), nn.Linear(e, f)]
    if loss == "nll":
        return nn.Sequential(*layers, nn.LogSoftmax(dim=1)), nn.NLLLoss()
    return nn.Sequential(*layers), nn.CrossEntropyLoss()


def _fused_model(loss: str) -> tuple[nn.Sequential, nn.Module]:
    # The last layer has no ReLU to be fused with.
    linear = getattr(fastnn.nn, "Linear", nn.Linear)
    (a, b), (c, d), (e, f) = pairwise(WIDTHS)
    layers = [fastnn.nn.LinearReLU(a, b), fastnn.nn.LinearReLU(c, d), linear(e, f)]
    if loss == "nll":
        return nn.Sequential(*layers, fastnn.nn.LogSoftmax(dim=1)), fastnn.nn.NLLLoss()
    return nn.Sequential(*layers), fastnn.nn.CrossEntropyLoss()


def initial_weights() -> list[Tensor]:
    """Weights and biases that every contender starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, _ = _stock_model("cross_entropy")
    return [parameter.detach() for parameter in model.parameters()]


@dataclass
class TrainingStep(Contender):
    """zero_grad, model, loss, backward, step; the weights stay from call to call."""

    build: Callable[[], tuple[nn.Module, nn.Module]]
    make_optimizer: Callable

    def __post_init__(self) -> None:
        self.step: Callable[[Tensor, Tensor], Tensor] | None = None
        self.params: list[Tensor] = []

    def bind(self, inputs: Inputs) -> Callable[[], Tensor]:
        if self.step is None:
            self._build(inputs.args[0])
        return partial(self.step, *inputs.args)

    def _build(self, images: Tensor) -> None:
        model, criterion = self.build()
        model.to(images)  # their dtype and device
        self.params = list(model.parameters())
        with torch.no_grad():
            for param, value in zip(self.params, initial_weights(), strict=True):
                param.copy_(value)
        optimizer = self.make_optimizer(self.params)

        def loss_of(images: Tensor, labels: Tensor) -> Tensor:
            return criterion(model(images), labels)

        if self.compiled:
            loss_of = torch.compile(loss_of, dynamic=False)

        def step(images: Tensor, labels: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(images, labels)
            loss.backward()
            optimizer.step()
            return loss

        self.step = step

    def check(self, inputs: Inputs) -> list[Tensor]:
        """The losses of some steps, and how far each parameter went."""
        call = self.bind(inputs)
        losses = [call().detach() for _ in range(CHECKED_STEPS)]
        moves = zip(self.params, initial_weights(), strict=True)
        return losses + [new.detach() - old.to(new.device) for new, old in moves]

"""The whole training step of the MNIST MLP: in an ordinary loop, and with ``train_step``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.sgd import sgd

import fastnn
from benchmarks.case import Case, Contender, Inputs, Unavailable, Work, classes, normal
from benchmarks.cases.jax_process import JaxProcess
from benchmarks.cases.sgd import OPTIONS, optimizers
from benchmarks.device import CPU

CHECKED_STEPS = 3
# float32 rounds a weight of 0.03 to 2e-9, which is 1e-4 of the 2e-5 it moves in three steps.
TOLERANCE = 1e-3
# The generated code calls the kernels from C++ instead of from Python.
CPP_WRAPPER = {"cpp_wrapper": True}


class Program(NamedTuple):
    """The trained model: its layer widths and batch size."""

    batch: int
    widths: tuple[int, ...]
    loss: str

    @property
    def flops(self) -> float:
        """Each layer's product and its two gradients; the images need no gradient."""
        products = [2.0 * self.batch * ins * outs for ins, outs in pairwise(self.widths)]
        return 3 * sum(products) - products[0]


MNIST = (784, 128, 64, 10)
PROGRAMS = {
    "CrossEntropyLoss": Program(64, MNIST, "cross_entropy"),
    "LogSoftmax+NLLLoss": Program(64, MNIST, "nll"),
    "batch of 256": Program(256, MNIST, "cross_entropy"),
    "784-512-256-10": Program(64, (784, 512, 256, 10), "cross_entropy"),
}

Step = Callable[[Tensor, Tensor], Tensor]
#: Makes the step from the model, its loss and the optimizer.
MakeStep = Callable[[nn.Module, nn.Module, Optimizer], Step]


def cases() -> list[Case]:
    return [
        _case(op, label, program, make_step)
        for label, program in PROGRAMS.items()
        for op, make_step in (("MLP step", as_written), ("train_step", as_train_step))
    ]


def cuda_cases() -> list[Case]:
    return cases()[:2]


def _case(op: str, label: str, program: Program, make_step: MakeStep) -> Case:
    return Case(
        op=op,
        label=label,
        dtype=torch.float32,
        mode="step",
        inputs=partial(_batch, program),
        contenders=partial(_contenders, program, make_step),
        reference=TrainingStep("reference", program, _stock_model, optimizers()["SGD"]),
        work=Work(flops=program.flops),
        tolerance=TOLERANCE,
    )


def _batch(program: Program, generator: torch.Generator) -> Inputs:
    images = normal(generator, program.batch, program.widths[0], dtype=torch.float32)
    return Inputs((images, classes(generator, program.widths[-1], program.batch)))


def _contenders(program: Program, make_step: MakeStep) -> list[Contender]:
    made = optimizers()
    return [
        TrainingStep("fastnn", program, _fused_model, made["fastnn"], make_step),
        TrainingStep("torch", program, _stock_model, made["SGD"]),
        TrainingStep("torch, SGD fused", program, _stock_model, made["SGD fused"]),
        *_compiled_steps(program),
        JaxStep(
            "jax.jit",
            partial(initial_weights, program),
            **OPTIONS,
            checked_steps=CHECKED_STEPS,
            devices=(CPU.name,),
        ),
    ]


@dataclass
class JaxStep(JaxProcess):
    """The MLP's training step, jitted as a whole."""

    weights: Callable[[], list[Tensor]]
    lr: float
    momentum: float
    checked_steps: int

    def check(self, inputs: Inputs) -> list[Tensor]:
        """The losses, which depend on the weights; the weights' layout is internal to JAX."""
        weights = [weight.numpy() for weight in self.weights()]
        self._start("Mlp", weights, self.lr, self.momentum)
        self._send(inputs)
        return [torch.tensor(loss) for loss in self._ask("losses", self.checked_steps)]


def _compiled_steps(program: Program) -> list[Contender]:
    """Compiles more and more of the step, up to all of it as one graph.

    Each takes ten seconds to compile: a GPU run of a few minutes only includes the first and the
    last, the best.
    """
    on_cpu = {"devices": (CPU.name,)}
    fused, foreach = (optimizers()[name] for name in ("SGD fused", "SGD foreach"))
    of = (program, _stock_model)
    loss = TrainingStep("torch.compile, SGD fused", *of, fused, with_loss_compiled, compiled=True)
    parts = TrainingStep(
        "torch.compile, SGD compiled", *of, foreach, with_parts_compiled, compiled=True, **on_cpu
    )
    wholes = [
        TracedStep(f"torch.compile, {name}", *of, foreach, make, compiled=True, **where)
        for name, make, where in (
            ("one function", as_one_function, on_cpu),
            ("one function, cpp_wrapper", partial(as_one_function, options=CPP_WRAPPER), on_cpu),
            ("one graph", as_one_graph, on_cpu),
            ("one graph, cpp_wrapper", partial(as_one_graph, options=CPP_WRAPPER), {}),
        )
    ]
    return [loss, parts, *wholes]


def _stock_model(program: Program) -> tuple[nn.Sequential, nn.Module]:
    layers: list[nn.Module] = []
    for ins, outs in pairwise(program.widths):
        layers += [nn.Linear(ins, outs), nn.ReLU()]
    layers.pop()
    if program.loss == "nll":
        return nn.Sequential(*layers, nn.LogSoftmax(dim=1)), nn.NLLLoss()
    return nn.Sequential(*layers), nn.CrossEntropyLoss()


def _fused_model(program: Program) -> tuple[nn.Module, nn.Module]:
    model, loss = _stock_model(program)
    return fastnn.fuse(model), fastnn.fuse(loss)


def initial_weights(program: Program) -> list[Tensor]:
    """The initial weights and biases of all contenders."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, _ = _stock_model(program)
    return [parameter.detach() for parameter in model.parameters()]


# ---- the step ------------------------------------------------------------------------------------


def as_written(model: nn.Module, criterion: nn.Module, optimizer: Optimizer) -> Step:
    """The body of the ordinary loop."""
    return _body(_loss_of(model, criterion), optimizer.zero_grad, optimizer.step)


def as_train_step(model: nn.Module, criterion: nn.Module, optimizer: Optimizer) -> Step:
    """One call of train_step."""
    return fastnn.train_step(model, criterion, optimizer)


def with_loss_compiled(model: nn.Module, criterion: nn.Module, optimizer: Optimizer) -> Step:
    """The model's and the loss's backward are compiled, too; the optimizer stays eager."""
    loss_of = torch.compile(_loss_of(model, criterion), dynamic=False)
    return _body(loss_of, optimizer.zero_grad, optimizer.step)


def with_parts_compiled(model: nn.Module, criterion: nn.Module, optimizer: Optimizer) -> Step:
    """As above, with the optimizer's step compiled by itself."""
    loss_of = torch.compile(_loss_of(model, criterion), dynamic=False)
    return _body(loss_of, optimizer.zero_grad, torch.compile(optimizer.step, dynamic=False))


def as_one_function(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: Optimizer,
    options: dict[str, bool] | None = None,
) -> Step:
    """The loop's body under one ``torch.compile``.

    It becomes two graphs, since torch's optimizers break the graph at their step. The loss is
    detached, since a graph that contains its backward can't return it with a history; the gradients
    are set to None by hand, since the compiler can't trace ``zero_grad``.
    """
    loss_of, params = _loss_of(model, criterion), list(model.parameters())

    def step(images: Tensor, labels: Tensor) -> Tensor:
        loss = loss_of(images, labels)
        loss.backward()
        loss = loss.detach()
        optimizer.step()
        for param in params:
            param.grad = None
        return loss

    return torch.compile(step, dynamic=False, options=options)


def as_one_graph(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: Optimizer,
    options: dict[str, bool] | None = None,
) -> Step:
    """One graph for the whole step: gradients are values, and ``sgd`` is torch's functional step.

    ``optimizer`` only provides the settings; the momentum buffers live here.
    """
    loss_of, params = _loss_of(model, criterion), list(model.parameters())
    # With zero buffers the first step's momentum is the gradient, as in torch.
    buffers = [torch.zeros_like(param) for param in params]
    names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "foreach")
    settings = {name: optimizer.param_groups[0][name] for name in names}

    def step(images: Tensor, labels: Tensor) -> Tensor:
        loss = loss_of(images, labels)
        grads = list(torch.autograd.grad(loss, params))
        with torch.no_grad():
            sgd(params, grads, buffers, **settings)
        return loss.detach()

    return torch.compile(step, dynamic=False, fullgraph=True, options=options)


def _loss_of(model: nn.Module, criterion: nn.Module) -> Step:
    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        return criterion(model(images), labels)

    return loss_of


def _body(loss_of: Step, zero_grad: Callable[[], None], update: Callable[[], object]) -> Step:
    def step(images: Tensor, labels: Tensor) -> Tensor:
        zero_grad()
        loss = loss_of(images, labels)
        loss.backward()
        update()
        return loss

    return step


@dataclass
class TrainingStep(Contender):
    """zero_grad, model, loss, backward, step; the weights persist between calls."""

    program: Program
    build: Callable[[Program], tuple[nn.Module, nn.Module]]
    make_optimizer: Callable
    make_step: MakeStep = as_written

    def __post_init__(self) -> None:
        self.step: Step | None = None
        self.params: list[Tensor] = []

    def bind(self, inputs: Inputs) -> Callable[[], Tensor]:
        if self.step is None:
            self._build(inputs.args[0])
        return partial(self.step, *inputs.args)

    def _build(self, images: Tensor) -> None:
        model, criterion = self.build(self.program)
        model.to(images)  # their dtype and device
        self.params = list(model.parameters())
        with torch.no_grad():
            for param, value in zip(self.params, initial_weights(self.program), strict=True):
                param.copy_(value)
        self.step = self.make_step(model, criterion, self.make_optimizer(self.params))

    def check(self, inputs: Inputs) -> list[Tensor]:
        """The losses of some steps, and each parameter's change."""
        call = self.bind(inputs)
        losses = [call().detach() for _ in range(CHECKED_STEPS)]
        moves = zip(self.params, initial_weights(self.program), strict=True)
        return losses + [new.detach() - old.to(new.device) for new, old in moves]


@dataclass
class TracedStep(TrainingStep):
    """A compiled step that includes its backward, which older compilers can't trace."""

    def check(self, inputs: Inputs) -> list[Tensor]:
        # Only the first calls compile and need the setting.
        with _traced_backward():
            return super().check(inputs)


def _traced_backward() -> AbstractContextManager:
    from torch._dynamo import config  # deferred: importing the compiler takes seconds

    if not hasattr(config, "trace_autograd_ops"):
        raise Unavailable("this torch's compiler can't trace a backward")
    # Beyond the recompile limit torch would silently run the remaining steps eagerly.
    return config.patch(trace_autograd_ops=True, fail_on_recompile_limit_hit=True)

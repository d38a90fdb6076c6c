"""The optimizer by itself: SGD with momentum for given gradients, and zero_grad."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

import fastnn
from benchmarks.case import Case, Contender, Inputs, Unavailable, Work, normal
from benchmarks.device import CPU, CUDA, Timer
from benchmarks.timing import Sampler

Shapes = list[tuple[int, ...]]

CHECKED_STEPS = 3  # the first step creates the momentum buffers, the others use them
# Large enough that a bfloat16 parameter's change is not lost in its own rounding.
OPTIONS = {"lr": 0.1, "momentum": 0.9}


def resnet18() -> Shapes:
    """Its 62 parameters: a stem, four stages of two blocks of two convolutions, a classifier."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            ins = channels if block == 0 else width
            shapes += [(width, ins, 3, 3), (width,), (width,)]
            shapes += [(width, width, 3, 3), (width,), (width,)]
            if ins != width:  # the shortcut's convolution
                shapes += [(width, ins, 1, 1), (width,), (width,)]
        channels = width
    return [*shapes, (1000, 512), (1000,)]


def resnet50() -> Shapes:
    """Its 161 parameters: a stem, four stages of blocks of three convolutions, a classifier."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    ins = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            outs = 4 * width
            convolutions = [(width, ins, 1, 1), (width, width, 3, 3), (outs, width, 1, 1)]
            if block == 0:  # the shortcut's
                convolutions.append((outs, ins, 1, 1))
            for convolution in convolutions:
                shapes += [convolution, convolution[:1], convolution[:1]]
            ins = outs
    return [*shapes, (1000, ins), (1000,)]


def mnist_mlp() -> Shapes:
    """The six parameters of 784-128-64-10."""
    widths = ((784, 128), (128, 64), (64, 10))
    return [shape for ins, outs in widths for shape in ((outs, ins), (outs,))]


MODELS = {
    "resnet18, 62 tensors": resnet18(),
    "200 tensors of 100": [(100,)] * 200,
    "MLP, 6 tensors": mnist_mlp(),
}

# A parameter that is a view of a larger one.
STRIDED = {
    "512 of 1024 columns": lambda whole: whole[:, :512],
    "every other of 1024 columns": lambda whole: whole[:, ::2],
}


def cases() -> list[Case]:
    steps = [_step_case(label, shapes) for label, shapes in MODELS.items()]
    half = {"shapes": resnet18(), "dtype": torch.bfloat16}
    steps += [
        _step_case("resnet18, 62 tensors", **half),
        _step_case("resnet18, float32 momentum", **half, float32_momentum=True),
    ]
    steps += [_strided_case(label, view) for label, view in STRIDED.items()]
    return steps + [_zero_grad_case(label, shapes) for label, shapes in MODELS.items()]


def cuda_cases() -> list[Case]:
    half = {"shapes": resnet50(), "dtype": torch.bfloat16}
    steps = [
        _step_case("resnet50, 161 tensors", resnet50()),
        replace(_step_case("resnet50, 161 tensors", **half), compiles=False),
        replace(
            _step_case("resnet50, float32 momentum", **half, float32_momentum=True),
            compiles=False,
        ),
        replace(_step_case("200 tensors of 100", MODELS["200 tensors of 100"]), compiles=False),
        replace(
            _step_case("one tensor of 10^9", [(10**9,)]),
            contenders=_huge_contenders,
            peak_bytes=64e9,
            priority=2,
        ),
    ]
    return [replace(case, large=False) for case in steps]


def _huge_contenders() -> list[Contender]:
    """Each needs 12 GB of its own."""
    names = ("fastnn", "SGD fused", "torch.compile")
    return [one for one in step_contenders() if one.name in names]


def optimizers() -> dict[str, Callable[[Iterable[Tensor]], Optimizer]]:
    """Functions that make the contenders' optimizers."""
    stock = partial(torch.optim.SGD, **OPTIONS)
    return {
        "fastnn": partial(fastnn.optim.SGD, **OPTIONS),
        "SGD": stock,
        "SGD foreach": partial(stock, foreach=True),
        "SGD fused": partial(stock, fused=True),
    }


# ---- step ----------------------------------------------------------------------------------------


def _step_case(
    label: str,
    shapes: Shapes,
    dtype: torch.dtype = torch.float32,
    float32_momentum: bool = False,
) -> Case:
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    # Parameter, gradient and momentum are read; parameter and momentum are written.
    bytes_per_element = 3 * dtype.itemsize + 2 * (4 if float32_momentum else dtype.itemsize)
    return Case(
        op="SGD momentum",
        label=label,
        dtype=dtype,
        mode="step",
        inputs=partial(parameters_and_gradients, shapes=shapes, dtype=dtype),
        contenders=float32_momentum_contenders if float32_momentum else step_contenders,
        reference=step_reference(),
        work=Work(bytes=bytes_per_element * elements),
        large=elements > 2**20,
    )


def _strided_case(label: str, view: Callable[[Tensor], Tensor]) -> Case:
    def inputs(generator: torch.Generator) -> Inputs:
        params, grads = parameters_and_gradients(generator, [(512, 1024)]).args
        return Inputs(([view(param) for param in params], [view(grad).clone() for grad in grads]))

    return replace(_step_case(label, [(512, 512)]), inputs=inputs, contenders=_strided_contenders)


def _strided_contenders() -> list[Contender]:
    """Leaves out torch's fused implementation, which is wrong where strides differ."""
    return [one for one in step_contenders() if one.name != "SGD fused"]


def parameters_and_gradients(
    generator: torch.Generator, shapes: Shapes, dtype: torch.dtype = torch.float32
) -> Inputs:
    tensors = [normal(generator, *shape, dtype=dtype) for shape in shapes * 2]
    return Inputs((tensors[: len(shapes)], tensors[len(shapes) :]))


def step_contenders() -> list[Contender]:
    made = optimizers()
    return [
        *(Step(name, make) for name, make in made.items()),
        Step("Apex FusedSGD", _apex_sgd, devices=(CUDA.name,)),
        Step("torch.compile", made["SGD"], compiled=True),
    ]


def float32_momentum_contenders() -> list[Contender]:
    """float32 momentum of narrower parameters, which torch's fused implementation rejects."""
    made = optimizers()
    stock = partial(_with_float32_momentum, made["SGD"])
    return [
        Step("fastnn", partial(made["fastnn"], float32_momentum=True)),
        Step("SGD", stock),
        Step("SGD foreach", partial(_with_float32_momentum, made["SGD foreach"])),
        Step("torch.compile", stock, compiled=True),
    ]


def _with_float32_momentum(
    make: Callable[[Iterable[Tensor]], Optimizer], params: list[Tensor]
) -> Optimizer:
    """How to get it from torch: float32 buffers that exist before the first step."""
    optimizer = make(params)
    for param in params:
        zeros = torch.zeros_like(param, dtype=torch.float32)
        optimizer.state[param]["momentum_buffer"] = zeros
    return optimizer


def _apex_sgd(params: Iterable[Tensor]) -> Optimizer:
    try:
        from apex.optimizers import FusedSGD
    except ImportError:
        raise Unavailable("apex is not installed") from None
    return FusedSGD(params, **OPTIONS)


def step_reference() -> Contender:
    return Step("reference", partial(torch.optim.SGD, foreach=False, **OPTIONS))


@dataclass
class Step(Contender):
    """``optimizer.step()``; parameters and momentum stay from call to call, as in training."""

    make: Callable[[Iterable[Tensor]], Optimizer]

    def __post_init__(self) -> None:
        self.params: list[Tensor] = []
        self.step: Callable[[], object] | None = None

    def bind(self, inputs: Inputs) -> Callable[[], object]:
        params, grads = inputs.args
        if self.step is None:
            self._build(params)
        for param, value, grad in zip(self.params, params, grads, strict=True):
            param.data.copy_(value)
            if param.grad is None:
                param.grad = torch.empty_like(param)
            param.grad.copy_(grad)
        return self.step

    def _build(self, params: list[Tensor]) -> None:
        # Not empty_like(), which would close the gaps of a view.
        self.params = [
            torch.nn.Parameter(param.new_empty_strided(param.shape, param.stride()))
            for param in params
        ]
        optimizer = self.make(self.params)
        self.step = torch.compile(lambda: optimizer.step()) if self.compiled else optimizer.step

    def close(self) -> None:
        self.__post_init__()

    def check(self, inputs: Inputs) -> list[Tensor]:
        call = self.bind(inputs)
        for _ in range(CHECKED_STEPS):
            call()
        # The change, not the parameters: next to their size an error would look small.
        return [new.detach() - old for new, old in zip(self.params, inputs.args[0], strict=True)]


# ---- zero_grad -----------------------------------------------------------------------------------


def _zero_grad_case(label: str, shapes: Shapes) -> Case:
    return Case(
        op="zero_grad",
        label=label,
        dtype=torch.float32,
        mode="step",
        inputs=partial(parameters_and_gradients, shapes=shapes),
        contenders=zero_grad_contenders,
        reference=zero_grad_reference(),
    )


def zero_grad_contenders() -> list[Contender]:
    made = optimizers()
    return [ZeroGrad(name, made[name]) for name in ("fastnn", "SGD")]


def zero_grad_reference() -> Contender:
    return ZeroGrad("reference", optimizers()["SGD"])


@dataclass
class ZeroGrad(Contender):
    """``optimizer.zero_grad()``, which sets the gradients to None."""

    make: Callable[[Iterable[Tensor]], Optimizer]

    def __post_init__(self) -> None:
        self.params: list[Tensor] = []
        self.optimizer: Optimizer | None = None

    def bind(self, inputs: Inputs) -> Callable[[], object]:
        if self.optimizer is None:
            self.params = [torch.nn.Parameter(param) for param in inputs.args[0]]
            self.optimizer = self.make(self.params)
        return self.optimizer.zero_grad

    def sampler(self, inputs: Inputs, timer: Timer = CPU.time_calls) -> Sampler:
        """The gradients must exist each time; setting them is not timed."""
        zero_grad, params, grads = self.bind(inputs), self.params, inputs.args[1]

        def sample(count: int) -> float:
            nanoseconds = 0
            for _ in range(count):
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad
                start = time.perf_counter_ns()
                zero_grad()
                nanoseconds += time.perf_counter_ns() - start
            return nanoseconds * 1e-9

        return sample

    def check(self, inputs: Inputs) -> Tensor:
        self.sampler(inputs)(1)
        return torch.tensor([float(param.grad is not None) for param in self.params])

"""What is measured: a case is one operator at one shape, dtype and mode, with its contenders."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.device import CPU, DEVICES, Device, Timer
from benchmarks.timing import Sampler

OURS = "fastnn"
MODES = ("forward", "forward_backward", "step", "call", "memory")
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

# The largest error accepted, as the sum of absolute errors over the sum of absolute values (a sum,
# so that neither one large element nor many small ones hide the others). float32: rounding errors
# of 2^-24 grow about with the square root of a sum's length, 2e-6 at 1024 terms, and some libraries
# add in less careful orders. bfloat16: torch rounds log-probabilities around -10 to multiples of
# 1/16 before it takes their exponentials, which is 2 % on average; twice that.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


class Unavailable(Exception):
    """A contender can't run here; the message says why."""


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call, and the gradient that its backward starts from."""

    args: tuple
    grad: Tensor | None = None

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The arguments whose gradients are asked for."""
        return tuple(arg for arg in self.args if isinstance(arg, Tensor) and arg.requires_grad)

    def double(self) -> Inputs:
        """The same values in float64, for the reference."""
        return self._map(_double)

    def on(self, device: Device) -> Inputs:
        """The same values on a device."""
        return self._map(device.place)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        return Inputs(_map(change, self.args), None if self.grad is None else change(self.grad))


def _map(change: Callable[[Tensor], Tensor], value):
    if isinstance(value, (tuple, list)):
        return type(value)(_map(change, item) for item in value)
    return change(value)


def _double(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


@dataclass(frozen=True)
class Work:
    """The least that a case must do, whoever does it: GEMM flops, or bytes to and from memory."""

    flops: float = 0
    bytes: float = 0


@dataclass
class Contender:
    """One implementation of a case.

    ``trainable`` is False for what autograd can't differentiate, ``same_algorithm`` for what solves
    a larger problem in another way than operator by operator. ``devices`` are those it exists on.
    """

    name: str
    compiled: bool = field(default=False, kw_only=True)
    trainable: bool = field(default=True, kw_only=True)
    same_algorithm: bool = field(default=True, kw_only=True)
    devices: Collection[str] = field(default=tuple(DEVICES), kw_only=True)

    def bind(self, inputs: Inputs) -> Callable[[], object]:
        """The call to time, over these inputs; preparation that a user does once happens here."""
        raise NotImplementedError

    def check(self, inputs: Inputs) -> object:
        """What to compare with the reference: the call's results."""
        return self.bind(inputs)()

    def sampler(self, inputs: Inputs, timer: Timer = CPU.time_calls) -> Sampler:
        """What times the calls over these inputs."""
        return partial(timer, self.bind(inputs))

    def close(self) -> None:
        """Ends what the contender started."""


@dataclass
class Function(Contender):
    """An operator: its forward, and its backward where the inputs ask for gradients.

    ``torch.autograd.grad`` computes what ``backward`` does in a training loop but adds up nothing
    in ``.grad``, so that the contenders can share their inputs.
    """

    function: Callable[..., Tensor]

    def bind(self, inputs: Inputs) -> Callable[[], object]:
        if not inputs.leaves:
            return partial(self.function, *inputs.args)
        return partial(forward_backward, self.function, inputs.args, inputs.leaves, inputs.grad)


def forward_backward(
    function: Callable[..., Tensor],
    args: Sequence[object],
    leaves: Sequence[Tensor],
    grad: Tensor | None,
) -> tuple[Tensor, ...]:
    """The output and the gradients of all leaves."""
    output = function(*args)
    return output, *torch.autograd.grad(output, leaves, grad)


@dataclass
class Compiled(Function):
    """The function through ``torch.compile``, for exactly the shapes it will see."""

    def __post_init__(self) -> None:
        self.compiled = True
        self.is_ready = False

    def bind(self, inputs: Inputs) -> Callable[[], object]:
        if not self.is_ready:  # not earlier: the compiler's import alone takes seconds
            self.function = torch.compile(self.function, dynamic=False)
            self.is_ready = True
        return super().bind(inputs)


@dataclass(frozen=True)
class Case:
    """One row of the results."""

    op: str
    label: str
    dtype: torch.dtype
    mode: str
    inputs: Callable[[torch.Generator], Inputs]
    contenders: Callable[[], list[Contender]]
    reference: Contender
    work: Work = Work()
    tolerance: float | None = None  # default: by dtype
    check_inputs: Callable[[torch.Generator], Inputs] | None = None  # default: inputs
    grad_enabled: bool | None = None  # default: not in forward mode
    peak_bytes: float = 0  # memory that the check and the contenders need, about; 0: little
    large: bool = False  # peak memory is worth measuring

    @property
    def key(self) -> str:
        """The case's name: what ``--filter`` searches."""
        return f"{self.op} {self.label} {DTYPE_NAMES[self.dtype]} {self.mode}"

    @property
    def records_graph(self) -> bool:
        """Whether autograd is on."""
        return self.mode != "forward" if self.grad_enabled is None else self.grad_enabled

    @property
    def allowed_error(self) -> float:
        """The error above which a contender isn't timed."""
        return TOLERANCES[self.dtype] if self.tolerance is None else self.tolerance

    def in_memory_mode(self) -> Case:
        """The same case, of which peak memory is measured."""
        return replace(self, mode="memory", grad_enabled=self.records_graph)


def normal(
    generator: torch.Generator, *shape: int, dtype: torch.dtype, scale: float = 1.0
) -> Tensor:
    """A tensor of normally distributed values; drawn in float32 for every dtype."""
    return torch.randn(*shape, generator=generator).mul_(scale).to(dtype)


def classes(generator: torch.Generator, rows: int, count: int) -> Tensor:
    """A class index for each row."""
    return torch.randint(count, (rows,), generator=generator)

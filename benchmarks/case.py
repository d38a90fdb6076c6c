"""What is measured: a case is an operator with a shape, dtype and mode, and its contenders."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.device import CPU, DEVICES, Timer
from benchmarks.timing import Sampler

OURS = "fastnn"
MODES = ("forward", "forward_backward", "step", "call", "memory")
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

# The largest error accepted: the sum of absolute errors over the sum of absolute values (sums, so
# that neither one large element nor many small ones hide the others). float32: rounding errors of
# 2^-24 grow roughly with the square root of the number of terms, to 2e-6 at 1024, and some
# libraries sum in less careful orders. bfloat16: torch rounds log-probabilities around -10 to
# multiples of 1/16 before it exponentiates them, an average error of 2 %; twice that is allowed.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


class Unavailable(Exception):
    """A contender can't run here; the message says why."""


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call, and the gradient its backward starts from."""

    args: tuple
    grad: Tensor | None = None

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The arguments whose gradients are wanted."""
        return tuple(arg for arg in self.args if isinstance(arg, Tensor) and arg.requires_grad)

    def double(self) -> Inputs:
        """The same values in float64, for the reference."""
        return self.map(_double)

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """Applies a function to each tensor."""
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
    """The least work of any implementation: GEMM flops, or bytes of memory traffic."""

    flops: float = 0
    bytes: float = 0


@dataclass
class Contender:
    """One implementation of a case.

    ``trainable`` is False if autograd can't differentiate it, ``same_algorithm`` if it solves a
    larger problem as a whole instead of operator by operator. ``devices`` are those it supports.
    ``compiled`` is True for torch.compile, ``jit`` also for peers that compile their kernels at the
    first call. ``overwrites`` is True if it leaves its gradient in its input's memory.
    """

    name: str
    compiled: bool = field(default=False, kw_only=True)
    jit: bool = field(default=False, kw_only=True)
    trainable: bool = field(default=True, kw_only=True)
    same_algorithm: bool = field(default=True, kw_only=True)
    overwrites: bool = field(default=False, kw_only=True)
    devices: Collection[str] = field(default=tuple(DEVICES), kw_only=True)

    def bind(self, inputs: Inputs) -> Callable[[], object]:
        """The call to time, for these inputs; preparation that users do once happens here."""
        raise NotImplementedError

    def check(self, inputs: Inputs) -> object:
        """The call's results, for comparison with the reference."""
        return self.bind(inputs)()

    def exact(self, inputs: Inputs) -> object:
        """The results in float64, if this is the reference."""
        return self.check(inputs.double())

    def sampler(self, inputs: Inputs, timer: Timer = CPU.time_calls) -> Sampler:
        """Times the calls for these inputs."""
        return partial(timer, self.bind(inputs))

    def close(self) -> None:
        """Ends whatever the contender started."""


@dataclass
class Function(Contender):
    """An operator: its forward, and its backward if the inputs want gradients.

    ``torch.autograd.grad`` does the work of ``backward`` in a training loop, but accumulates
    nothing in ``.grad``, so the contenders can share their inputs.
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


# Float64 elements at a time: 1 GiB in each of the reference's tensors.
EXACT_ELEMENTS = 2**27


@dataclass
class MeanOverRows(Function):
    """A reference that is a mean over the first dimension, computed a block of rows at a time.

    Gradients have the rows of their arguments; float64 copies of all might not fit in memory.
    """

    def exact(self, inputs: Inputs) -> list[Tensor]:
        rows = len(inputs.args[0])
        size = max(1, EXACT_ELEMENTS * rows // inputs.args[0].numel())
        chunks = zip(*(arg.split(size) for arg in inputs.args), strict=True)
        losses, gradients = zip(*(self._part(Inputs(args), rows) for args in chunks), strict=True)
        return [torch.stack(losses).sum(), *map(torch.cat, zip(*gradients, strict=True))]

    def _part(self, inputs: Inputs, rows: int) -> tuple[Tensor, list[Tensor]]:
        """The contribution of these rows to the loss, and their gradients."""
        results = self.check(inputs.double())
        loss, *gradients = results if isinstance(results, tuple) else (results,)
        share = len(inputs.args[0]) / rows
        return loss.detach() * share, [gradient * share for gradient in gradients]


@dataclass
class Compiled(Function):
    """The function under ``torch.compile``, specialised to the shapes it will see."""

    def __post_init__(self) -> None:
        self.compiled = True
        self.is_ready = False

    def bind(self, inputs: Inputs) -> Callable[[], object]:
        if not self.is_ready:  # deferred: importing the compiler takes seconds
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
    peak_bytes: float = 0  # approximate memory for the check and the contenders; 0: little
    large: bool = False  # whether peak memory is worth measuring
    tf32: bool = False  # whether all contenders' float32 products may use TF32
    compiles: bool = True  # whether torch.compile is worth its time
    priority: int = 1  # cases of priority 1 run first, in case time runs out

    @property
    def key(self) -> str:
        """The case's name, which ``--filter`` searches."""
        return f"{self.op} {self.label} {self.dtype_name} {self.mode}"

    @property
    def dtype_name(self) -> str:
        """The dtype as named in the results."""
        return "tf32" if self.tf32 else DTYPE_NAMES[self.dtype]

    @property
    def records_graph(self) -> bool:
        """Whether autograd is on."""
        return self.mode != "forward" if self.grad_enabled is None else self.grad_enabled

    @property
    def allowed_error(self) -> float:
        """The error above which a contender is not timed."""
        return TOLERANCES[self.dtype] if self.tolerance is None else self.tolerance

    def in_memory_mode(self) -> Case:
        """The same case, measuring peak memory."""
        return replace(self, mode="memory", grad_enabled=self.records_graph)


def normal(
    generator: torch.Generator, *shape: int, dtype: torch.dtype, scale: float = 1.0
) -> Tensor:
    """A tensor of normally distributed values, drawn in float32 whatever the dtype."""
    values = torch.randn(*shape, generator=generator, device=generator.device)
    return values.mul_(scale).to(dtype)


def classes(generator: torch.Generator, count: int, *shape: int) -> Tensor:
    """Indices of ``count`` classes."""
    return torch.randint(count, shape, generator=generator, device=generator.device)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allows float32 matrix products to use TF32, or forbids it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

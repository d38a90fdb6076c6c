"""fastnn's and torch's SGD side by side: parameters, training, and how far two runs may differ."""

from __future__ import annotations

import functools
import io
import itertools
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastnn
from support.sample_inputs import Draws

HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float64, torch.float32, *HALF]
MOMENTUM = {"lr": 0.1, "momentum": 0.9}
EVERYTHING = {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}
OPTIMIZERS = [fastnn.optim.SGD, torch.optim.SGD]


# --- inputs ---------------------------------------------------------------------------------------


def contiguous(x: Tensor) -> Tensor:
    return x.clone()


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1)


def sliced(x: Tensor) -> Tensor:
    """Every other element of a larger tensor: not dense, so clone() changes its strides."""
    base = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), math.nan)
    base[..., ::2] = x
    return base[..., ::2]


def left_half(x: Tensor) -> Tensor:
    """Rows that are contiguous, with gaps between them."""
    return torch.cat([x, torch.full_like(x, math.nan)], dim=-1)[..., : x.shape[-1]]


def shifted(x: Tensor) -> Tensor:
    """Starts one element into its memory, so no vector load is aligned."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def channels_last(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.channels_last)


def expanded(x: Tensor) -> Tensor:
    """Stride 0, like the gradient of a sum; repeats the first row's values."""
    return x[:1].expand(x.shape)


# Shape, the parameter's layout, the gradient's layout.
LAYOUTS = [
    ((), contiguous, contiguous),  # 0-d
    ((0,), contiguous, contiguous),  # nothing to do
    ((3, 0), contiguous, contiguous),  # nothing to do, with a row length of 0
    ((1,), contiguous, contiguous),  # less than any vector
    ((15,), contiguous, contiguous),  # one less than a vector of 16 float32
    ((16,), contiguous, contiguous),  # exactly
    ((17,), contiguous, contiguous),  # one more
    ((17,), shifted, contiguous),  # unaligned
    ((17,), contiguous, shifted),
    ((1021,), contiguous, contiguous),  # many vectors and a tail
    ((7, 5), transposed, contiguous),
    ((7, 5), contiguous, transposed),
    ((7, 5), transposed, transposed),
    ((7, 5), sliced, contiguous),
    ((7, 5), contiguous, sliced),
    ((7, 5), sliced, transposed),
    ((40, 50), left_half, contiguous),  # rows of vectors
    ((700, 25), left_half, contiguous),  # short rows, several of them at once
    ((2, 70, 121), sliced, contiguous),  # on several threads, which start in the middle of a row
    ((130, 131), contiguous, transposed),  # long rows of one across long rows of the other
    ((7, 1), transposed, contiguous),  # strides without meaning, as the size is 1
    ((7, 5), contiguous, expanded),
    ((7, 5), transposed, expanded),
    ((2, 3, 4, 5), channels_last, contiguous),
    ((2, 3, 4, 5), contiguous, channels_last),
    ((2, 3, 4, 5), channels_last, channels_last),
    ((2, 3, 1, 1), channels_last, contiguous),  # a 1x1 convolution: both layouts at once
]


def randn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return Draws(seed).normal(*shape, dtype=torch.float64).to(dtype)


def layout_params(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """One parameter per layout; the same values at every call."""
    return [
        torch.nn.Parameter(layout(randn(shape, dtype, seed)))
        for seed, (shape, layout, _) in enumerate(LAYOUTS)
    ]


@functools.cache
def layout_grads(dtype: torch.dtype, seed: int) -> list[Tensor]:
    """A gradient for each of ``layout_params``; shared by tests, so none may write to it."""
    return [
        layout(randn(shape, dtype, 1000 * seed + i)) for i, (shape, _, layout) in enumerate(LAYOUTS)
    ]


def set_layout_grads(params: list[torch.nn.Parameter], seed: int) -> None:
    for param, grad in zip(params, layout_grads(params[0].dtype, seed), strict=True):
        param.grad = grad


def make_params(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Contiguous parameters; the same values at every call."""
    return [torch.nn.Parameter(randn(shape, dtype, i)) for i, shape in enumerate(shapes)]


def set_grads(params: list[Tensor], seed: int) -> None:
    for i, param in enumerate(params):
        param.grad = randn(tuple(param.shape), param.dtype, 1000 * seed + i)


def make_pair(*shapes: tuple[int, ...], **options):
    """The same parameters under fastnn's and under torch's optimizer."""
    return [optimizer(make_params(*shapes), **options) for optimizer in OPTIMIZERS]


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def train(optimizer: torch.optim.Optimizer, steps: int, first_seed: int = 1) -> None:
    """Steps along random gradients that only depend on the seed."""
    for seed in range(first_seed, first_seed + steps):
        set_grads(params_of(optimizer), seed)
        optimizer.step()


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- how far two runs may differ ------------------------------------------------------------------


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def momentum_buffer(optimizer: torch.optim.Optimizer, param: Tensor) -> Tensor | None:
    return optimizer.state.get(param, {}).get("momentum_buffer")


def tolerance(dtype: torch.dtype, steps: int, *tensors: Tensor | None) -> float:
    """How far apart two implementations may be after ``steps`` steps.

    A step rounds at most ten times (a product and a sum each for decay, momentum, dampening,
    Nesterov and the step itself), each time by u times the largest value involved. Errors don't
    grow later: the runs here have lr / (1 - momentum) <= 1. Both sides round, hence the 2.
    """
    values = [t.detach().abs().max().item() for t in tensors if t is not None and t.numel()]
    return 2 * 10 * steps * unit_roundoff(dtype) * max(values, default=0.0)


def assert_same_training(ours: torch.optim.Optimizer, stock: torch.optim.Optimizer, steps: int):
    """Equal parameters and momentum buffers, up to the rounding of ``steps`` steps."""
    assert len(params_of(ours)) == len(params_of(stock)) > 0
    for mine, theirs in zip(params_of(ours), params_of(stock), strict=True):
        my_buffer, their_buffer = momentum_buffer(ours, mine), momentum_buffer(stock, theirs)
        assert (my_buffer is None) == (their_buffer is None)
        atol = tolerance(theirs.dtype, steps, theirs, theirs.grad, their_buffer)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)
        if their_buffer is not None:
            torch.testing.assert_close(my_buffer, their_buffer, rtol=0, atol=atol)


class ExactRun:
    """SGD by its documented formula in float64, with a bound on the rounding of implementations.

    A running error analysis: each value comes with a bound on the error of an implementation that
    computes in one dtype and stores parameter and buffer in another (the buffer in a third, if
    given). The bound propagates the operands' errors and adds 4 roundings for each
    ``a * x + b * y`` (a, b and both products, or 1 - dampening; the fourth is the sum's) and one
    for each stored value.
    """

    def __init__(
        self,
        param: Tensor,
        storage: torch.dtype,
        compute: torch.dtype,
        buffer_storage: torch.dtype | None = None,
    ) -> None:
        self.param, self.param_error = param.clone(), torch.zeros_like(param)
        self.buffer: Tensor | None = None
        self.buffer_error = torch.zeros_like(param)
        self.compute_roundoff = unit_roundoff(compute)
        self.storage, self.buffer_storage = storage, buffer_storage or storage

    def _sum(self, a: float, x: Tensor, x_error: Tensor, b: float, y: Tensor, y_error: Tensor):
        error = abs(a) * x_error + abs(b) * y_error
        terms = abs(a) * (x.abs() + x_error) + abs(b) * (y.abs() + y_error)
        return a * x + b * y, error + 4 * self.compute_roundoff * terms

    def _stored(self, x: Tensor, x_error: Tensor, storage: torch.dtype) -> Tensor:
        roundoff = unit_roundoff(storage)
        # Below the smallest normal number the error is absolute: half the smallest subnormal.
        underflow = torch.finfo(storage).smallest_normal * roundoff
        return x_error + roundoff * (x.abs() + x_error) + underflow

    def step(self, grad, lr, momentum, dampening, weight_decay, nesterov, maximize) -> None:
        d, d_error = (-grad if maximize else grad), torch.zeros_like(grad)
        if weight_decay:
            d, d_error = self._sum(1, d, d_error, weight_decay, self.param, self.param_error)
        if momentum:
            b, b_error = d, d_error
            if self.buffer is not None:
                b, b_error = self._sum(
                    momentum, self.buffer, self.buffer_error, 1 - dampening, d, d_error
                )
            self.buffer, self.buffer_error = b, self._stored(b, b_error, self.buffer_storage)
            if nesterov:
                d, d_error = self._sum(1, d, d_error, momentum, b, self.buffer_error)
            else:
                d, d_error = b, self.buffer_error
        param, error = self._sum(1, self.param, self.param_error, -lr, d, d_error)
        self.param, self.param_error = param, self._stored(param, error, self.storage)


def flat(tensors: list[Tensor]) -> Tensor:
    """All elements in logical order, as one float64 vector."""
    return torch.cat([t.detach().double().flatten() for t in tensors])


def assert_within(actual: Tensor, exact: Tensor, bound: Tensor) -> None:
    excess = (actual - exact).abs() - bound
    assert bool((excess <= 0).all()), f"{excess.max().item():.3g} beyond the rounding bound"


# --- options --------------------------------------------------------------------------------------

OPTIONS = [
    {
        "lr": 0.05,
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
        "maximize": maximize,
    }
    for momentum, dampening, nesterov in [
        (0.0, 0.0, False),
        (0.9, 0.0, False),
        (0.9, 0.3, False),
        (0.9, 0.0, True),
    ]
    for weight_decay, maximize in itertools.product([0.0, 0.02], [False, True])
]


def option_name(options: dict) -> str:
    return ",".join(f"{k}={v}" for k, v in options.items() if v and k != "lr") or "plain"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the step's computation; float16 and bfloat16 are only rounded to at the end.

    Without the extension torch itself steps, and rounds each intermediate to them.
    """
    return torch.float32 if dtype in HALF and fastnn.is_available() else dtype


# --- copies, classes and modes --------------------------------------------------------------------


def through_pickle(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


def through_torch_save(optimizer):
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class TaggedParameter(torch.nn.Parameter):
    """The simplest subclass; it changes nothing."""


class Recorder(TorchDispatchMode):
    """Records each operator that reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.mutating: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.is_mutable:
            self.mutating.append(str(func))
        return func(*args, **(kwargs or {}))


class OperatorNames(TorchDispatchMode):
    """Records the operators that are called, except those inside other operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class OwnStep(torch.optim.SGD):
    def step(self, closure=None):
        return None

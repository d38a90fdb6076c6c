"""Ten steps of the MNIST perceptron: the same bits twice, and torch's numbers up to rounding."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import fastnn
from support.sample_inputs import Draws

SIZES = (784, 128, 64, 10)
BATCH = 64
STEPS = 10
LR = 0.1
# Of 60 seeds, the one that keeps all activations farthest from their ReLU's kink: 1.5e-5, some
# hundred times their float32 rounding error.
FIRST_SEED = 3800
DTYPES = [torch.float32, torch.float64]


@dataclass(frozen=True)
class Backend:
    """The building blocks of one training, stock or fused."""

    hidden: Callable[[int, int], list[nn.Module]]
    head: Callable[[], list[nn.Module]]
    loss: Callable[[], nn.Module]
    optimizer: type[torch.optim.SGD]


def linear_and_relu(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Linear(inputs, outputs), nn.ReLU()]


def linear_relu(inputs: int, outputs: int) -> list[nn.Module]:
    return [fastnn.nn.LinearReLU(inputs, outputs)]


LOSSES = {
    "log_softmax+nll": {
        "stock": Backend(linear_and_relu, lambda: [nn.LogSoftmax(1)], nn.NLLLoss, torch.optim.SGD),
        "ours": Backend(
            linear_relu, lambda: [fastnn.nn.LogSoftmax(1)], fastnn.nn.NLLLoss, fastnn.optim.SGD
        ),
    },
    "cross_entropy": {
        "stock": Backend(linear_and_relu, lambda: [], nn.CrossEntropyLoss, torch.optim.SGD),
        "ours": Backend(linear_relu, lambda: [], fastnn.nn.CrossEntropyLoss, fastnn.optim.SGD),
    },
}


@functools.cache
def digits(seed: int) -> tuple[Tensor, Tensor]:
    """A batch that resembles MNIST: a blurred blob at its class's place, mostly black."""
    draw = Draws(seed)
    labels = draw.integers(0, 10, BATCH)
    rows = torch.arange(28.0).view(1, 28, 1)
    columns = torch.arange(28.0).view(1, 1, 28)
    jitter = draw.normal(2, BATCH, 1, 1)
    row = 7 + 14 * (labels % 2).view(-1, 1, 1) + jitter[0]
    column = 4 + 5 * (labels // 2).view(-1, 1, 1) + jitter[1]
    strokes = torch.exp(-((rows - row) ** 2 + (columns - column) ** 2) / 8)
    noise = 0.05 * draw.uniform(BATCH, 28, 28)
    images = ((strokes + noise).clamp(0, 1) - 0.1307) / 0.3081
    return images.view(BATCH, 784), labels


def make_model(backend: Backend, dtype: torch.dtype) -> nn.Sequential:
    device = torch.get_default_device()
    torch.manual_seed(0)
    modules = []
    with torch.device("cpu"):  # FIRST_SEED was chosen for the CPU's random numbers
        for inputs, outputs in itertools.pairwise(SIZES[:3]):
            modules += backend.hidden(inputs, outputs)
        modules += [nn.Linear(SIZES[2], SIZES[3]), *backend.head()]
    return nn.Sequential(*modules).to(device, dtype)


@dataclass(frozen=True)
class Training:
    """The results of a training: initial and final parameters, and a record of each step."""

    start: list[Tensor]
    end: list[Tensor]
    losses: list[float]
    active: list[Tensor]  # which hidden units of which rows passed their ReLU, in each step


def train(backend: Backend, dtype: torch.dtype) -> Training:
    model = make_model(backend, dtype)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    active: list[Tensor] = []
    for module in model:
        if isinstance(module, (nn.ReLU, fastnn.nn.LinearReLU)):
            module.register_forward_hook(lambda _, __, output: active.append(output > 0))
    criterion = backend.loss()
    optimizer = backend.optimizer(model.parameters(), lr=LR, momentum=0.9)
    losses = []
    for step in range(STEPS):
        images, labels = digits(FIRST_SEED + step)
        optimizer.zero_grad()
        loss = criterion(model(images.to(dtype)), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return Training(start, [p.detach() for p in model.parameters()], losses, active)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# The longest path from a pixel to a weight's gradient: the sums of three layers and of the softmax,
# back through the softmax and two layers, and over the batch. Each term may add a rounding.
ROUNDINGS = sum(SIZES) + sum(SIZES[1:]) + BATCH
# Roundings have random signs: n of them add up like a random walk, very likely to < 6 sqrt(n).
DRIFT = 6 * math.sqrt(ROUNDINGS)


def tolerance(dtype: torch.dtype, training: Training) -> float:
    """How far the parameters of two implementations may differ after the training.

    Rounding changes each step's gradients, and so a parameter's total movement, by DRIFT * u
    relative to their size; each step also rounds the parameter itself. The steps add up, and both
    implementations round (hence eps = 2 u).
    """
    pairs = list(zip(training.start, training.end, strict=True))
    way = max((end - start).abs().max().item() for start, end in pairs)
    size = max(end.abs().max().item() for _, end in pairs)
    return STEPS * torch.finfo(dtype).eps * (DRIFT * way + size)


def assert_same_units_active(first: Training, second: Training) -> None:
    """The tolerance assumes this: a ReLU flipped by rounding would change a whole gradient row."""
    assert len(first.active) == len(second.active) == 2 * STEPS
    for step, (a, b) in enumerate(zip(first.active, second.active, strict=True)):
        assert torch.equal(a, b), f"a hidden unit differs in step {step // 2}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_two_runs_give_the_same_bits(loss, dtype, threads):
    first, second = (train(LOSSES[loss]["ours"], dtype) for _ in range(2))
    for a, b in zip(first.end, second.end, strict=True):
        assert torch.equal(a, b)
    assert first.losses == second.losses


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_training_equals_stock_torch(loss, dtype, threads):
    ours, stock = (train(LOSSES[loss][backend], dtype) for backend in ("ours", "stock"))
    assert_same_units_active(ours, stock)
    for mine, theirs in zip(ours.end, stock.end, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance(dtype, stock))
    # The losses, which fall from ln(10), went through the same roundings.
    loss_atol = STEPS * torch.finfo(dtype).eps * DRIFT * math.log(10)
    assert ours.losses == pytest.approx(stock.losses, rel=0, abs=loss_atol)


@pytest.mark.parametrize("loss", LOSSES)
def test_float32_training_is_as_near_to_float64_as_rounding_allows(loss):
    """Compares with float64, in case ours and torch's float32 are wrong together."""
    ours = train(LOSSES[loss]["ours"], torch.float32)
    truth = train(LOSSES[loss]["stock"], torch.float64)
    assert_same_units_active(ours, truth)
    # No initial error: the weights are drawn in float32, and the pixels are float32 in both.
    for mine, exact in zip(ours.end, truth.end, strict=True):
        atol = tolerance(torch.float32, truth)
        torch.testing.assert_close(mine.double(), exact, rtol=0, atol=atol)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_training_learns(loss):
    """The comparisons above would pass for a training without progress, too."""
    ours = train(LOSSES[loss]["ours"], torch.float32)
    assert ours.losses[-1] < 0.7 * ours.losses[0]
    for start, end in zip(ours.start, ours.end, strict=True):
        assert not torch.equal(start, end)

"""A training step in one call: the bits of the loop over our operators, and its limits."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.overrides import BaseTorchFunctionMode

import fastnn
from fastnn._fused_step import FusedStep
from support.marks import needs_extension
from support.sample_inputs import DTYPES
from support.training_programs import everything, same

pytestmark = [needs_extension, pytest.mark.cpu_only("the whole step is fused on the CPU")]

FEATURES, CLASSES = 20, 7
STEPS = 6


def chain(*sizes: int, bias: bool = True) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for ins, outs in pairwise(sizes):
        layers += [nn.Linear(ins, outs, bias), nn.ReLU()]
    return layers[:-1]


class Training:
    """A model, its loss and its optimizer, equal for equal arguments."""

    def __init__(
        self,
        make: Callable[[], nn.Module] = lambda: nn.Sequential(*chain(FEATURES, 16, 9, CLASSES)),
        loss_fn: Any = None,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model = fastnn.fuse(make().to(dtype))
        self.loss_fn = loss_fn or fastnn.nn.CrossEntropyLoss()
        options = {"lr": 0.05, "momentum": 0.9} | options
        self.optimizer = fastnn.optim.SGD(self.model.parameters(), **options)
        self.dtype = dtype

    def step(self) -> fastnn.TrainStep:
        return fastnn.train_step(self.model, self.loss_fn, self.optimizer)

    def loop(self, input: Tensor, target: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss_fn(self.model(input), target)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def batch(self, index: int, rows: int = 11) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        input = torch.randn(rows, FEATURES, generator=generator).to(self.dtype)
        return input, torch.randint(CLASSES, (rows,), generator=generator)

    def everything(self) -> dict[str, Any]:
        return everything(self.model, self.optimizer)


def assert_fused(step: fastnn.TrainStep) -> None:
    assert step.report().way == "fused", step.report()


def assert_same_bits(make: Callable[[], Training], batches: list[tuple[Tensor, Tensor]]) -> None:
    """Compares losses, parameters and optimizer state after each step."""
    ours, theirs = make(), make()
    step = ours.step()
    for batch in batches:
        assert same(step(*batch), theirs.loop(*batch))
        assert_fused(step)
        assert same(ours.everything(), theirs.everything())


# ---- the same bits -------------------------------------------------------------------------------

OPTIONS = {
    "plain": {"momentum": 0.0},
    "momentum": {},
    "dampening": {"dampening": 0.3},
    "nesterov, decay": {"nesterov": True, "weight_decay": 0.01},
    "maximize": {"maximize": True, "momentum": 0.5},
    "lr a tensor": {"lr": torch.tensor(0.05)},
    "float32_momentum": {"float32_momentum": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options_of_the_optimizer(dtype, options):
    def make() -> Training:
        return Training(dtype=dtype, **options)

    assert_same_bits(make, [make().batch(i) for i in range(STEPS)])


MODELS: dict[str, Callable[[], nn.Module]] = {
    "one layer": lambda: nn.Sequential(nn.Linear(FEATURES, CLASSES)),
    "no bias": lambda: nn.Sequential(*chain(FEATURES, 5, CLASSES, bias=False)),
    "MLP": lambda: fastnn.nn.MLP(FEATURES, (33, 17), CLASSES),
    "nested": lambda: nn.Sequential(nn.Sequential(*chain(FEATURES, 8), nn.ReLU()), nn.Linear(8, 7)),
    "LinearReLU": lambda: nn.Sequential(fastnn.nn.LinearReLU(FEATURES, 8), fastnn.nn.Linear(8, 7)),
    "ReLU at the end": lambda: nn.Sequential(*chain(FEATURES, 6, CLASSES), nn.ReLU()),
    "no ReLU": lambda: nn.Sequential(nn.Linear(FEATURES, 6), nn.Linear(6, CLASSES)),
    "width 1": lambda: nn.Sequential(*chain(FEATURES, 1, CLASSES)),
    "Identity, Dropout of nothing": lambda: nn.Sequential(
        nn.Identity(), nn.Linear(FEATURES, 6), nn.Dropout(0.0), nn.ReLU(), nn.Linear(6, CLASSES)
    ),
    "wide": lambda: nn.Sequential(*chain(FEATURES, 300, 130, CLASSES)),
}


@pytest.mark.parametrize("make_model", MODELS.values(), ids=MODELS)
def test_models(make_model):
    assert_same_bits(
        lambda: Training(make_model), [Training().batch(i, rows) for i, rows in enumerate((3, 64))]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 63, 208, 209, 700])
def test_batches_of_every_size(dtype, rows):
    """From one row to several blocks of the depth of the weight gradient's product."""

    def make() -> Training:
        return Training(lambda: nn.Sequential(*chain(FEATURES, 50, CLASSES)), dtype=dtype)

    assert_same_bits(make, [make().batch(i, rows) for i in range(2)])


def test_batches_of_changing_size():
    assert_same_bits(
        Training, [Training().batch(i, rows) for i, rows in enumerate((4, 90, 1, 300))]
    )


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads):
    before = torch.get_num_threads()
    batches = [Training().batch(i, 300) for i in range(2)]
    make = lambda: Training(lambda: nn.Sequential(*chain(FEATURES, 400, 300, CLASSES)))  # noqa: E731
    torch.set_num_threads(1)
    expected = make()
    for batch in batches:
        expected.loop(*batch)
    torch.set_num_threads(threads)
    try:
        ours = make()
        step = ours.step()
        for batch in batches:
            step(*batch)
    finally:
        torch.set_num_threads(before)
    assert_fused(step)
    assert same(ours.everything(), expected.everything())


LOSSES = {
    "torch's": nn.CrossEntropyLoss,
    "sum": lambda: nn.CrossEntropyLoss(reduction="sum"),
    "weight": lambda: fastnn.nn.CrossEntropyLoss(weight=torch.linspace(0.5, 2, CLASSES)),
    "ignore_index": lambda: fastnn.nn.CrossEntropyLoss(ignore_index=3),
    "label_smoothing": lambda: fastnn.nn.CrossEntropyLoss(label_smoothing=0.2),
    "F.cross_entropy": lambda: F.cross_entropy,
    "functional.cross_entropy": lambda: fastnn.functional.cross_entropy,
}


@pytest.mark.parametrize("make_loss", LOSSES.values(), ids=LOSSES)
def test_losses(make_loss):
    """The loop uses our losses instead of torch's, whose sums round differently."""
    ours, theirs = Training(loss_fn=make_loss()), Training(loss_fn=make_loss())
    stock = theirs.loss_fn
    if isinstance(stock, nn.Module):
        theirs.loss_fn = fastnn.fuse(stock)
    elif stock is F.cross_entropy:
        theirs.loss_fn = fastnn.functional.cross_entropy
    step = ours.step()
    for i in range(STEPS):
        batch = ours.batch(i)
        assert same(step(*batch), theirs.loop(*batch))
    assert_fused(step)
    assert same(ours.everything(), theirs.everything())


def test_class_probabilities():
    def probabilities(index: int) -> tuple[Tensor, Tensor]:
        input, _ = Training().batch(index)
        return input, torch.rand(len(input), CLASSES)

    assert_same_bits(Training, [probabilities(i) for i in range(3)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("make_loss", [nn.NLLLoss, fastnn.nn.NLLLoss, lambda: F.nll_loss])
def test_a_log_softmax_and_its_loss_are_cross_entropy(dtype, make_loss):
    """The loop rounds log-probabilities, which the step never computes: one epsilon per step."""

    def make() -> Training:
        model = lambda: nn.Sequential(*chain(FEATURES, 9, CLASSES), nn.LogSoftmax(1))  # noqa: E731
        return Training(model, make_loss(), dtype)

    ours, theirs = make(), make()
    step = ours.step()
    for i in range(STEPS):
        batch = ours.batch(i)
        torch.testing.assert_close(step(*batch), theirs.loop(*batch))
    assert_fused(step)
    epsilon = torch.finfo(dtype).eps
    for mine, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=50 * epsilon, atol=50 * epsilon)


def test_images_are_flattened():
    images = torch.randn(6, 1, 4, 5)
    target = torch.arange(6)
    assert_same_bits(
        lambda: Training(lambda: nn.Sequential(nn.Flatten(), *chain(FEATURES, 8, CLASSES))),
        [(images, target), (images.flip(0), target)],
    )


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "sliced": lambda x: torch.cat([x, x], 1)[:, ::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "offset": lambda x: torch.cat([x[:1], x])[1:],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_inputs_of_any_layout(layout):
    batches = [Training().batch(i) for i in range(2)]
    assert_same_bits(Training, [(layout(input), target) for input, target in batches])


FROZEN = {
    "first weight": ["0.weight"],
    "first layer": ["0.weight", "0.bias"],
    "all but the last layer": ["0.weight", "0.bias", "2.weight", "2.bias"],
    "all weights": ["0.weight", "2.weight", "4.weight"],
    "last layer": ["4.weight", "4.bias"],
}


@pytest.mark.parametrize("names", FROZEN.values(), ids=FROZEN)
def test_frozen_parameters(names):
    def make() -> Training:
        training = Training()
        for name in names:
            training.model.get_parameter(name).requires_grad_(False)
        return training

    assert_same_bits(make, [make().batch(i) for i in range(3)])


def test_groups_with_options_of_their_own():
    def make() -> Training:
        training = Training()
        first, *rest = training.model.parameters()
        training.optimizer = fastnn.optim.SGD(
            [
                {"params": [first], "lr": 0.2, "momentum": 0.0},
                {"params": rest[::2], "nesterov": True},
                {"params": [*rest[1::2], nn.Parameter(torch.ones(3))], "weight_decay": 0.1},
            ],
            lr=0.01,
            momentum=0.8,
        )
        return training

    assert_same_bits(make, [make().batch(i) for i in range(STEPS)])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "make_scheduler",
    [
        lambda optimizer: StepLR(optimizer, 2, 0.5),
        lambda optimizer: OneCycleLR(optimizer, 0.3, total_steps=STEPS + 1),
    ],
    ids=["StepLR", "OneCycleLR"],
)
def test_schedulers(make_scheduler):
    ours, theirs = Training(), Training()
    schedulers = [make_scheduler(training.optimizer) for training in (ours, theirs)]
    step = ours.step()
    for i in range(STEPS):
        batch = ours.batch(i)
        assert same(step(*batch), theirs.loop(*batch))
        for scheduler in schedulers:
            scheduler.step()
    assert_fused(step)
    assert same(ours.everything(), theirs.everything())


OPTIONS_OF_THE_STEP = {
    "accumulate": {"accumulate": 3},
    "clip": {"clip_grad_norm": 0.05},
    "both": {"accumulate": 2, "clip_grad_norm": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS_OF_THE_STEP.values(), ids=OPTIONS_OF_THE_STEP)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accumulated_and_clipped(dtype, options, monkeypatch):
    """Compares with the ordinary step, which other tests compare with the loop."""
    ours, theirs = Training(dtype=dtype), Training(dtype=dtype)
    steps = [
        fastnn.train_step(one.model, one.loss_fn, one.optimizer, **options)
        for one in (ours, theirs)
    ]
    for i in range(7):
        batch = ours.batch(i)
        loss = steps[0](*batch)
        with monkeypatch.context() as patch:
            patch.setattr(FusedStep, "why_not", lambda *_: "for the comparison")
            assert same(loss, steps[1](*batch))
        assert_fused(steps[0])
        assert same(ours.everything(), theirs.everything())
    for step in steps:
        step.flush()
    assert same(ours.everything(), theirs.everything())


def test_gradients_of_before_are_no_part_of_a_sum():
    ours, theirs = Training(), Training()
    for param in ours.model.parameters():
        param.grad = torch.ones_like(param)
    steps = [
        fastnn.train_step(t.model, t.loss_fn, t.optimizer, accumulate=2) for t in (ours, theirs)
    ]
    for i in range(2):
        for step in steps:
            step(*ours.batch(i))
    assert_fused(steps[0])
    assert same(ours.everything(), theirs.everything())


# ---- beside the loop -----------------------------------------------------------------------------


def random_training(seed: int) -> Training:
    draw = random.Random(seed)
    sizes = [FEATURES, *(draw.randint(1, 70) for _ in range(draw.randint(0, 3))), CLASSES]
    options = {
        "lr": draw.choice([0.1, 0.01]),
        "momentum": draw.choice([0.0, 0.9]),
        "weight_decay": draw.choice([0.0, 0.01]),
        "maximize": draw.random() < 0.2,
    }
    loss = fastnn.nn.CrossEntropyLoss(
        reduction=draw.choice(["mean", "sum"]), label_smoothing=draw.choice([0.0, 0.1])
    )
    bias = draw.random() < 0.8
    model = lambda: nn.Sequential(*chain(*sizes, bias=bias))  # noqa: E731
    return Training(model, loss, draw.choice(DTYPES), **options)


@pytest.mark.parametrize("seed", range(10))
def test_random_programs_handed_over_both_ways(seed):
    """Loop and step alternate in one training; the other runs the loop only."""
    ours, theirs = random_training(seed), random_training(seed)
    step = ours.step()
    for i in range(24):
        batch = ours.batch(i, rows=1 + i * 7 % 40)
        loss = step(*batch) if i // 3 % 2 else ours.loop(*batch)
        assert same(loss, theirs.loop(*batch))
    assert_fused(step)
    assert same(ours.everything(), theirs.everything())


def test_a_long_run():
    ours, theirs = Training(lr=0.01), Training(lr=0.01)
    step = ours.step()
    for i in range(500):
        batch = ours.batch(i % 20, rows=32)
        assert same(step(*batch), theirs.loop(*batch))
    assert same(ours.everything(), theirs.everything())


def test_the_model_is_changed_between_steps():
    """Each call checks the program anew: a layer, a parameter or an option may have changed."""
    ours, theirs = Training(), Training()
    step = ours.step()

    def both(change: Callable[[Training], None]) -> None:
        for training in (ours, theirs):
            torch.manual_seed(1)
            change(training)
        batch = ours.batch(0)
        assert same(step(*batch), theirs.loop(*batch))
        assert_fused(step)
        assert same(ours.everything(), theirs.everything())

    def exchange(training: Training) -> None:
        training.model[2] = nn.Linear(16, 9)
        training.optimizer.add_param_group({"params": list(training.model[2].parameters())})

    def write(training: Training) -> None:
        training.model[0].weight.data = torch.randn(16, FEATURES)

    both(lambda training: None)
    both(exchange)
    both(write)
    both(lambda training: training.optimizer.state.clear())
    both(lambda training: training.optimizer.param_groups[0].update(momentum=0.0))
    both(lambda training: training.model.eval())


def test_gradients_are_none_and_versions_count():
    training = Training()
    for param in training.model.parameters():
        param.grad = torch.ones_like(param)
    versions = [param._version for param in training.model.parameters()]
    before = training.model(training.batch(0)[0]).sum()
    training.step()(*training.batch(0))
    assert all(param.grad is None for param in training.model.parameters())
    after = [param._version for param in training.model.parameters()]
    assert all(new > old for new, old in zip(after, versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        before.backward()


# ---- bad input -----------------------------------------------------------------------------------

BAD_BATCHES: dict[str, tuple[Callable[[Tensor, Tensor], tuple[Any, Any]], type[Exception], str]] = {
    "target out of range": (lambda x, t: (x, t + 1), IndexError, "Target 7 is out of bounds"),
    "target of other rows": (lambda x, t: (x, t[1:]), ValueError, "batch_size"),
    "other features": (lambda x, t: (x[:, 1:], t), RuntimeError, "expected input's last dimension"),
    "target of int32": (lambda x, t: (x, t.int()), RuntimeError, "target"),
    "input of another dtype": (lambda x, t: (x.double(), t), RuntimeError, "dtype"),
    "no tensor": (lambda x, t: (x.numpy(), t), TypeError, "Tensor"),
}


@pytest.mark.parametrize("wrong", BAD_BATCHES)
@pytest.mark.parametrize("after", [0, 2])
def test_a_bad_batch_changes_nothing(wrong, after):
    make, error, says = BAD_BATCHES[wrong]
    training = Training()
    step = training.step()
    for i in range(after):
        step(*training.batch(i))
    for param in training.model.parameters():
        param.grad = torch.ones_like(param)
    before = training.everything()
    input, target = training.batch(9)
    target[0] = CLASSES - 1
    with pytest.raises(error, match=says):
        step(*make(input, target))
    assert same(training.everything(), before)
    step(*training.batch(5))
    assert_fused(step)


# ---- when it steps aside -------------------------------------------------------------------------


def hooked(training: Training) -> None:
    training.model[2].register_forward_hook(lambda *_: None)


def exchanged(index: int, make: Callable[[], nn.Module]) -> Callable[[Training], None]:
    def change(training: Training) -> None:
        training.model[index] = make()

    return change


def tied(training: Training) -> None:
    training.model[2] = nn.Linear(16, 16)
    training.model[4] = nn.Linear(16, 16)
    training.model[4].weight = training.model[2].weight
    training.optimizer = fastnn.optim.SGD(training.model.parameters(), lr=0.1)


def sharing_memory(training: Training) -> None:
    training.model[2] = nn.Linear(16, 16)
    training.model[4] = nn.Linear(16, 16)
    training.model[4].weight.data = training.model[2].weight.data
    training.optimizer = fastnn.optim.SGD(training.model.parameters(), lr=0.1)


def not_contiguous(training: Training) -> None:
    weight = training.model[0].weight
    weight.data = weight.data.t().contiguous().t()


ASIDE: dict[str, tuple[Callable[[Training], Any], str]] = {
    "hook": (hooked, "hooks"),
    "hook on the model": (
        lambda t: t.model.register_forward_pre_hook(lambda *_: None),
        "hooks",
    ),
    "hook on the loss": (lambda t: t.loss_fn.register_forward_hook(lambda *_: None), "loss"),
    "hook on a parameter": (
        lambda t: t.model[0].weight.register_hook(lambda grad: grad * 2),
        "hooks on a parameter",
    ),
    "hook after accumulation": (
        lambda t: t.model[0].bias.register_post_accumulate_grad_hook(lambda param: None),
        "hooks on a parameter",
    ),
    "hook on the optimizer": (
        lambda t: t.optimizer.register_step_post_hook(lambda *_: None),
        "optimizer",
    ),
    "Tanh": (exchanged(1, nn.Tanh), "Tanh"),
    "Dropout": (exchanged(1, nn.Dropout), "Dropout"),
    "parametrized": (
        lambda t: nn.utils.parametrizations.weight_norm(t.model[0]),
        "ParametrizedLinear",
    ),
    "tied": (tied, "share memory"),
    "sharing memory": (sharing_memory, "share memory"),
    "not contiguous": (not_contiguous, "contiguous"),
    "another dtype": (lambda t: t.model[4].double(), "dtypes"),
    "another loss": (
        lambda t: setattr(t, "loss_fn", nn.MultiMarginLoss()),
        "the loss is neither",
    ),
    "a loss per row": (
        lambda t: setattr(t, "loss_fn", nn.CrossEntropyLoss(reduction="none")),
        "reduced",
    ),
    "torch's SGD": (
        lambda t: setattr(t, "optimizer", torch.optim.SGD(t.model.parameters(), lr=0.1)),
        "not fastnn.optim.SGD",
    ),
    "all frozen": (lambda t: t.model.requires_grad_(False), "no parameter wants a gradient"),
    "a ReLU first": (exchanged(0, nn.ReLU), "before the first Linear"),
    "not the optimizer's": (
        lambda t: setattr(t, "optimizer", fastnn.optim.SGD(t.model[0].parameters(), lr=0.1)),
        "doesn't belong to the optimizer",
    ),
}


@pytest.mark.parametrize("name", ASIDE)
def test_it_steps_aside(name):
    """It does so in the middle of a training, too, and says why."""
    change, reason = ASIDE[name]
    ours = Training()
    step = ours.step()
    step(*ours.batch(0))
    assert_fused(step)
    change(ours)
    report = ours.step().report()
    assert report.way == "ordinary", report
    assert reason in report.reasons["fused"], report


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_settings_that_it_steps_aside_for():
    training = Training()
    step = training.step()
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in step.report().reasons["fused"]
    with torch.autograd.detect_anomaly(check_nan=False):
        assert "anomalies" in step.report().reasons["fused"]
    with BaseTorchFunctionMode():
        assert "mode" in step.report().reasons["fused"]
    assert_fused(step)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x, t: (x.requires_grad_(), t), "input requires a gradient"),
        (lambda x, t: (x[:0], t[:0]), "is not a batch"),
        (lambda x, t: (x[0], t[0]), "no matrix"),
        (lambda x, t: ([x], t), "no plain tensor"),
        (lambda x, t: (x, nn.functional.one_hot(t, CLASSES).double()), "another dtype"),
        (lambda x, t: (nn.Parameter(x, requires_grad=False), t), ""),
    ],
)
def test_batches_that_it_steps_aside_for(change, reason):
    ours, theirs = Training(), Training()
    step = ours.step()
    input, target = change(*ours.batch(0))
    loss = step(input, target)
    assert reason in step.report().reasons.get("fused", "")
    assert (step.report().way == "fused") == (reason == "")
    plain = input[0] if isinstance(input, list) else input.detach()
    assert same(loss, theirs.loop(plain, target))


def test_a_hook_on_a_gradients_accumulator():
    """Data parallelism registers such a hook."""
    training = Training()
    weight = training.model[0].weight
    accumulator = weight.view_as(weight).grad_fn.next_functions[0][0]
    accumulator.register_hook(lambda *_: None)
    assert "hooks" in training.step().report().reasons["fused"]

"""When a step is captured into a CUDA graph, and what a capture fixes. The captures themselves need
a GPU: tests/cuda/test_cuda.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastnn
from fastnn import _graphed_step
from fastnn._graphed_step import (
    MOST_CAPTURES,
    WARM_UP_CALLS,
    GraphedStep,
    capture_key,
    why_not_captured,
)
from fastnn._step import OrdinaryStep, Program, note_update
from support.training_programs import CLASSES, FEATURES, batch, everything, same

pytestmark = pytest.mark.cpu_only("decisions in Python, whatever the kernels")


def program(kind: type = fastnn.optim.SGD, **options: Any) -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, CLASSES)
    )
    kwargs = {"lr": 0.05} | ({"momentum": 0.9} if issubclass(kind, torch.optim.SGD) else {})
    optimizer = kind(model.parameters(), **(kwargs | options))
    return Program(model, nn.CrossEntropyLoss(), optimizer)


# ---- what a capture fixes ------------------------------------------------------------------------


def test_steps_leave_the_key_as_it_is():
    """Otherwise nothing would ever be replayed. The first step creates state."""
    one = program()
    sample = batch(0)
    OrdinaryStep().run(one, sample)
    key = capture_key(one, sample)
    for _ in range(3):
        OrdinaryStep().run(one, sample)
        assert capture_key(one, sample) == key
    assert hash(key) == hash(capture_key(one, (sample[0].clone(), sample[1].clone())))


def change_lr(one: Program) -> None:
    one.optimizer.param_groups[0]["lr"] = 0.01


def load_state(one: Program) -> None:
    one.optimizer.load_state_dict(one.optimizer.state_dict())


def exchange_data(one: Program) -> None:
    one.model[0].weight.data = one.model[0].weight.data.clone()


def exchange_layer(one: Program) -> None:
    one.model[2] = nn.ReLU()


def add_group(one: Program) -> None:
    one.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def set_attribute(place: int, name: str, value: object) -> Any:
    return lambda one: setattr(one.model[place], name, value)


CHANGES = {
    "the lr": change_lr,
    "the momentum": lambda one: one.optimizer.param_groups[0].update(momentum=0.5),
    "the state's tensors": load_state,
    "a parameter": lambda one: setattr(one.model[0], "weight", nn.Parameter(torch.ones(8, 12))),
    "a parameter's memory": exchange_data,
    "a frozen parameter": lambda one: one.model[0].weight.requires_grad_(False),
    "a buffer": lambda one: setattr(one.model[1], "running_mean", torch.zeros(8)),
    "a layer": exchange_layer,
    "a group": add_group,
    "training": lambda one: one.model.eval(),
    "a layer's training": set_attribute(3, "training", False),
    "a Dropout's p": set_attribute(3, "p", 0.5),
    "a BatchNorm's momentum": set_attribute(1, "momentum", 0.5),
    "the loss": lambda one: setattr(one, "loss_fn", nn.CrossEntropyLoss()),
    "an option of the loss": lambda one: setattr(one.loss_fn, "label_smoothing", 0.5),
    "clipping": lambda one: setattr(one, "clip_grad_norm", 1.0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_changes_the_key(name):
    one = program()
    OrdinaryStep().run(one, batch(0))
    key = capture_key(one, batch(0))
    CHANGES[name](one)
    assert capture_key(one, batch(0)) != key


def test_other_batches_have_other_keys():
    one = program()
    input, target = torch.ones(4, FEATURES), torch.zeros(4, dtype=torch.int64)
    batches = [
        (input, target),
        (torch.ones(5, FEATURES), torch.zeros(5, dtype=torch.int64)),
        (input.double(), target),
        (input, target.int()),
        (torch.ones(FEATURES, 4).t(), target),
    ]
    assert len({capture_key(one, one_batch) for one_batch in batches}) == len(batches)


@contextmanager
def precision() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@contextmanager
def determinism() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def cudnn_benchmark() -> AbstractContextManager[None]:
    return torch.backends.cudnn.flags(enabled=True, benchmark=True)


@pytest.mark.parametrize("setting", [precision, determinism, cudnn_benchmark])
def test_a_setting_changes_the_key(setting):
    one = program()
    key = capture_key(one, batch(0))
    with setting():
        changed = capture_key(one, batch(0))
    assert changed != key
    assert capture_key(one, batch(0)) == key


def test_a_tensor_lr_is_read_on_the_device_and_fixed_elsewhere():
    one = program(lr=torch.tensor(0.05))
    key = capture_key(one, batch(0))
    one.optimizer.param_groups[0]["lr"].fill_(0.1)
    assert capture_key(one, batch(0)) == key  # where the parameters are
    with torch.device("meta"):
        model = nn.Linear(FEATURES, CLASSES)
    lr = torch.tensor(0.05)
    other = Program(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=lr))
    key = capture_key(other, batch(0))
    lr.fill_(0.1)
    assert capture_key(other, batch(0)) != key


# ---- what is captured ----------------------------------------------------------------------------


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Runs the checks after the first one, which is whether the parameters are on a GPU."""
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


class Own(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class OwnSGD(torch.optim.SGD):
    pass


def own_loss(output: Tensor, target: Tensor) -> Tensor:
    return output.sum()


def insert(module: nn.Module) -> Any:
    return lambda one: one.model.append(module)


LEFT = {
    "parameters are not on a GPU": lambda one: None,
    "gradients are accumulated": lambda one: setattr(one, "accumulate", 2),
    "the loss own_loss is not PyTorch's": lambda one: setattr(one, "loss_fn", own_loss),
    "Own is no module of torch.nn": insert(Own()),
    "DataParallel is no module of torch.nn": insert(nn.DataParallel(nn.ReLU())),
    "OptimizedModule is no module of torch.nn": insert(torch.compile(nn.ReLU())),
    "ParametrizedLinear is no module of torch.nn": lambda one: (
        nn.utils.parametrizations.weight_norm(one.model[0])
    ),
    "hooks or a forward of its own on Linear": lambda one: one.model[0].register_forward_hook(
        print
    ),
    "hooks on a parameter": lambda one: one.model[0].weight.register_hook(print),
    "hooks on SGD or a step": lambda one: one.optimizer.register_step_post_hook(print),
    "Adam is not capturable": lambda one: setattr(
        one, "optimizer", torch.optim.Adam(one.model.parameters())
    ),
    "OwnSGD is not PyTorch's or fastnn's": lambda one: setattr(
        one, "optimizer", OwnSGD(one.model.parameters(), lr=0.1)
    ),
    "a parameter has no values yet": lambda one: one.optimizer.add_param_group(
        {"params": nn.LazyLinear(3).parameters()}
    ),
}


@pytest.mark.parametrize("reason", LEFT)
def test_what_is_left_says_why(reason, request):
    one = program()
    LEFT[reason](one)
    if "not on a GPU" not in reason:
        request.getfixturevalue("as_on_a_gpu")
    assert why_not_captured(one).startswith(reason)


@pytest.mark.parametrize("kind", [fastnn.optim.SGD, torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.CrossEntropyLoss(),
        fastnn.nn.CrossEntropyLoss(),
        F.cross_entropy,
        fastnn.functional.cross_entropy,
    ],
    ids=["module", "our module", "function", "our function"],
)
@pytest.mark.parametrize("fused", [False, True])
def test_what_is_captured(as_on_a_gpu, kind, loss_fn, fused):
    one = program(kind, **({"capturable": True} if kind is torch.optim.Adam else {}))
    one.loss_fn = loss_fn
    if fused:
        one.model = fastnn.fuse(one.model)
    torch.optim.lr_scheduler.StepLR(one.optimizer, 2)
    assert why_not_captured(one) == ""


BATCHES = {
    "the input is no plain tensor but tuple": lambda x, y: ((x, x), y),
    "the target is no plain tensor but int": lambda x, y: (x, 1),
    "the input is on meta, the parameters on cpu": lambda x, y: (x.to("meta"), y),
    "the input requires a gradient": lambda x, y: (x.requires_grad_(), y),
}


@pytest.mark.parametrize("reason", BATCHES)
def test_batches_that_are_left_say_why(reason):
    assert GraphedStep().why_not_batch(program(), BATCHES[reason](*batch(0))) == reason
    assert GraphedStep().why_not_batch(program(), batch(0)) == ""


# ---- warm-up, capture, replay --------------------------------------------------------------------


class FakeCapture:
    """Runs the ordinary step instead of a replay on a GPU."""

    made: list[tuple[int, ...]]
    error: str = ""

    def __init__(self, program: Program, batch: Any, stream: object) -> None:
        if self.error:
            raise RuntimeError(self.error)
        self.shape = tuple(batch[0].shape)
        self.made.append(self.shape)

    def replay(self, program: Program, batch: Any) -> Tensor:
        assert tuple(batch[0].shape) == self.shape
        loss = OrdinaryStep().run(program, batch)
        note_update(program)
        return loss


@pytest.fixture
def fake(monkeypatch) -> type[FakeCapture]:
    monkeypatch.setattr(FakeCapture, "made", [], raising=False)
    monkeypatch.setattr(_graphed_step, "Capture", FakeCapture)
    monkeypatch.setattr(GraphedStep, "_own_stream", lambda self: None)
    monkeypatch.setattr(GraphedStep, "_warm_up", lambda self, *args: OrdinaryStep().run(*args))
    return FakeCapture


def run(way: GraphedStep, one: Program, rows: int) -> None:
    way.run(one, (torch.ones(rows, FEATURES), torch.zeros(rows, dtype=torch.int64)))


def test_a_capture_comes_after_the_warm_up_and_is_used_again(fake):
    way, one = GraphedStep(), program()
    for _ in range(WARM_UP_CALLS):
        run(way, one, 4)
        assert fake.made == []
    for _ in range(4):
        run(way, one, 4)
    assert fake.made == [(4, FEATURES)]


def test_each_size_has_its_capture(fake):
    way, one = GraphedStep(), program()
    for _ in range(3 * WARM_UP_CALLS):
        run(way, one, 4), run(way, one, 2)
    assert sorted(fake.made) == [(2, FEATURES), (4, FEATURES)]


def test_another_lr_is_captured_anew_and_one_that_always_changes_never(fake):
    way, one = GraphedStep(), program()
    for _ in range(2 * WARM_UP_CALLS):
        run(way, one, 4)
    change_lr(one)
    for _ in range(2 * WARM_UP_CALLS):
        run(way, one, 4)
    assert len(fake.made) == 2
    for step in range(20):
        one.optimizer.param_groups[0]["lr"] = 0.01 / (step + 2)
        run(way, one, 4)
    assert len(fake.made) == 2
    assert len(way._known) <= MOST_CAPTURES


def test_the_capture_that_is_used_stays(fake):
    way, one = GraphedStep(), program()
    for _ in range(WARM_UP_CALLS):
        run(way, one, 4)
    for rows in range(5, 5 + 3 * MOST_CAPTURES):
        run(way, one, 4), run(way, one, rows)
    assert fake.made == [(4, FEATURES)]


def test_what_can_t_be_captured_runs_as_it_is_and_says_why(fake, monkeypatch, as_on_a_gpu):
    way, one = GraphedStep(), program()
    monkeypatch.setattr(fake, "error", "operation not permitted\nand more")
    assert way.why_not(one) == ""
    for _ in range(WARM_UP_CALLS + 1):
        before = everything(one.model, one.optimizer)
        run(way, one, 4)
        assert not same(everything(one.model, one.optimizer), before)
    assert way.why_not(one) == "its capture failed: operation not permitted"

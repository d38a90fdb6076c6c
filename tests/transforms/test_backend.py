"""torch.compile(model, backend="fastnn"): what it finds in a graph, with unchanged numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastnn
from fastnn import _backend
from fastnn._operators import OPERATORS
from support.sample_inputs import SEED, Draws

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

OURS = {getattr(fastnn.functional, operator.name): operator.name for operator in OPERATORS}
OURS[_backend._log_softmax] = "log_softmax"


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Recorder:
    """The backend, recording the names of the operators that it puts into graphs."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, graph_module, inputs):
        function = _backend.fastnn(graph_module, inputs)
        for module in graph_module.modules():
            if isinstance(module, torch.fx.GraphModule):
                targets = [node.target for node in module.graph.nodes]
                self.names += [OURS[target] for target in targets if target in OURS]
        return function


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6)
        self.two = nn.Linear(6, 6)
        self.act = nn.ReLU(inplace=True)
        self.log_softmax = nn.LogSoftmax(1)
        self.cross_entropy = nn.CrossEntropyLoss(label_smoothing=0.1)
        self.register_buffer("seen", torch.zeros(()))
        self.calls = torch.zeros(())  # not a buffer
        self.task = "one"

    @property
    def head(self) -> nn.Linear:
        return getattr(self, self.task)


def in_place_relu_of_a_shared_input(net: Net, x: Tensor) -> Tensor:
    keep = x.clone()
    other = keep
    keep += F.relu(net.one(x))
    return keep * other


def counts(net: Net, x: Tensor) -> Tensor:
    net.calls.add_(1)
    net.seen.mul_(2).add_(1)
    return F.relu(net.one(x)) * net.calls * net.seen


def change_between(net: Net, x: Tensor) -> Tensor:
    x = x.detach().clone()
    y = F.linear(x, net.one.weight.detach())
    x.mul_(2)
    return F.relu(y) + net.two(x)


# A linear that is found outside of a pair stays a linear.
PAIRS = {
    "F.relu": lambda net, x: F.relu(net.one(x)),
    "F.relu, in place": lambda net, x: F.relu(net.one(x), inplace=True),
    "F.relu_": lambda net, x: F.relu_(net.one(x)),
    "torch.relu": lambda net, x: torch.relu(net.one(x)),
    "torch.relu_": lambda net, x: torch.relu_(net.one(x)),
    "relu()": lambda net, x: net.one(x).relu(),
    "relu_()": lambda net, x: net.one(x).relu_(),
    "modules": lambda net, x: net.act(net.one(x)),
    "F.linear": lambda net, x: F.relu(F.linear(x, net.one.weight)),
    "keywords": lambda net, x: F.relu(input=F.linear(input=x, weight=net.one.weight, bias=None)),
    "property": lambda net, x: F.relu(net.head(x)),
    "no input gradient": lambda net, x: F.relu(net.one(x.detach())),
    "plain tensors": lambda net, x: F.relu(F.linear(x, net.one.weight.detach())) * net.two(x),
    "checkpoint": lambda net, x: checkpoint(lambda y: net.one(y).relu(), x, use_reentrant=False),
    "the input changes in between": change_between,
    "in-place sums": in_place_relu_of_a_shared_input,
    "counts": counts,
}


APART = {
    "used twice": lambda net, x: F.relu(y := net.one(x)) + y,
    "another activation": lambda net, x: F.relu6(net.one(x)),
    "something between": lambda net, x: F.relu(2 * net.one(x)),
    "no_grad between": lambda net, x: without_grad(net.one(x)) + net.two(x),
    "autocast between": lambda net, x: in_bfloat16(net.one(x)) + net.two(x),
    "relu of a product": lambda net, x: F.relu(x @ net.one.weight.t()),
}


def without_grad(y: Tensor) -> Tensor:
    with torch.no_grad():
        return F.relu(y)


def in_bfloat16(y: Tensor) -> Tensor:
    with torch.autocast("cpu"):
        return F.relu(y)


def assert_same(function, net: Net, x: Tensor, backend: object) -> None:
    results = []
    # Two calls: the second one sees what the first left behind.
    for compiled in (lambda f: f, lambda f: torch.compile(f, backend=backend)):
        model, run = copy.deepcopy(net), compiled(function)
        for _ in range(2):
            inputs = x.clone().requires_grad_()
            output = run(model, inputs)
        grads = torch.autograd.grad(
            output.float().sum(), [inputs, *model.parameters()], allow_unused=True
        )
        results.append([output, *grads, model.seen, model.calls])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name):
    recorder = Recorder()
    assert_same(PAIRS[name], Net(), Draws(SEED).normal(5, 6), recorder)
    assert recorder.names.count("linear_relu") == 1


@pytest.mark.parametrize("name", APART)
def test_what_stays_apart(name):
    recorder = Recorder()
    assert_same(APART[name], Net(), Draws(SEED).normal(5, 6), recorder)
    assert "linear_relu" not in recorder.names


LOSSES = {
    "F.cross_entropy": (
        lambda net, x, t: F.cross_entropy(x, t, reduction="sum"),
        ["cross_entropy"],
    ),
    "weighted": (
        lambda net, x, t: F.cross_entropy(x, t, net.one.bias.detach().exp(), ignore_index=1),
        ["cross_entropy"],
    ),
    "CrossEntropyLoss": (lambda net, x, t: net.cross_entropy(x, t), ["cross_entropy"]),
    "F.nll_loss": (
        lambda net, x, t: F.nll_loss(F.log_softmax(x, dim=-1), t),
        ["log_softmax", "nll_loss"],
    ),
    "LogSoftmax": (
        lambda net, x, t: F.nll_loss(net.log_softmax(x), t),
        ["log_softmax", "nll_loss"],
    ),
    "log_softmax()": (
        lambda net, x, t: F.nll_loss(x.log_softmax(1), t),
        ["log_softmax", "nll_loss"],
    ),
    "torch.log_softmax": (
        lambda net, x, t: torch.log_softmax(x, 1, torch.float64)[:, 1].sum(),
        ["log_softmax"],
    ),
    "out": (
        lambda net, x, t: torch.log_softmax(x.detach(), 1, out=torch.empty(5, 6)) * x,
        [],
    ),
    "torch.special": (
        lambda net, x, t: torch.special.log_softmax(x, 1, dtype=torch.float64)[:, 1].sum(),
        ["log_softmax"],
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    function, expected = LOSSES[name]
    recorder, target = Recorder(), torch.tensor([0, 5, 2, 1, 3])
    with_target = lambda net, x: function(net, net.one(x), target)  # noqa: E731
    assert_same(with_target, Net(), Draws(SEED).normal(5, 6), recorder)
    assert recorder.names == ["linear", *expected]


def test_the_name_is_known():
    """Found through the package's entry point: fastnn itself need not have been imported."""
    net, x = Net(), Draws(SEED).normal(5, 6)
    compiled = torch.compile(lambda x: F.relu(net.one(x)), backend="fastnn", fullgraph=True)
    torch.testing.assert_close(compiled(x), F.relu(net.one(x)), rtol=1e-5, atol=1e-6)
    assert "fastnn" in torch._dynamo.list_backends()


def test_a_model_that_trains():
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.0), nn.Linear(8, 3))
    model = copy.deepcopy(stock)
    recorder = Recorder()

    @torch.compile(backend=recorder)
    def loss_of(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(model(x), target)

    for _ in range(5):
        x, target = torch.randn(7, 6), torch.randint(3, (7,))
        for network, loss in ((model, loss_of), (stock, loss_of.__wrapped__)):
            optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
            optimizer.zero_grad()
            loss(network, x, target).backward()
            optimizer.step()
    assert set(recorder.names) == {"linear_relu", "linear", "cross_entropy"}
    for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_dynamic_shapes_and_graph_breaks():
    net, recorder = Net(), Recorder()

    def run(x: Tensor) -> Tensor:
        x = F.relu(net.one(x))
        torch._dynamo.graph_break()
        return F.relu(net.two(x))

    compiled = torch.compile(run, backend=recorder, dynamic=True)
    for rows in (3, 4, 9):
        x = Draws(SEED).normal(rows, 6)
        torch.testing.assert_close(compiled(x), run(x), rtol=1e-5, atol=1e-6)
    assert recorder.names == ["linear_relu", "linear_relu"]


def test_hooks_stay():
    """A hook on the Linear's output is in the graph, so the ReLU stays a ReLU."""
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU())
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    recorder, x = Recorder(), Draws(SEED).normal(5, 6)
    torch.compile(model, backend=recorder)(x)
    torch.testing.assert_close(
        seen[0], F.linear(x, model[0].weight, model[0].bias), rtol=1e-5, atol=1e-6
    )
    assert recorder.names == ["linear"]


def test_a_fused_model():
    model = fastnn.fuse(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)))
    x = Draws(SEED).normal(5, 6)
    compiled = torch.compile(model, backend="fastnn", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_transforms(transform):
    net, recorder, x = Net(), Recorder(), Draws(SEED).normal(5, 6)

    def run(x: Tensor) -> Tensor:
        return getattr(torch.func, transform)(lambda y: F.relu(net.one(y)).sum())(x)

    torch.testing.assert_close(
        torch.compile(run, backend=recorder)(x), run(x), rtol=1e-5, atol=1e-6
    )
    assert recorder.names == ["linear_relu"]

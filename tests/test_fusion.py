"""fastnn.fuse and unfuse: what they change, what they leave for which reason, and the results."""

from __future__ import annotations

import copy
import importlib
import io
import linecache
import pickle
import sys
import types
import typing

import pytest
import torch
from conftest import needs_extension
from sample_inputs import SEED, Draws
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import fastnn


def pair(*, bias: bool = True, inplace: bool = False) -> list[nn.Module]:
    return [nn.Linear(6, 5, bias=bias), nn.ReLU(inplace=inplace)]


class Functional(nn.Module):
    """Pairs of every spelling that only a trace can see, and a layer without a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 5)
        self.two = nn.Linear(5, 5)
        self.three = nn.Linear(5, 5)
        self.four = nn.Linear(5, 5)
        self.act = nn.ReLU()
        self.many = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        x = torch.relu(self.two(x))
        x = self.three(x).relu()
        x = self.act(self.four(x))
        for layer in self.many:
            x = F.relu(layer(x), inplace=True)
        return self.last(x)


TRACED = {"one", "two", "three", "four", "many.0", "many.1"}


class Mlp(nn.Module):
    """As timm's: the same attributes, in the same order."""

    def __init__(self, act_layer: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 12)
        self.act = act_layer()
        self.drop1 = nn.Dropout(0.0)
        self.fc2 = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop1(self.act(self.fc1(x))))


@pytest.fixture
def timm(monkeypatch):
    layers = types.ModuleType("timm.layers")
    layers.Mlp = Mlp
    monkeypatch.setitem(sys.modules, "timm.layers", layers)


def fused_paths(model: nn.Module, **options) -> set[str]:
    return {entry.path for entry in fastnn.fusion_report(model, **options).fused}


def reason(model: nn.Module, path: str, **options) -> str:
    fused = fastnn.fuse(model, inplace=True, **options)
    return next(e.reason for e in fastnn.fusion_report(fused, **options).left if e.path == path)


def input_of(model: nn.Module) -> Tensor:
    features = next(m.in_features for m in model.modules() if isinstance(m, nn.Linear))
    return Draws(SEED).normal(7, features)


def assert_same_results(fused: nn.Module, stock: nn.Module, x: Tensor) -> None:
    """Outputs and gradients, of float32: to the few roundings that another order of sums makes."""
    results = []
    for model in (fused, stock):
        inputs = x.clone().requires_grad_()
        output = model(inputs)
        weights = torch.linspace(-1, 1, output.numel()).view_as(output)
        gradients = torch.autograd.grad((output * weights).sum(), [inputs, *model.parameters()])
        results.append([output, *gradients])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# --- what is fused --------------------------------------------------------------------------------

MODELS = {
    "mlp": (lambda: nn.Sequential(*pair(), nn.Linear(5, 3), nn.LogSoftmax(1)), {"0", "3"}),
    "no bias": (lambda: nn.Sequential(*pair(bias=False)), {"0"}),
    "inplace": (lambda: nn.Sequential(*pair(inplace=True)), {"0"}),
    "nested": (
        lambda: nn.Sequential(nn.Sequential(*pair()), nn.Linear(5, 2), nn.ReLU()),
        {"0.0", "1"},
    ),
    "across the end of a Sequential": (
        lambda: nn.Sequential(nn.Sequential(nn.Identity(), nn.Linear(6, 5)), nn.ReLU()),
        {"0.1"},
    ),
    "across its beginning": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.Sequential(nn.ReLU()))),
        {"0"},
    ),
    "across an empty one": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Sequential(), nn.ReLU()),
        {"0"},
    ),
    "held by other modules": (
        lambda: nn.Sequential(nn.ModuleDict({"head": nn.Sequential(*pair())})["head"]),
        {"0.0"},
    ),
    "dropout between": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Dropout(0), nn.ReLU()), set()),
    "identity between": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Identity(), nn.ReLU()), set()),
    "flatten between": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Flatten(), nn.ReLU()), set()),
    "another activation": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU6()), set()),
    "no linear": (lambda: nn.Sequential(nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)), set()),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_neighbours(name):
    build, expected = MODELS[name]
    stock = build()
    x = input_of(stock)
    fused = fastnn.fuse(stock)
    assert fused_paths(fused) == expected
    assert fused_paths(stock) == set()
    assert_same_results(fused, stock, x)


def test_functional_pairs_are_left_without_trace():
    assert fused_paths(fastnn.fuse(Functional())) == set()
    assert reason(Functional(), "one") == "run by Functional.forward, into which trace=True looks"


def test_trace():
    stock = Functional()
    fused = fastnn.fuse(stock, trace=True)
    assert fused_paths(fused, trace=True) == TRACED
    assert isinstance(fused, Functional)
    assert_same_results(fused, stock, input_of(stock))


def test_no_relu_is_left_in_a_traced_forward():
    fused = fastnn.fuse(Functional(), trace=True)
    with torch.profiler.profile() as profile:
        fused(input_of(fused))
    names = {event.name for event in profile.events()}
    assert "fastnn::linear_relu" in names or not fastnn.is_available()
    assert not names & {"aten::relu", "aten::relu_", "aten::clamp_min"}


@pytest.mark.parametrize("activation", ["relu", F.relu, nn.ReLU()], ids=["relu", "F.relu", "ReLU"])
@pytest.mark.parametrize("training", [True, False])
def test_transformer(activation, training):
    layer = nn.TransformerEncoderLayer(6, 2, 8, 0.0, activation, batch_first=True)
    stock = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    decoder = nn.TransformerDecoderLayer(6, 2, 8, 0.0, activation, batch_first=True)
    fused = fastnn.fuse(stock)
    assert fused_paths(fused) == {"layers.0.linear1", "layers.1.linear1"}
    assert fused_paths(fastnn.fuse(decoder)) == {"linear1"}
    x = Draws(SEED).normal(2, 3, 6)
    assert_same_results(fused, stock, x)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), stock(x), rtol=1e-5, atol=1e-6)
    assert type(fastnn.unfuse(fused).layers[0].activation) is type(layer.activation)


def test_transformer_with_gelu_is_left():
    layer = nn.TransformerEncoderLayer(6, 2, 8, activation="gelu")
    assert reason(layer, "linear1") == "followed by gelu, not by ReLU"


def test_an_overridden_method_of_a_transformer_is_left():
    class Overridden(nn.TransformerEncoderLayer):
        def _ff_block(self, x: Tensor) -> Tensor:
            return self.linear2(self.linear1(x))

    assert fused_paths(fastnn.fuse(Overridden(6, 2, 8))) == set()


@pytest.mark.usefixtures("timm")
def test_timm_mlp():
    stock = nn.Sequential(Mlp(), Mlp(nn.GELU))
    fused = fastnn.fuse(stock)
    assert fused_paths(fused) == {"0.fc1"}
    assert_same_results(fused, stock, input_of(stock))


@pytest.mark.parametrize("stock", [nn.LogSoftmax(1), nn.NLLLoss(), nn.CrossEntropyLoss()])
def test_losses(stock):
    for model in (stock, nn.ModuleDict({"loss": stock})):
        fused = fastnn.fuse(model)
        fused = fused["loss"] if isinstance(fused, nn.ModuleDict) else fused
        assert type(fused) is getattr(fastnn.nn, type(stock).__name__)
        assert type(fastnn.unfuse(fused)) is type(stock)


def test_a_loss_keeps_its_options():
    weight = torch.tensor([0.5, 2.0, 1.0])
    stock = nn.CrossEntropyLoss(weight, ignore_index=1, reduction="sum", label_smoothing=0.1)
    logits, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 2, 1])
    torch.testing.assert_close(fastnn.fuse(stock)(logits, target), stock(logits, target))


# --- what stays the same --------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("undo", [False, True])
def test_parameters_are_the_same_objects(inplace, undo):
    model = nn.Sequential(*pair(), nn.BatchNorm1d(5), nn.Linear(5, 3))
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    fused = fastnn.fuse(model, inplace=inplace)
    fused = fastnn.unfuse(fused, inplace=inplace) if undo else fused
    after = dict(fused.named_parameters()) | dict(fused.named_buffers())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert (fused is model) == inplace
    assert list(fused.state_dict()) == list(model.state_dict())


def test_an_optimizer_built_before_goes_on_working():
    torch.manual_seed(0)
    stock = nn.Sequential(*pair(), nn.Linear(5, 3))
    model = copy.deepcopy(stock)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (stock, model)]
    model = fastnn.fuse(model)
    x, target = input_of(stock), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    for _ in range(5):
        for network, optimizer in zip((stock, model), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(network(x), target).backward()
            optimizer.step()
    for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_frozen_weights_and_mode_are_kept():
    model = nn.Sequential(*pair(), nn.Dropout(0.5)).eval()
    model[0].weight.requires_grad_(False)
    fused = fastnn.fuse(model)
    assert not fused[0].weight.requires_grad
    assert fused[0].bias.requires_grad
    assert not any(module.training for module in fused.modules())
    assert fused.train()[1].training
    assert fastnn.unfuse(fused)[1].training


@pytest.mark.parametrize("trace", [False, True])
def test_twice_changes_nothing(trace):
    fused = fastnn.fuse(nn.Sequential(Functional(), nn.Sequential(*pair())), trace=trace)
    again = fastnn.fuse(fused, trace=trace)
    assert repr(again) == repr(fused)
    assert fused_paths(again) == fused_paths(fused)


def test_unfuse_gives_stock_modules_back():
    stock = nn.Sequential(Functional(), *pair(inplace=True), nn.LogSoftmax(1))
    back = fastnn.unfuse(fastnn.fuse(stock, trace=True))
    assert repr(back) == repr(stock)
    assert back[2].inplace
    assert type(back[0]) is Functional
    assert "fastnn" not in pickle.dumps(back).decode("latin-1")


def test_unfuse_of_a_handwritten_linear_relu():
    ours = nn.Sequential(fastnn.nn.LinearReLU(6, 5), nn.Linear(5, 3))
    stock = fastnn.unfuse(ours)
    assert list(stock.state_dict()) == ["0.0.weight", "0.0.bias", "1.weight", "1.bias"]
    assert type(stock[0][0]) is nn.Linear
    assert type(ours[0]) is fastnn.nn.LinearReLU
    assert_same_results(ours, stock, input_of(ours))
    assert type(fastnn.unfuse(fastnn.nn.LinearReLU(2, 2))) is nn.Sequential


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_traced_model(copied):
    fused = fastnn.fuse(nn.Sequential(Functional()), trace=True)
    again = copied(fused)
    assert repr(again) == repr(fused)
    x = input_of(fused)
    assert torch.equal(again(x), fused(x))
    with torch.profiler.profile() as profile:
        again(x)
    assert "aten::relu" not in {event.name for event in profile.events()}
    assert again[0].one.weight is not fused[0].one.weight


def test_saved_and_loaded():
    fused = fastnn.fuse(nn.Sequential(*pair(), nn.LogSoftmax(1)))
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = input_of(fused)
    assert torch.equal(loaded(x), fused(x))


@needs_extension
def test_compile_and_export():
    fused = fastnn.fuse(
        nn.Sequential(Functional(), nn.Sequential(nn.Linear(3, 3), nn.ReLU())), trace=True
    )
    x = input_of(fused)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), fused(x))
    exported = torch.export.export(fused, (x,))
    names = [str(node.target) for node in exported.graph.nodes]
    assert names.count("fastnn.linear_relu.default") == 7
    assert not any("aten.relu" in name for name in names)


# --- what is left, and why ------------------------------------------------------------------------


def hooked(register: str, module: int) -> nn.Sequential:
    model = nn.Sequential(*pair())
    getattr(model[module], register)(lambda *_: None)
    return model


HOOKS = [
    ("register_forward_hook", 0),
    ("register_full_backward_hook", 0),
    ("register_full_backward_pre_hook", 0),
    ("register_forward_hook", 1),
    ("register_forward_pre_hook", 1),
    ("register_full_backward_hook", 1),
]


@pytest.mark.parametrize(("register", "module"), HOOKS)
def test_hooks(register, module):
    expected = ["hooks on it", "hooks on the ReLU behind it, or a forward of its own"][module]
    assert reason(hooked(register, module), "0") == expected


def test_a_hook_on_the_input_is_no_obstacle():
    model = nn.Sequential(*pair())
    seen = []
    model[0].register_forward_pre_hook(lambda module, args: seen.append(module))
    fused = fastnn.fuse(model, inplace=True)
    assert fused_paths(fused) == {"0"}
    fused(input_of(fused))
    assert seen == [fused[0]]


def test_a_hook_on_the_sequential_that_ends_between():
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 5)), nn.ReLU())
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    assert reason(model, "0.0") == "hooks on its Sequential see its output"
    x = input_of(model)
    model(x)
    assert torch.equal(seen[0], F.linear(x, model[0][0].weight, model[0][0].bias))


def test_shared_linear():
    linear = nn.Linear(5, 5)
    once = nn.Sequential(linear, nn.ReLU(), linear, nn.ReLU())
    assert fused_paths(fastnn.fuse(once)) == {"0"}
    stock = nn.Sequential(linear, nn.ReLU(), linear)
    fused = fastnn.fuse(stock)
    assert fused_paths(fused) == set()
    assert reason(stock, "0") == "shared; at 2: nothing follows it in its Sequential"


def test_shared_relu():
    relu = nn.ReLU()
    stock = nn.Sequential(nn.Linear(6, 5), relu, nn.BatchNorm1d(5), relu, nn.Linear(5, 4), relu)
    # float64: the normalization of a small batch magnifies float32's roundings.
    fused = fastnn.fuse(stock.double())
    assert fused_paths(fused) == {"0", "4"}
    assert type(fused[3]) is nn.ReLU
    assert_same_results(fused, stock, input_of(stock).double())


def test_shared_tail():
    """The ReLU at the head of a Sequential that a Linear and something else lead to."""
    tail = nn.Sequential(nn.ReLU(), nn.Linear(5, 5))
    stock = nn.Sequential(nn.Linear(5, 5), tail, nn.Sequential(nn.BatchNorm1d(5), tail))
    assert fused_paths(fastnn.fuse(stock)) == set()
    assert reason(stock, "0") == "the ReLU behind it also follows something else"
    both = nn.Sequential(nn.Linear(5, 5), tail, nn.Linear(5, 5), tail)
    fused = fastnn.fuse(both)
    assert fused_paths(fused) == {"0", "2"}
    assert_same_results(fused, both, input_of(both))


def test_shared_with_an_attribute():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)
            self.body = nn.Sequential(self.fc, nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + self.fc(x)

    stock = Both()
    for trace in (False, True):
        fused = fastnn.fuse(stock, trace=trace)
        assert fused_paths(fused) == set()
        assert_same_results(fused, stock, input_of(stock))


def test_subclasses_and_parametrizations():
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x)

    class OwnLoss(nn.CrossEntropyLoss):
        pass

    own = "a subclass of Linear, whose forward may be its own"
    assert reason(nn.Sequential(Own(6, 5), nn.ReLU()), "0") == own
    assert reason(nn.Sequential(nn.LazyLinear(5), nn.ReLU()), "0") == own
    assert "subclass of CrossEntropyLoss" in reason(OwnLoss(), "")
    for parametrization in (parametrizations.weight_norm, parametrizations.spectral_norm):
        model = nn.Sequential(*pair())
        parametrization(model[0])
        assert reason(model, "0") == "parametrized"


def test_pruned_linear_is_fused():
    """Pruning is a hook on the input, which sets the weight."""
    stock = nn.Sequential(*pair())
    prune.l1_unstructured(stock[0], "weight", 0.5)
    x = input_of(stock)
    expected = stock(x)
    fused = fastnn.fuse(stock, inplace=True)
    assert fused_paths(fused) == {"0"}
    torch.testing.assert_close(fused(x), expected, rtol=1e-5, atol=1e-6)


def test_replaced_forwards():
    model = nn.Sequential(*pair())
    model[0].forward = lambda x: x[:, :5]
    assert reason(model, "0") == "its forward has been replaced"
    loss = nn.CrossEntropyLoss()
    loss.forward = lambda x, y: x.sum()
    assert reason(loss, "") == "its forward has been replaced"


def test_a_relu_with_a_replaced_forward():
    model = nn.Sequential(*pair())
    model[1].forward = F.leaky_relu
    assert reason(model, "0") == "hooks on the ReLU behind it, or a forward of its own"
    traced = Functional()
    traced.act.forward = F.leaky_relu
    assert fused_paths(fastnn.fuse(traced, inplace=True, trace=True)) == TRACED - {"four"}
    traced = Functional()
    traced.act.register_full_backward_pre_hook(lambda module, grads: None)
    assert fused_paths(fastnn.fuse(traced, inplace=True, trace=True)) == TRACED - {"four"}


class Residual(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = x + module(x)
        return x


class Reverse(nn.Sequential):
    def __iter__(self):
        return reversed(list(super().__iter__()))


class Doubled(nn.Sequential):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class Tanh(nn.TransformerEncoderLayer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(torch.tanh(self.linear1(x)))


@pytest.mark.parametrize(
    "make_stock",
    [
        lambda: nn.Sequential(Residual([nn.Linear(6, 6)]), nn.ReLU()),
        lambda: nn.Sequential(Reverse(nn.ReLU(), nn.Linear(6, 6))),
        lambda: nn.Sequential(Doubled(nn.Identity(), nn.Linear(6, 6)), nn.ReLU()),
        lambda: nn.Sequential(nn.Linear(6, 6), Doubled(nn.ReLU())),
        lambda: Tanh(6, 2, 8),
    ],
    ids=["ModuleList", "__iter__", "__call__", "__call__ behind", "TransformerEncoderLayer"],
)
def test_containers_that_run_their_modules_in_their_own_way(make_stock):
    stock = make_stock()
    fused = fastnn.fuse(stock)
    assert fused_paths(fused) == set()
    x = torch.randn(3, 6)
    assert torch.equal(fused(x), stock(x))


class Owner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))


class Indexing(Owner):
    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](torch.tanh(self.net[0](x)))


class Iterating(Owner):
    def forward(self, x: Tensor) -> Tensor:
        found = [x := layer(x) for layer in self.net]
        return torch.stack(found)


class CallingAndIndexing(Owner):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.net[0](x)


@pytest.mark.parametrize("kind", [Indexing, Iterating, CallingAndIndexing])
@pytest.mark.parametrize("trace", [False, True])
def test_a_sequential_that_is_run_in_parts(kind, trace):
    stock = kind()
    fused = fastnn.fuse(stock, trace=trace)
    assert torch.equal(fused(input_of(stock)), stock(input_of(stock)))
    assert reason(stock, "net.0", trace=trace) == "its Sequential is run in parts"


def test_a_sequential_that_its_owner_calls():
    class Calling(Owner):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    assert fused_paths(fastnn.fuse(Calling())) == {"net.0"}


def test_fuse_mends_a_pair_whose_layer_has_been_exchanged():
    fused = fastnn.fuse(nn.Sequential(*pair(), nn.Linear(5, 3)))
    fused[0] = nn.Linear(6, 5)
    assert [entry.path for entry in fastnn.fusion_report(fused).fusible] == ["0"]
    fastnn.fuse(fused, inplace=True)
    x = input_of(fused)
    expected = F.linear(F.linear(x, fused[0].weight, fused[0].bias).relu(), *fused[2].parameters())
    torch.testing.assert_close(fused(x), expected, rtol=1e-5, atol=1e-6)


def test_unfuse_of_a_part_keeps_its_relu():
    fused = fastnn.fuse(nn.Sequential(*pair(), nn.Linear(5, 3)))
    x = input_of(fused)
    assert (fastnn.unfuse(fused[:1])(x) >= 0).all()
    assert type(fastnn.unfuse(fused[0])) is nn.Sequential
    torch.testing.assert_close(fastnn.unfuse(fused[:2])(x), fused[:2](x), rtol=1e-5, atol=1e-6)


def test_a_sequential_with_its_own_forward():
    class Backwards(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for module in reversed(self):
                x = module(x)
            return x

    model = Backwards(*pair())
    assert "Backwards.forward" in reason(model, "0")


def test_dtype():
    model = nn.Sequential(nn.Linear(3, 3, dtype=torch.complex64), nn.ReLU())
    assert reason(model, "0") == "its weight is torch.complex64"


# --- what a trace can't show ----------------------------------------------------------------------


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return -grad


class Traced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.calls = 0
        self.losses: list[Tensor] = []


class Optional(Traced):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = F.relu(self.fc(x))
        return x if scale is None else x * scale


class Branching(Traced):
    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor):
            x = x * 2
        return F.relu(self.fc(x))


class Choosing(Traced):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc(x)) if x.sum() > 0 else x


class Training(Traced):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.relu(self.fc(x)), 0.5, self.training)


class Reading(Traced):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc(x)) * self.calls


class Counting(Traced):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.relu(self.fc(x))


class Collecting(Traced):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc(x))
        self.losses.append(x.mean())
        return x


class Random(Traced):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc(x)) + torch.rand(6)


class Frozen(Traced):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = F.relu(self.fc(x))
        return x


class Decorated(Traced):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc(x))


class Reversing(Traced):
    def forward(self, x: Tensor) -> Tensor:
        return Reversal.apply(F.relu(self.fc(x)))


class Checkpointing(Traced):
    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.fc, x, use_reentrant=False).relu()


class Casting(Traced):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc(x)).to(next(self.parameters()).dtype)


class Delegating(Traced):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x))

    def body(self, x: Tensor) -> Tensor:
        return self.fc(x)


LOSES = "does what a trace loses, or fixes: "
UNTRACEABLE = {
    Optional: "has an optional argument, scale",
    Branching: LOSES + "if isinstance(x, Tensor):",
    Choosing: LOSES + "F.relu(self.fc(x)) if x.sum() > 0 else x",
    Training: LOSES + "F.dropout",
    Reading: LOSES + "self",
    Counting: LOSES + "self.calls",
    Collecting: LOSES + "self",
    Random: "makes tensors that don't depend on its input",
    Frozen: LOSES + "with torch.no_grad():",
    Decorated: "is no plain function",
    Reversing: LOSES + "Reversal",
    Checkpointing: LOSES + "torch.utils.checkpoint.checkpoint",
    Casting: LOSES + "next",
    Delegating: LOSES + "self",
}


@pytest.mark.parametrize("kind", UNTRACEABLE)
def test_untraceable(kind):
    model = kind()
    expected = f"run by {kind.__name__}.forward, which {UNTRACEABLE[kind]}"
    assert reason(model, "fc", trace=True) == expected
    assert type(model) is kind
    assert model.calls == 0
    assert model.losses == []
    assert model.training


def test_a_source_that_has_changed_since_it_was_imported(tmp_path, monkeypatch):
    source = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(6, 6)
    def forward(self, x):
        return torch.relu(self.fc(x)) RANDOM
"""
    path = tmp_path / "changing_net.py"
    monkeypatch.syspath_prepend(tmp_path)
    path.write_text(source.replace("RANDOM", "if len(x) else x"))
    net = importlib.import_module("changing_net").Net()
    path.write_text(source.replace("RANDOM", ""))
    linecache.checkcache()
    assert reason(net, "fc", trace=True) == "run by Net.forward, which has no source to be read"


def test_a_new_module_of_a_traced_ones_class_is_as_written():
    class Registering(nn.Module):
        kinds: typing.ClassVar[list[type]] = []

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def __init_subclass__(cls, name: str) -> None:
            cls.kinds.append(cls)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.fc(x))

    fused = fastnn.fuse(Registering(), trace=True)
    assert fused_paths(fused) == {"fc"}
    again = type(fused)()
    assert type(again) is Registering
    again.load_state_dict(fused.state_dict())
    x = input_of(fused)
    torch.testing.assert_close(again(x), fused(x), rtol=1e-5, atol=1e-6)
    assert Registering.kinds == []


def test_buffers_changed_in_place():
    class Averaging(Traced):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.fc(x))
            self.mean.mul_(0.5).add_(x.mean(0))
            return x - self.mean

    stock = Averaging()
    fused = copy.deepcopy(fastnn.fuse(stock, trace=True))
    assert fused_paths(fused) == {"fc"}
    assert torch.equal(fused.mean, torch.zeros(6))
    x = input_of(stock)
    for _ in range(2):
        torch.testing.assert_close(fused(x), stock(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused.mean, stock.mean, rtol=1e-5, atol=1e-6)


def test_a_linear_whose_output_is_also_used_elsewhere():
    class Twice(Traced):
        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x)
            return F.relu(x) + x

    assert "no ReLU alone" in reason(Twice(), "fc", trace=True)


def test_a_weight_used_without_its_module():
    class Weight(Traced):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(F.linear(x, self.fc.weight))

    assert reason(Weight(), "fc", trace=True) == "not called by Weight.forward"


# --- the report, and bad input --------------------------------------------------------------------


def test_report(capsys):
    model = nn.Sequential(*pair(), nn.Linear(5, 3), nn.CrossEntropyLoss())
    report = fastnn.fusion_report(model)
    assert [entry.path for entry in report.fusible] == ["0", "3"]
    assert [(entry.path, entry.reason) for entry in report.left] == [
        ("2", "followed by CrossEntropyLoss, not by ReLU")
    ]
    assert report.fused == ()
    fastnn.fuse(model, verbose=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "module            path  state  reason",
        "LinearReLU        0     fused",
        "Linear            2     left   followed by CrossEntropyLoss, not by ReLU",
        "CrossEntropyLoss  3     fused",
        "2 fused, 1 left",
    ]
    assert str(fastnn.fusion_report(nn.ReLU())).endswith("nothing that fastnn has an operator for")


@pytest.mark.parametrize("function", [fastnn.fuse, fastnn.unfuse, fastnn.fusion_report])
def test_not_a_module(function):
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got int"):
        function(3)


def test_a_model_that_cannot_be_copied():
    model = nn.Sequential(*pair())
    model.lock = (i for i in range(3))
    with pytest.raises(TypeError, match=r"model: can't be copied \(.*\); pass inplace=True"):
        fastnn.fuse(model)
    assert fused_paths(model) == set()
    assert fused_paths(fastnn.fuse(model, inplace=True)) == {"0"}


def test_nothing_is_changed_globally():
    before = [nn.Linear.forward, nn.Sequential.forward, F.relu, F.cross_entropy]
    fastnn.fuse(Functional(), trace=True)
    assert [nn.Linear.forward, nn.Sequential.forward, F.relu, F.cross_entropy] == before
    assert type(nn.Linear(2, 2)) is nn.Linear

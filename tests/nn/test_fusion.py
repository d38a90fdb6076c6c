"""fastnn.fuse and unfuse: which containers they change, and what runs fused in them."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

import fastnn
from support.fusion import (
    OURS,
    Backwards,
    Doubling,
    assert_same_results,
    fused_paths,
    input_of,
    operators_of,
    pair,
    reason,
)
from support.marks import needs_extension
from support.sample_inputs import SEED, Draws


class Mlp(nn.Module):
    """Like timm's: the same attributes in the same order."""

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


def linears(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]


# --- what is fused --------------------------------------------------------------------------------

# By name: the model, its layers that are fused, and what it runs.
LINEAR, LINEAR_RELU, MLP = OURS
RELU = "aten::relu"
MODELS = {
    "mlp": (
        lambda: nn.Sequential(*pair(), nn.Linear(5, 3), nn.LogSoftmax(1)),
        {"0", "2", "3"},
        [MLP],
    ),
    "one layer": (lambda: nn.Sequential(nn.Linear(6, 5)), {"0"}, [LINEAR]),
    "no bias": (lambda: nn.Sequential(*pair(bias=False)), {"0"}, [LINEAR_RELU]),
    "inplace": (lambda: nn.Sequential(*pair(inplace=True)), {"0"}, [LINEAR_RELU]),
    "no relu": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), {"0", "1"}, [MLP]),
    "relu first": (lambda: nn.Sequential(nn.ReLU(), *pair()), {"1"}, [RELU, LINEAR_RELU]),
    "two relus": (lambda: nn.Sequential(*pair(), nn.ReLU()), {"0"}, [LINEAR_RELU, RELU]),
    "relu last": (
        lambda: nn.Sequential(*pair(), nn.Linear(5, 3), nn.ReLU()),
        {"0", "2"},
        [MLP],
    ),
    "six layers": (
        lambda: nn.Sequential(
            *pair(), *(m for _ in range(5) for m in (nn.Linear(5, 5), nn.ReLU()))
        ),
        {"0", "2", "4", "6", "8", "10"},
        [MLP],
    ),
    "nested": (
        lambda: nn.Sequential(nn.Sequential(*pair()), nn.Linear(5, 2), nn.ReLU()),
        {"0.0", "1"},
        [MLP],
    ),
    "across the end of a Sequential": (
        lambda: nn.Sequential(nn.Sequential(nn.Identity(), nn.Linear(6, 5)), nn.ReLU()),
        {"0.1"},
        [LINEAR_RELU],
    ),
    "across its beginning": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.Sequential(nn.ReLU()))),
        {"0"},
        [LINEAR_RELU],
    ),
    "across an empty one": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Sequential(), nn.ReLU()),
        {"0"},
        [LINEAR_RELU],
    ),
    "held by other modules": (
        lambda: nn.Sequential(nn.ModuleDict({"head": nn.Sequential(*pair())})["head"]),
        {"0.0"},
        [LINEAR_RELU],
    ),
    "dropout between": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Dropout(0), nn.ReLU()),
        {"0"},
        [LINEAR, RELU],
    ),
    "dropout between chains": (
        lambda: nn.Sequential(*pair(), nn.Linear(5, 4), nn.Dropout(0), nn.Linear(4, 4), nn.ReLU()),
        {"0", "2", "4"},
        [MLP, LINEAR_RELU],
    ),
    "identity between": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Identity(), nn.ReLU()),
        {"0"},
        [LINEAR, RELU],
    ),
    "flatten between": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Flatten(), nn.ReLU()),
        {"0"},
        [LINEAR, RELU],
    ),
    "another activation": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU6()),
        {"0"},
        [LINEAR],
    ),
    "norm first": (
        lambda: nn.Sequential(nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)),
        {"2"},
        [RELU, LINEAR],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_neighbours(name):
    build, expected, calls = MODELS[name]
    stock = build()
    x = input_of(stock)
    fused = fastnn.fuse(stock)
    assert fused_paths(fused) == expected
    assert fused_paths(stock) == set()
    assert_same_results(fused, stock, x)
    if fastnn.is_available():
        assert operators_of(fused, x) == calls


# Changes that split a chain of four layers at the second one, or at the ReLU after it.
SPLITS = {
    "hook": (
        lambda model: model[2].register_forward_hook(lambda *_: None),
        [LINEAR_RELU, "aten::linear", RELU, MLP],
    ),
    "hook on a relu": (
        lambda model: model[3].register_forward_hook(lambda *_: None),
        [MLP, RELU, MLP],
    ),
    "parametrization": (
        lambda model: parametrizations.weight_norm(model[2]),
        [LINEAR_RELU, "aten::linear", RELU, MLP],
    ),
    "forward": (
        lambda model: setattr(model[2], "forward", functools.partial(negative, model[2])),
        [LINEAR_RELU, "aten::linear", RELU, MLP],
    ),
    "exchanged": (
        lambda model: model.__setitem__(2, nn.Identity()),
        [LINEAR_RELU, RELU, MLP],
    ),
    "nested and hooked": (
        lambda model: nested(model).register_forward_hook(lambda *_: None),
        [LINEAR_RELU, LINEAR_RELU, MLP],
    ),
}


def negative(linear: nn.Linear, x: Tensor) -> Tensor:
    return -F.linear(x, linear.weight, linear.bias)


def nested(model: nn.Sequential) -> nn.Sequential:
    """Moves the second pair into a nested Sequential."""
    inner = fastnn.fuse(nn.Sequential(model[2], model[3]))
    model[2], model[3] = inner, nn.Sequential()
    return inner


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("first", ["fuse", "change"])
def test_what_splits_a_chain(split, first):
    change, calls = SPLITS[split]
    stock = nn.Sequential(*pair(), *(m for _ in range(3) for m in (nn.Linear(5, 5), nn.ReLU())))[
        :-1
    ]
    x = input_of(stock)
    if first == "fuse":
        fused = fastnn.fuse(copy.deepcopy(stock))
        change(fused)
    else:
        fused = copy.deepcopy(stock)
        change(fused)
        fused = fastnn.fuse(fused, inplace=True)
    change(stock)
    assert_same_results(fused, stock, x)
    if fastnn.is_available():
        assert operators_of(fused, x) == calls


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
    assert type(fastnn.unfuse(fused).layers[0]) is nn.TransformerEncoderLayer


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


def test_twice_changes_nothing():
    fused = fastnn.fuse(nn.Sequential(nn.Sequential(*pair()), nn.LogSoftmax(1)))
    again = fastnn.fuse(fused)
    assert repr(again) == repr(fused)
    assert type(again) is type(fused)
    assert type(again[0]) is type(fused[0])


def test_unfuse_gives_stock_modules_back():
    stock = nn.Sequential(nn.Sequential(*pair(inplace=True)), nn.LogSoftmax(1))
    back = fastnn.unfuse(fastnn.fuse(stock))
    assert repr(back) == repr(stock)
    assert "fastnn" not in pickle.dumps(back).decode("latin-1")


def test_unfuse_of_a_handwritten_linear_relu():
    ours = nn.Sequential(fastnn.nn.LinearReLU(6, 5), nn.Linear(5, 3))
    stock = fastnn.unfuse(ours)
    assert list(stock.state_dict()) == ["0.0.weight", "0.0.bias", "1.weight", "1.bias"]
    assert type(stock[0][0]) is nn.Linear
    assert type(ours[0]) is fastnn.nn.LinearReLU
    assert_same_results(ours, stock, input_of(ours))
    assert type(fastnn.unfuse(fastnn.nn.LinearReLU(2, 2))) is nn.Sequential


def test_a_handwritten_linear_runs_our_operator_and_unfuses():
    ours = nn.Sequential(fastnn.nn.Linear(6, 5), nn.Tanh(), fastnn.nn.Linear(5, 3))
    assert fused_paths(ours) == {"0", "2"}
    stock = fastnn.unfuse(ours)
    assert list(stock.state_dict()) == list(ours.state_dict())
    assert [type(module) for module in stock] == [nn.Linear, nn.Tanh, nn.Linear]
    assert_same_results(ours, stock, input_of(ours))


def test_unfuse_finds_our_classes_below_those_that_torch_makes_of_them():
    ours = nn.Sequential(fastnn.nn.LinearReLU(6, 5), *pair())
    parametrizations.weight_norm(ours[0])
    x = input_of(ours)
    stock = fastnn.unfuse(ours)
    torch.testing.assert_close(stock[:1](x), ours[:1](x), rtol=1e-5, atol=1e-6)
    assert not any(
        kind.__module__.startswith("fastnn") for m in stock.modules() for kind in type(m).__mro__
    )
    assert type(stock[0][0]).__name__ == "ParametrizedLinear"
    torch.nn.utils.parametrize.remove_parametrizations(stock[0][0], "weight")
    assert type(stock[0][0]) is nn.Linear


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies(copied):
    fused = fastnn.fuse(nn.Sequential(nn.Sequential(*pair()), Doubling(5, 5)))
    again = copied(fused)
    assert repr(again) == repr(fused)
    assert [type(m) for m in again.modules()] == [type(m) for m in fused.modules()]
    x = input_of(fused)
    assert torch.equal(again(x), fused(x))


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
        nn.Sequential(nn.Sequential(*pair()), nn.Linear(5, 5), nn.ReLU(inplace=True))
    )
    x = input_of(fused)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), fused(x))
    exported = torch.export.export(fused, (x,))
    names = [str(node.target) for node in exported.graph.nodes]
    assert [name for name in names if "." in name] == ["fastnn.mlp.default"]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("script", [torch.jit.script, lambda m: torch.jit.trace(m, input_of(m))])
def test_torchscript(script):
    fused = fastnn.fuse(nn.Sequential(nn.Sequential(*pair()), nn.Linear(5, 3)))
    x = input_of(fused)
    torch.testing.assert_close(script(fused)(x), fused(x), rtol=1e-5, atol=1e-6)
    assert fused_paths(fused) == {"0.0", "1"}


# --- what is left, and why ------------------------------------------------------------------------


def test_reasons():
    class Own(nn.Linear):
        pass

    class OwnLoss(nn.CrossEntropyLoss):
        pass

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(6, 5)])

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.layers[0](x))

    own = "a subclass of Linear, whose forward may be its own"
    assert reason(nn.Sequential(Own(6, 5), nn.ReLU()), "0") == own
    assert reason(nn.Sequential(nn.LazyLinear(5), nn.ReLU()), "0") == own
    assert reason(OwnLoss(), "") == "a subclass of CrossEntropyLoss, whose forward may be its own"
    assert reason(nn.Linear(2, 2), "") == "nothing follows it"
    looks_into = 'forward, which torch.compile(model, backend="fastnn") looks into'
    assert reason(Net(), "layers.0") == f"run by Net.{looks_into}"
    assert reason(Backwards(*pair()), "0") == f"run by Backwards.{looks_into}"
    loss = nn.CrossEntropyLoss()
    loss.forward = lambda x, y: x.sum()
    assert reason(loss, "") == "its forward has been replaced"
    block = nn.TransformerEncoderLayer(6, 2, 8, activation=nn.ReLU())
    block.activation.register_forward_hook(lambda *_: None)
    assert reason(block, "linear1") == "hooks or a forward of its own on the ReLU behind it"
    model = nn.Sequential(*pair())
    model[0].register_forward_hook(lambda *_: None)
    assert reason(model, "0") == "hooks or a forward of its own on it"


# --- the report, and bad input --------------------------------------------------------------------


def test_report(capsys):
    model = nn.Sequential(*pair(), nn.Linear(5, 3), nn.CrossEntropyLoss())
    report = fastnn.fusion_report(model)
    assert [entry.path for entry in report.fusible] == ["0", "2", "3"]
    assert report.left == ()
    assert report.fused == ()
    fastnn.fuse(model, verbose=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "module            path  run by       state  reason",
        "Linear            0     (the model)  fused",
        "Linear            2     (the model)  fused",
        "CrossEntropyLoss  3                  fused",
        "3 fused",
    ]
    assert str(fastnn.fusion_report(nn.ReLU())).endswith("nothing that fastnn has an operator for")


def test_report_of_a_loss_that_has_a_linear():
    model = nn.Sequential(*pair(), fastnn.nn.LinearCrossEntropyLoss(5, 3))
    report = fastnn.fusion_report(model)
    assert [(entry.path, entry.state) for entry in report.entries] == [
        ("0", "can be fused"),
        ("2", "fused"),
    ]


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


def test_trace_names_what_has_taken_its_place():
    model = nn.Sequential(*pair())
    with pytest.raises(TypeError, match=r'torch.compile\(model, backend="fastnn"\)'):
        fastnn.fuse(model, inplace=True, trace=True)
    assert type(model) is nn.Sequential


def test_nothing_is_changed_globally():
    before = [nn.Linear.forward, nn.Sequential.forward, F.relu, F.cross_entropy]
    fastnn.fuse(nn.Sequential(*pair()))
    assert [nn.Linear.forward, nn.Sequential.forward, F.relu, F.cross_entropy] == before
    assert type(nn.Linear(2, 2)) is nn.Linear
    assert type(nn.Sequential()) is nn.Sequential


# --- found by other people's programs -------------------------------------------------------------


class DoublingLinear(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return 2 * result if func is F.linear else result


class DoublingProducts(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return 2 * result if func is torch.ops.aten.addmm.default else result


@pytest.mark.parametrize("mode", [DoublingLinear, DoublingProducts])
def test_modes_see_the_layers_functions(mode):
    stock = nn.Sequential(*pair(), nn.Linear(5, 3))
    x, fused = input_of(stock), fastnn.fuse(stock)
    with mode(), torch.no_grad():
        assert torch.equal(fused(x), stock(x))


@needs_extension
def test_a_default_device_leaves_pairs_fused():
    fused = fastnn.fuse(nn.Sequential(*pair()))
    with torch.device("cpu"):
        assert fused_paths(fused) == {"0"}


def doubled_call(module: nn.Module) -> None:
    call = module._call_impl
    module._call_impl = lambda x: 2 * call(x)


SHADOWS = {
    "weight": lambda model: vars(model[0]).update(weight=torch.ones(5, 6)),
    "call of the Linear": lambda model: doubled_call(model[0]),
    "call of the ReLU": lambda model: doubled_call(model[1]),
}


@pytest.mark.parametrize("shadow", SHADOWS)
def test_what_an_object_has_in_place_of_its_classs(shadow):
    stock = nn.Sequential(*pair())
    x, fused = input_of(stock), fastnn.fuse(stock)
    for model in (fused, stock):
        SHADOWS[shadow](model)
    # With another ReLU the Linear still runs ours, which sums in another order.
    torch.testing.assert_close(fused(x), stock(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (nn.Sequential, "forward"),
        (nn.Linear, "__call__"),
        (nn.ReLU, "_call_impl"),
        (nn.Module, "__call__"),
    ],
)
def test_replaced_methods_of_classes(monkeypatch, owner, name):
    fused = fastnn.fuse(nn.Sequential(*pair()))
    original, called = getattr(owner, name), []
    monkeypatch.setattr(owner, name, lambda *args, **kw: called.append(1) or original(*args, **kw))
    fused(input_of(fused))
    assert called


def test_functions_that_were_replaced_before_fastnn_was_imported():
    program = """
import torch
from torch import nn
from torch.nn import functional as F
linear, called = F.linear, []
F.linear = lambda *args: called.append(1) or linear(*args)
import fastnn
fastnn.fuse(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))(torch.ones(1, 2))
assert called == [1]
"""
    command = [sys.executable, "-W", "ignore::RuntimeWarning", "-c", program]
    subprocess.run(command, cwd=Path(fastnn.__file__).parents[1], check=True)


@needs_extension
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_weight_that_is_no_parameter_compiles(name):
    stock = nn.Sequential(*pair())
    value = getattr(stock[0], name).detach().clone()
    delattr(stock[0], name)
    stock[0].register_buffer(name, value)
    x, fused = input_of(stock), fastnn.fuse(stock)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(fused, backend="eager", fullgraph=True)(x), stock(x))
    assert torch.equal(torch.export.export(fused, (x,)).module()(x), stock(x))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_layer_is_not_copied():
    model = nn.Sequential(torch.jit.script(nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 6), nn.ReLU())
    with pytest.raises(TypeError, match="would not share its parameters; pass inplace=True"):
        fastnn.fuse(model)
    fused = fastnn.fuse(model, inplace=True)
    assert fused_paths(fused) == {"2"}
    assert type(fastnn.unfuse(fused, inplace=True)) is nn.Sequential


class Rebuilt(nn.Sequential):
    def __reduce__(self):
        return rebuild, (self.state_dict(),)


def rebuild(state: dict[str, Tensor]) -> Rebuilt:
    model = Rebuilt(*pair())
    model.load_state_dict(state)
    return model


def test_a_class_that_says_how_it_is_pickled():
    fused = fastnn.fuse(Rebuilt(*pair()), inplace=True)
    x = input_of(fused)
    again = pickle.loads(pickle.dumps(fused))
    torch.testing.assert_close(again(x), fused(x), rtol=1e-5, atol=1e-6)


def test_a_transformer_layer_without_its_linear():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    feed_forward = nn.Linear(8, 8)
    del layer.linear1, layer.linear2
    assert fastnn.fusion_report(layer).fusible == ()
    layer._ff_block = lambda x: feed_forward(x)
    assert type(fastnn.fuse(layer, inplace=True)) is nn.TransformerEncoderLayer


def test_unfuse_refuses_options_that_pytorch_has_not():
    model = nn.Sequential(fastnn.nn.LinearCrossEntropyLoss(6, 5))
    assert type(fastnn.unfuse(model)[0]) is not fastnn.nn.LinearCrossEntropyLoss
    model[0].softcap = 30.0
    with pytest.raises(ValueError, match="no softcap, which 0 has set"):
        fastnn.unfuse(model)
    assert type(model[0]) is fastnn.nn.LinearCrossEntropyLoss

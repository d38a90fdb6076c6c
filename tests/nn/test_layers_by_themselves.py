"""A layer of a fused pair that is called directly, observed or changed is PyTorch's own."""

from __future__ import annotations

import copy
import typing

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.fusion import fuse_linear_bn_eval

import fastnn
from support.fusion import (
    backward_hook,
    forward_hook,
    fused_paths,
    input_of,
    operators_of,
    pair,
    reason,
)
from support.sample_inputs import SEED, Draws


def square_pair() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU())


# --- a layer by itself is PyTorch's ---------------------------------------------------------------


def test_only_containers_of_linears_change_their_class():
    stock = nn.Sequential(
        nn.Sequential(*pair()), nn.Sequential(nn.LayerNorm(5), nn.Tanh()), nn.ReLU()
    )
    fused = fastnn.fuse(stock)
    changed = {
        path
        for path, m in fused.named_modules()
        if not type(m).__module__.startswith("torch.") or "Fused" in type(m).__name__
    }
    assert changed == {"", "0"}
    assert type(fused[0][0]) is nn.Linear
    assert type(fused[0][1]) is nn.ReLU
    assert isinstance(fused, nn.Sequential)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([square_pair(), square_pair()])
        self.named = nn.ModuleDict({"a": square_pair()})
        self.net = nn.Sequential(square_pair(), square_pair())

    def helper(self, x: Tensor) -> Tensor:
        return self.net[0][1](self.net[0][0](x) + x)


def in_parts_of_a_list(self: Blocks, x: Tensor) -> Tensor:
    for block in self.blocks:
        x = block[1](block[0](x) + x)
    return x


def unpacked(self: Blocks, x: Tensor) -> Tensor:
    for linear, relu in self.blocks:
        x = relu(linear(x) - x)
    return x


WAYS = {
    "in parts of a list": in_parts_of_a_list,
    "unpacked": unpacked,
    "from a dict": lambda self, x: self.named["a"][0](x),
    "in a helper": lambda self, x: self.helper(x),
    "modules": lambda self, x: list(self.net.modules())[2](x),
    "children": lambda self, x: next(next(self.net.children()).children())(x),
    "get_submodule": lambda self, x: self.get_submodule("net.1.0")(x),
    "slice": lambda self, x: self.net[0][:1](x),
    "whole and in parts": lambda self, x: self.net(x) + self.net[0][0](x),
    "iterated": lambda self, x: torch.stack([x := layer(x) for layer in self.net[0]]),
}


@pytest.mark.parametrize("way", WAYS)
def test_layers_that_are_run_by_themselves(way, monkeypatch):
    monkeypatch.setattr(Blocks, "forward", WAYS[way], raising=False)
    stock = Blocks()
    fused = fastnn.fuse(stock)
    x = Draws(SEED).normal(7, 6)
    # The whole Sequentials run our kernel, which sums in another order.
    torch.testing.assert_close(fused(x), stock(x), rtol=1e-5, atol=1e-6)
    assert type(fused.net) is not nn.Sequential


def recorded(model: nn.Module, x: Tensor, hook: typing.Callable) -> list[Tensor]:
    """The values that a hook on each layer sees, in order."""
    seen: list[Tensor] = []
    handles = [hook(module, seen) for module in model.modules() if not list(module.children())]
    output = model(x)
    if output.requires_grad:
        output.sum().backward()
    for handle in handles:
        handle.remove()
    return seen


def forward_pre_hook(module: nn.Module, seen: list[Tensor]):
    return module.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))


def backward_pre_hook(module: nn.Module, seen: list[Tensor]):
    return module.register_full_backward_pre_hook(lambda m, g_out: seen.append(g_out[0].clone()))


HOOKS = [forward_hook, forward_pre_hook, backward_hook, backward_pre_hook]


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)
def test_hooks_see_what_they_see_in_pytorch(hook):
    stock = nn.Sequential(nn.Sequential(*pair()), nn.Sequential(nn.Linear(5, 4)), nn.ReLU())
    x = input_of(stock)
    fused = fastnn.fuse(stock)
    ours, theirs = recorded(fused, x, hook), recorded(stock, x, hook)
    assert len(theirs) == 4
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
    # Without hooks the pairs are fused again.
    assert fused_paths(fused) == {"0.0", "1.0"}


def test_one_hook_leaves_the_other_pairs_fused():
    fused = fastnn.fuse(nn.Sequential(*pair(), nn.Linear(5, 4), nn.ReLU()))
    x = input_of(fused)
    handle = fused[0].register_forward_hook(lambda *_: None)
    assert fused_paths(fused) == {"2"}
    if fastnn.is_available():
        assert operators_of(fused, x).count("fastnn::linear_relu") == 1
    handle.remove()
    assert fused_paths(fused) == {"0", "2"}


@pytest.mark.parametrize("before", [False, True])
def test_hooks_on_all_modules(before):
    stock = nn.Sequential(*pair())
    x = input_of(stock)
    fused = stock if before else fastnn.fuse(stock)
    seen = []
    register = nn.modules.module.register_module_forward_hook
    handle = register(lambda module, args, output: seen.append((type(module).__bases__, output)))
    try:
        fused = fastnn.fuse(fused)
        assert reason(fused, "0") == "hooks on all modules"
        fused(x)
    finally:
        handle.remove()
    assert len(seen) == 3
    assert torch.equal(seen[0][1], F.linear(x, stock[0].weight, stock[0].bias))
    assert fused_paths(fused) == {"0"}


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_on_an_inner_sequential_see_its_input_and_output(register):
    def observed(model: nn.Module) -> list[Tensor]:
        seen = []
        for inner in (model[0], model[1]):
            getattr(inner, register)(lambda *args: seen.append(args[-1]))
        model(x)
        return seen

    stock = nn.Sequential(nn.Sequential(nn.Linear(6, 5)), nn.Sequential(nn.ReLU()))
    x = input_of(stock)
    ours, theirs = observed(fastnn.fuse(stock)), observed(copy.deepcopy(stock))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


PARTS = {
    "weight_norm": lambda model: parametrizations.weight_norm(model[0]),
    "spectral_norm": lambda model: torch.nn.utils.spectral_norm(model[0]),
    "pruned": lambda model: prune.l1_unstructured(model[0], "weight", 0.5),
    "exchanged": lambda model: model.__setitem__(0, Negative(6, 5)),
    "another activation": lambda model: model.__setitem__(1, nn.Tanh()),
    "inserted": lambda model: model.insert(1, nn.LayerNorm(5)),
    "deleted": lambda model: model.__delitem__(1),
    "wrapped": lambda model: model.__setitem__(0, nn.Sequential(model[0], nn.Dropout(0.0))),
    "forward": lambda model: setattr(model[0], "forward", lambda x: x[:, :5]),
    "forward of the ReLU": lambda model: setattr(model[1], "forward", F.leaky_relu),
    "class": lambda model: setattr(model[0], "__class__", Negative),
    "weight": lambda model: set_weight(model[0]),
    "compiled": lambda model: model[0].compile(backend=negated),
}


def set_weight(linear: nn.Linear) -> None:
    del linear.weight
    linear.weight = torch.linspace(-1, 1, 30).view(5, 6)


class Negative(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


def negated(graph_module: fx.GraphModule, inputs: list[Tensor]) -> typing.Callable:
    return lambda *args: tuple(-output for output in graph_module(*args))


# Changes after which the Linear still runs our operator, which sums in another order: its path.
STILL_FUSED = {
    "another activation": {"0"},
    "inserted": {"0"},
    "deleted": {"0"},
    "forward of the ReLU": {"0"},
    "wrapped": {"0.0"},
}


@pytest.mark.parametrize("change", PARTS)
@pytest.mark.parametrize("first", ["fuse", "change"])
def test_layers_that_are_changed(change, first):
    """Before fuse or after it: the numbers are stock's, to the bit if nothing runs fused."""
    torch.manual_seed(0)
    stock = nn.Sequential(*pair())
    x = input_of(stock)
    fused = fastnn.fuse(copy.deepcopy(stock)) if first == "fuse" else copy.deepcopy(stock)
    for model in (fused, stock):
        torch.manual_seed(1)
        PARTS[change](model)
        model.eval()
    fused = fastnn.fuse(fused, inplace=True)
    torch._dynamo.reset()
    still_fused = STILL_FUSED.get(change, set())
    near = {"rtol": 1e-5, "atol": 1e-6} if still_fused else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(fused(x), stock(x), **near)
    assert fused_paths(fused) == still_fused
    fastnn.unfuse(fused, inplace=True)
    assert torch.equal(fused(x), stock(x))


def test_an_exchanged_layer_of_the_same_kind_runs_fused():
    fused = fastnn.fuse(nn.Sequential(*pair()))
    fused[0] = nn.Linear(6, 5)
    assert fused_paths(fused) == {"0"}
    x = input_of(fused)
    expected = F.linear(x, fused[0].weight, fused[0].bias).relu()
    torch.testing.assert_close(fused(x), expected, rtol=1e-5, atol=1e-6)


def test_batch_norm_folded_into_a_layer():
    stock = nn.Sequential(*pair(), nn.Linear(5, 3)).eval()
    norm = nn.BatchNorm1d(5).eval()
    norm.running_mean.uniform_()
    ours = fuse_linear_bn_eval(fastnn.fuse(stock)[0], norm)
    theirs = fuse_linear_bn_eval(stock[0], norm)
    assert torch.equal(ours(input_of(stock)), theirs(input_of(stock)))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no mkldnn")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mkldnn():
    from torch.utils import mkldnn  # warns when it is imported

    stock = nn.Sequential(*pair(), nn.Linear(5, 3)).eval()
    x = input_of(stock)
    ours = mkldnn.to_mkldnn(fastnn.fuse(stock))
    theirs = mkldnn.to_mkldnn(stock)
    assert torch.equal(ours(x.to_mkldnn()).to_dense(), theirs(x.to_mkldnn()).to_dense())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per")
def test_dynamic_quantization_of_a_fused_model():
    torch.manual_seed(0)
    stock = nn.Sequential(*pair(), nn.Linear(5, 3)).eval()
    quantize = torch.ao.quantization.quantize_dynamic
    ours = quantize(fastnn.fuse(stock), {nn.Linear}, torch.qint8)
    theirs = quantize(stock, {nn.Linear}, torch.qint8)
    assert type(ours[0]) is type(theirs[0])
    assert torch.equal(ours(input_of(stock)), theirs(input_of(stock)))


def test_fx_sees_the_modules_of_the_stock_model():
    stock = nn.Sequential(nn.Sequential(*pair()), nn.Linear(5, 3))
    ours, theirs = fx.symbolic_trace(fastnn.fuse(stock)), fx.symbolic_trace(stock)
    assert [n.target for n in ours.graph.nodes] == [n.target for n in theirs.graph.nodes]
    x = input_of(stock)
    assert torch.equal(ours(x), stock(x))


def test_hooks_on_all_modules_see_the_inner_containers():
    stock = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
    x, seen = input_of(stock), []
    fused = fastnn.fuse(stock)
    register = nn.modules.module.register_module_full_backward_hook
    with register(lambda module, grads, outputs: seen.append(grads[0])):
        for model in (fused, stock):
            model(x.clone().requires_grad_()).sum().backward()
    ours, theirs = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(theirs) == 6
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("owner", "name"), [(F, "linear"), (F, "relu"), (nn.Linear, "forward"), (nn.ReLU, "forward")]
)
def test_what_replaces_pytorchs_functions_sees_the_calls(monkeypatch, owner, name):
    """Profilers that count operations do this."""
    fused = fastnn.fuse(nn.Sequential(*pair()))
    original, called = getattr(owner, name), []
    monkeypatch.setattr(owner, name, lambda *args, **kw: called.append(1) or original(*args, **kw))
    fused(input_of(fused))
    assert called == [1]


class Int8(Tensor):
    """A weight that knows only torch's functions, like those of quantization libraries."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return F.linear(args[0], 2 * args[1].as_subclass(Tensor), *args[2:])
        if getattr(func, "__module__", "").startswith("fastnn"):
            raise NotImplementedError(f"Int8 has no {func}")
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("first", ["fuse", "change"])
def test_weights_of_a_class_that_knows_torchs_functions(first):
    stock = nn.Sequential(*pair())
    x = input_of(stock)
    expected = F.linear(x, 2 * stock[0].weight, stock[0].bias).relu()
    fused = fastnn.fuse(stock) if first == "fuse" else stock
    weight = fused[0].weight.detach().as_subclass(Int8)
    fused[0].weight = nn.Parameter(weight, requires_grad=False)
    fused = fastnn.fuse(fused, inplace=True)
    assert torch.equal(fused(x), expected)
    assert reason(fused, "0") == "its weight is no plain parameter"

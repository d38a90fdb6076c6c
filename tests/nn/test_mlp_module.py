"""fastnn.nn.MLP: a Sequential of PyTorch's layers, run as one operator."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastnn
from support.fusion import OURS, assert_same_results, forward_hook, fused_paths, operators_of
from support.marks import needs_extension
from support.sample_inputs import SEED, Draws

LINEAR, LINEAR_RELU, MLP = OURS


def capability(section: str, row: str) -> pytest.MarkDecorator:
    return pytest.mark.capability(section, row, operators=["mlp"])


def stock_mlp(*sizes: int, **options) -> nn.Sequential:
    layers = []
    for ins, outs in pairwise(sizes):
        layers += [nn.Linear(ins, outs, **options), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def both(hidden: int | tuple[int, ...] = (5, 4), **options) -> tuple[fastnn.nn.MLP, nn.Sequential]:
    """Ours and torch's with the same parameters."""
    torch.manual_seed(0)
    ours = fastnn.nn.MLP(6, hidden, 3, **options)
    torch.manual_seed(0)
    sizes = (hidden,) if isinstance(hidden, int) else hidden
    return ours, stock_mlp(6, *sizes, 3, **options)


def x_of(*batch: int) -> Tensor:
    return Draws(SEED).normal(*batch, 6)


@pytest.mark.parametrize("hidden", [(5, 4), [5, 4], (5,), 5, (), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=str)
def test_it_is_torchs_sequential(hidden, options):
    ours, stock = both(tuple(hidden) if isinstance(hidden, list) else hidden, **options)
    if isinstance(hidden, list):
        torch.manual_seed(0)
        ours = fastnn.nn.MLP(6, hidden, 3, **options)
    assert isinstance(ours, nn.Sequential)
    assert [type(layer) for layer in ours] == [type(layer) for layer in stock]
    assert repr(ours) == repr(stock).replace("Sequential(", "MLP(", 1)
    assert ours.state_dict().keys() == stock.state_dict().keys()
    assert all(map(torch.equal, ours.parameters(), stock.parameters()))
    assert_same_results(ours, stock, x_of(7))
    if fastnn.is_available():
        assert operators_of(ours, x_of(7)) == [MLP if len(stock) > 1 else LINEAR]


def test_arguments_are_those_of_linear():
    parameters = inspect.signature(fastnn.nn.MLP).parameters
    assert [*parameters] == [
        *("in_features", "hidden_features", "out_features", "bias", "device", "dtype")
    ]
    linear = inspect.signature(nn.Linear).parameters
    for name in ("bias", "device", "dtype"):
        assert parameters[name].default == linear[name].default
    by_name = fastnn.nn.MLP(
        in_features=6, hidden_features=5, out_features=3, bias=False, device="meta"
    )
    assert [p.device.type for p in by_name.parameters()] == ["meta", "meta"]
    assert by_name(torch.empty(2, 6, device="meta")).shape == (2, 3)
    positional = fastnn.nn.MLP(6, 5, 3, True, None, torch.bfloat16)
    assert {p.dtype for p in positional.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ((6, -1, 3), "negative"),
        ((6, (5, 2.5), 3), "'hidden_features' must be int, but got 2.5"),
        ((6, 16.0, 3), "'hidden_features' must be int, but got 16.0"),
        ((6, "16", 3), "'hidden_features' must be int, but got '16'"),
        (("6", 5, 3), "'in_features' must be int, but got '6'"),
        ((6, 5, None), "'out_features' must be int, but got None"),
    ],
    ids=str,
)
def test_bad_sizes(sizes, says):
    with pytest.raises((TypeError, RuntimeError), match=says):
        fastnn.nn.MLP(*sizes)


def test_bad_input():
    model = fastnn.nn.MLP(6, 5, 3)
    with pytest.raises(TypeError, match="'input' must be Tensor, not list"):
        model([[1.0] * 6])
    with pytest.raises(RuntimeError, match="input"):
        model(torch.ones(2, 7))


@capability("saving", "`state_dict` to and from torch's, `strict=True`")
def test_state_dicts_go_both_ways():
    ours, stock = both()
    changed = {key: value + 1 for key, value in ours.state_dict().items()}
    stock.load_state_dict(changed, strict=True)
    ours.load_state_dict(stock.state_dict(), strict=True)
    assert_same_results(ours, stock, x_of(7))
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    stock.load_state_dict(torch.load(file, weights_only=True))


def test_parts_of_it():
    ours, stock = both()
    x = x_of(7)
    assert type(ours[0]) is nn.Linear
    assert type(ours[-2]) is nn.ReLU
    assert len(ours) == 5
    for part in (slice(0, 2), slice(2, None), slice(None, None, 2), slice(0, 0)):
        assert type(ours[part]) is nn.Sequential
        assert list(ours[part].state_dict()) == list(stock[part].state_dict())
    torch.testing.assert_close(ours[:2](x), stock[:2](x))
    assert type(ours[:]) is nn.Sequential
    assert_same_results(fastnn.fuse(ours[:3]), stock[:3], x)


def test_changes_of_it():
    """The same changes as for any Sequential."""
    ours, stock = both()
    for model in (ours, stock):
        torch.manual_seed(1)
        model.append(nn.ReLU())
        model.append(nn.Linear(3, 2))
        model[1] = nn.Tanh()
        del model[3]
        model.insert(0, nn.LayerNorm(6))
    assert_same_results(ours, stock, x_of(7))
    if fastnn.is_available():
        assert operators_of(ours, x_of(7)) == [LINEAR, MLP]


@capability("saving", "`pickle`, `torch.save`, `copy.deepcopy`")
@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies(copied):
    ours, _ = both()
    again = copied(ours)
    assert type(again) is fastnn.nn.MLP
    assert torch.equal(again(x_of(7)), ours(x_of(7)))


def test_saved_whole():
    ours, _ = both()
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x_of(7)), ours(x_of(7)))


def test_fused_already():
    ours, _ = both()
    assert fused_paths(ours) == {"0", "2", "4"}
    assert type(fastnn.fuse(ours)) is fastnn.nn.MLP
    held = fastnn.fuse(nn.Sequential(ours, nn.LogSoftmax(1)))
    assert fused_paths(held) == {"0.0", "0.2", "0.4", "1"}
    if fastnn.is_available():
        assert operators_of(held, x_of(7)) == [MLP]


def test_unfused():
    ours, stock = both()
    back = fastnn.unfuse(ours)
    assert type(back) is nn.Sequential
    assert type(ours) is fastnn.nn.MLP
    assert repr(back) == repr(stock)
    assert "fastnn" not in pickle.dumps(back).decode("latin-1")
    assert_same_results(ours, back, x_of(7))
    assert type(fastnn.unfuse(nn.ModuleList([ours]))[0]) is nn.Sequential


def test_hooks_on_its_layers():
    ours, stock = both()
    x = x_of(7)
    seen: list[list[Tensor]] = [[], []]
    for tensors, model in zip(seen, (ours, stock), strict=True):
        for layer in model:
            forward_hook(layer, tensors)
        model(x)
    assert len(seen[0]) == 5
    torch.testing.assert_close(*seen)
    assert fused_paths(ours) == set()


@needs_extension
def test_one_hook_splits_it():
    ours, stock = both()
    handle = ours[2].register_forward_hook(lambda *_: None)
    assert operators_of(ours, x_of(7)) == [LINEAR_RELU, "aten::linear", "aten::relu", LINEAR]
    assert_same_results(ours, stock, x_of(7))
    handle.remove()
    assert operators_of(ours, x_of(7)) == [MLP]


def test_parametrized_layers():
    ours, stock = both()
    for model in (ours, stock):
        parametrizations.weight_norm(model[2])
    assert_same_results(ours, stock, x_of(7))


def test_frozen_layers():
    ours, stock = both()
    for model in (ours, stock):
        model[0].requires_grad_(False)
        model[2].weight.requires_grad_(False)
        model(x_of(7)).square().sum().backward()
    for mine, theirs in zip(ours.parameters(), stock.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("batch", [(), (2, 3), (0,)], ids=str)
def test_any_leading_dimensions(batch):
    ours, stock = both()
    assert_same_results(ours, stock, x_of(*batch))


def test_a_subclass():
    class Doubled(fastnn.nn.MLP):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model, x = Doubled(6, 5, 3), x_of(7)
    torch.testing.assert_close(model(x), 2 * model[:](x))


def test_training_by_our_optimizer():
    models = both()
    x, target = x_of(7), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    kinds = (fastnn.optim.SGD, torch.optim.SGD)
    for model, kind in zip(models, kinds, strict=True):
        optimizer = kind(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), target).backward()
            optimizer.step()
    for mine, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)

"""Containers that run pairs of layers: subclasses, shared layers, other forwards."""

from __future__ import annotations

import typing

import pytest
import torch
from torch import Tensor, nn

import fastnn
from support.fusion import (
    Backwards,
    Doubling,
    assert_same_results,
    backward_hook,
    forward_hook,
    fused_paths,
    input_of,
    pair,
)
from support.sample_inputs import SEED, Draws


def test_a_subclass_with_sequentials_forward():
    stock = Doubling(6, 5)
    fused = fastnn.fuse(stock)
    assert fused_paths(fused) == {"0", "2"}
    assert isinstance(fused, Doubling)
    assert type(fastnn.unfuse(fused)) is Doubling
    assert_same_results(fused, stock, input_of(stock))


def test_a_class_that_watches_its_subclasses():
    class Registering(nn.Sequential):
        kinds: typing.ClassVar[list[type]] = []

        def __init_subclass__(cls, name: str) -> None:
            cls.kinds.append(cls)

    fused = fastnn.fuse(Registering(*pair()))
    assert fused_paths(fused) == {"0"}
    assert Registering.kinds == []
    assert type(fused[:1]) is type(fused)


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
        lambda: Backwards(nn.Linear(6, 6), nn.ReLU()),
        lambda: Tanh(6, 2, 8),
    ],
    ids=[
        "ModuleList",
        "__iter__",
        "__call__",
        "forward",
        "TransformerEncoderLayer",
    ],
)
def test_containers_that_run_their_modules_in_their_own_way(make_stock):
    stock = make_stock()
    fused = fastnn.fuse(stock)
    assert fused_paths(fused) == set()
    x = torch.randn(3, 6)
    assert torch.equal(fused(x), stock(x))


@pytest.mark.parametrize(
    "behind",
    [lambda: Doubled(nn.ReLU()), lambda: Backwards(nn.ReLU(), nn.Linear(6, 6))],
    ids=["__call__", "forward"],
)
def test_containers_of_their_own_way_behind_a_linear(behind):
    """Their ReLU does not belong to the Linear before them."""
    stock = nn.Sequential(nn.Linear(6, 6), behind())
    fused = fastnn.fuse(stock)
    assert fused_paths(fused) == {"0"}
    assert_same_results(fused, stock, input_of(stock))


def test_a_container_with_a_replaced_forward():
    model = nn.Sequential(*pair())
    model.forward = lambda x: model[0](x)
    fused = fastnn.fuse(model, inplace=True)
    assert type(fused) is nn.Sequential
    assert (fused(input_of(fused)) < 0).any()


def test_a_call_with_two_inputs_raises_as_in_pytorch():
    stock, x = nn.Sequential(*pair()), torch.ones(2, 6)
    with pytest.raises(TypeError) as expected:
        stock(x, x)
    with pytest.raises(TypeError) as raised:
        fastnn.fuse(stock)(x, x)
    assert str(raised.value) == str(expected.value)


def test_shared_layers():
    linear, relu = nn.Linear(5, 5), nn.ReLU()
    stock = nn.Sequential(linear, relu, linear, nn.Tanh(), linear, relu)
    fused = fastnn.fuse(stock)
    assert fused_paths(fused) == {"0", "2", "4"}
    assert_same_results(fused, stock, input_of(stock))


def test_a_shared_tail():
    """A ReLU at the head of a Sequential that follows both a Linear and something else."""
    tail = nn.Sequential(nn.ReLU(), nn.Linear(5, 5))
    stock = nn.Sequential(nn.Linear(5, 5), tail, nn.Sequential(nn.LayerNorm(5), tail))
    fused = fastnn.fuse(stock)
    assert fused_paths(fused) == {"0", "1.1", "2.1.1"}
    assert_same_results(fused, stock, input_of(stock))


def test_an_overridden_block_method_of_an_object():
    layer = nn.TransformerEncoderLayer(6, 2, 8, 0.0)
    layer._ff_block = lambda x: x
    fused = fastnn.fuse(layer, inplace=True)
    x = Draws(SEED).normal(2, 3, 6)
    assert torch.equal(fused(x), fastnn.unfuse(fused)(x))


@pytest.mark.parametrize("observe", [forward_hook, backward_hook], ids=lambda hook: hook.__name__)
@pytest.mark.parametrize("name", ["linear1", "activation"])
def test_hooks_in_a_transformer(observe, name):
    stock = nn.TransformerEncoderLayer(6, 2, 8, 0.0, nn.ReLU(), batch_first=True)
    fused = fastnn.fuse(stock)
    x, seen = Draws(SEED).normal(2, 3, 6), []
    for model in (fused, stock):
        observe(getattr(model, name), seen)
        model(x).sum().backward()
    assert torch.equal(*seen)

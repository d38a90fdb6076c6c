"""torchvision: heads that fuse, and the autograd tutorial's program."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision import models

import fastnn
from support.examples import STOCK, assert_trained_alike, copy_of_state, fused_paths, load

program = load("with_torchvision")

HEADS = {
    models.alexnet: ["classifier.1", "classifier.4"],
    models.vgg16: ["classifier.0", "classifier.3"],
}


def train(model: nn.Module, loss_fn: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    dtype = next(model.parameters()).dtype
    torch.manual_seed(1)  # seeds the images, and the dropout after the fused layers
    for _ in range(2):
        pictures = torch.rand(2, 3, 64, 64, dtype=dtype)
        optimizer.zero_grad()
        loss_fn(model(pictures), torch.randint(10, (2,))).backward()
        optimizer.step()


@pytest.mark.parametrize("build", HEADS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fused_heads_train_as_stock(build, dtype):
    stock = build(num_classes=10).to(dtype)
    start = copy_of_state(stock)
    fused = fastnn.fuse(copy.deepcopy(stock), inplace=True)
    assert fused_paths(fused) == HEADS[build]
    options = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}
    train(stock, nn.CrossEntropyLoss(), torch.optim.SGD(stock.parameters(), **options))
    train(fused, fastnn.nn.CrossEntropyLoss(), fastnn.optim.SGD(fused.parameters(), **options))
    assert_trained_alike(fused, stock, start)


def test_a_resnet_has_nothing_to_fuse():
    report = fastnn.fusion_report(models.resnet18())
    assert [(entry.path, entry.state) for entry in report.entries] == [("fc", "left")]


def test_the_tutorials_step_is_stocks(monkeypatch):
    ours = program.step()
    monkeypatch.setattr(program, "fastnn", STOCK)
    stock = program.step()
    for (name, mine), theirs in zip(ours.named_parameters(), stock.parameters(), strict=True):
        # Forward and backward ran the same operators; only the step differs.
        assert torch.equal(mine.grad, theirs.grad), name
        # One rounds lr * grad; the other includes it in a fused multiply-add.
        torch.testing.assert_close(
            mine, theirs, rtol=1e-6, atol=1e-6 * float(mine.grad.abs().max())
        )


def test_the_program_runs(capsys):
    program.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("conv1.weight")
    assert lines[-1] == "2 fused, 1 left"

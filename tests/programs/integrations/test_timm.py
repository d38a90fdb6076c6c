"""timm: models with ``act_layer='relu'``."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import fastnn
from support.examples import (
    STOCK,
    assert_learns_as_stock,
    assert_trained_alike,
    copy_of_state,
    fused_paths,
    load,
)

program = load("with_timm")

PAIRS = {"convnext_tiny": 18, "vit_tiny_patch16_224": 12}


def build(name: str) -> nn.Module:
    size = {"img_size": 32} if name.startswith("vit") else {}
    return timm.create_model(name, act_layer="relu", num_classes=10, **size)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fused_models_train_as_stock(name, dtype):
    stock = build(name).to(dtype)
    start = copy_of_state(stock)
    fused = fastnn.fuse(copy.deepcopy(stock), inplace=True)
    paths = fused_paths(fused)
    assert len(paths) == PAIRS[name]
    assert all(path.endswith("mlp.fc1") for path in paths)
    options = {"lr": 0.01, "momentum": 0.9}
    pictures, labels = torch.rand(2, 4, 3, 32, 32, dtype=dtype), torch.randint(10, (2, 4))
    for model, loss_fn, sgd in (
        (stock, nn.CrossEntropyLoss(), torch.optim.SGD),
        (fused, fastnn.nn.CrossEntropyLoss(), fastnn.optim.SGD),
    ):
        optimizer = sgd(model.parameters(), **options)
        for x, y in zip(pictures, labels, strict=True):
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
    assert_trained_alike(fused, stock, start)


def test_gelu_is_left():
    report = fastnn.fusion_report(timm.create_model("vit_tiny_patch16_224"))
    assert not report.fusible
    reasons = {entry.reason for entry in report.left if entry.path.endswith("fc1")}
    assert reasons == {"followed by GELU, not by ReLU"}


def test_the_program_learns_as_stock(monkeypatch):
    model, losses = program.train()
    assert len(fused_paths(model)) == 12
    monkeypatch.setattr(program, "fastnn", STOCK)
    assert_learns_as_stock(losses, program.train()[1])


def test_the_program_runs(capsys):
    program.main()
    assert capsys.readouterr().out.splitlines()[-1].startswith("loss: 1.")

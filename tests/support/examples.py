"""The programs in examples/, run as they are and with PyTorch's own modules instead of fastnn's."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import fastnn
from repository import REPOSITORY

EXAMPLES = REPOSITORY / "examples"


def load(name: str) -> ModuleType:
    """The program as a module, under the name that pickles refer to."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(name)


# Replaces fastnn for a program that is to run without it.
STOCK = SimpleNamespace(
    fuse=lambda model, **options: model,
    functional=torch.nn.functional,
    nn=torch.nn,
    optim=torch.optim,
)


def fused_paths(model: nn.Module) -> list[str]:
    """The paths of the Linear layers that run fused; losses are not included."""
    report = fastnn.fusion_report(model)
    return [entry.path for entry in report.fused if entry.container is not None]


def assert_learns_as_stock(ours: list[float], stock: list[float], rel: float = 1e-3) -> None:
    """Both learn, and their losses agree for ten steps.

    Later a unit whose input is within rounding of zero may count as positive on one side only, and
    the trainings diverge. The first ten losses differed by up to 5e-5 in float32.
    """
    assert len(ours) == len(stock) > 10
    assert ours[:10] == pytest.approx(stock[:10], rel=rel)
    for losses in (ours, stock):
        # Single losses are too noisy.
        assert sum(losses[-3:]) < 0.5 * sum(losses[:3]), losses


# See assert_trained_alike.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 0.05}


def assert_trained_alike(ours: nn.Module, stock: nn.Module, start: dict[str, torch.Tensor]) -> None:
    """Compares the distance of each parameter's end from stock's with how far training moved it.

    An error in a formula shows up as a share of the movement, whatever the parameter's size. In VGG
    and AlexNet rounding amounted to 5e-14 of it in float64 and to 2e-5 in float32, but to 7e-3
    below a unit whose input is within rounding of zero and counts as positive on one side only.
    Gradients that are zero up to rounding, like those of a key's bias, allow no such statement:
    hence the share of all movement.
    """
    mine, theirs = ours.state_dict(), stock.state_dict()
    assert list(mine) == list(theirs) == list(start)
    moved = {name: float((theirs[name] - start[name]).norm()) for name in start}
    for name, distance in moved.items():
        apart = float((mine[name] - theirs[name]).norm())
        allowed = TOLERANCE[theirs[name].dtype] * (distance + 1e-4 * sum(moved.values()))
        assert apart <= allowed, f"{name}: {apart:.1e} apart, moved by {distance:.1e}"


def copy_of_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}

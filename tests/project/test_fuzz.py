"""The fuzzer: a short run, always the same one, and proof that it finds planted faults."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnn
from fuzz.search import KINDS, Search

pytestmark = pytest.mark.cpu_only("a bad class index, which the CPU raises for, trips an assert")

PROGRAMS = {"modules": 100, "optimizers": 200, "losses": 200}


@pytest.mark.parametrize("kind", KINDS)
def test_programs_see_the_same_with_torch_and_with_fastnn(kind):
    for difference, program in Search(kind).look(seed=0, examples=PROGRAMS[kind]).items():
        pytest.fail(f"{difference}\n{program.source}", pytrace=False)


def fuse_layers(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Moves the ReLU into the Linear, which a program that calls only the Linear notices."""
    for row in model.modules():
        if type(row) is nn.Sequential:
            for first, second in pairwise(row):
                if type(first) is nn.Linear and type(second) is nn.ReLU:
                    first.__class__ = fastnn.nn.LinearReLU
    return model


class Forgetful(torch.optim.SGD):
    """Loses its momentum buffers."""

    def step(self, closure=None):
        self.state.clear()
        return super().step(closure)

    @staticmethod
    def from_torch(optimizer):
        return optimizer


def unsmoothed_cross_entropy(input, target, label_smoothing=0.0, **options):
    return F.cross_entropy(input, target, **options)


@pytest.mark.parametrize(
    ("kind", "place", "name", "fault"),
    [
        ("modules", fastnn, "fuse", fuse_layers),
        ("optimizers", fastnn.optim, "SGD", Forgetful),
        ("losses", fastnn.functional, "cross_entropy", unsmoothed_cross_entropy),
    ],
)
def test_a_planted_fault_is_found(kind, place, name, fault, monkeypatch, capsys):
    """It finds the fault in a small program, and prints what torch and fastnn compute."""
    monkeypatch.setattr(place, name, fault)
    (program,) = Search(kind).look(seed=0, examples=300).values()
    assert len(program.body.splitlines()) < 30
    exec(program.source, {"__name__": "__main__"})
    printed = capsys.readouterr().out.splitlines()
    assert {line[8:] for line in printed[::2]} != {line[8:] for line in printed[1::2]}

"""examples/language_model.py: both heads learn the same."""

from __future__ import annotations

import pytest
import torch

from support.examples import load

pytestmark = pytest.mark.cpu_only("the example, which trains on the CPU")


def test_both_heads_learn_alike():
    program = load("language_model")
    with torch.random.fork_rng(devices=[]):
        losses = {head: program.train(head, 500, 64, 20)[0] for head in program.HEADS}
    # The first ten steps: sums differ in order, and later a unit whose input is within rounding of
    # zero may count as positive on one side only.
    assert losses["fastnn"][:10] == pytest.approx(losses["ordinary"][:10], rel=1e-4)
    assert sum(losses["fastnn"][-3:]) < 0.95 * sum(losses["fastnn"][:3])


def test_the_picture(tmp_path):
    program = load("language_model")
    with torch.random.fork_rng(devices=[]):
        trainings = {head: program.measure(head, 500, 64, 1) for head in program.HEADS}
    assert all(training.milliseconds > 0 <= training.mebibytes for training in trainings.values())
    program.draw(trainings, tmp_path / "heads.png", "500 classes")
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")

"""For the tests of the training step: chooses how its calls run."""

from __future__ import annotations

import pytest

from fastnn._fused_step import FusedStep


@pytest.fixture
def no_fused_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes calls run the ordinary loop, with its bits; the fused step may round otherwise."""
    monkeypatch.setattr(FusedStep, "why_not", lambda *_: "the test leaves it out")

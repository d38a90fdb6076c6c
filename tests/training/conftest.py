"""For the tests of the training step: which way its calls go."""

from __future__ import annotations

import pytest

from fastnn._fused_step import FusedStep


@pytest.fixture
def no_fused_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls go the ordinary way, which gives the loop's bits; the fused one may round otherwise."""
    monkeypatch.setattr(FusedStep, "why_not", lambda *_: "the test leaves it out")

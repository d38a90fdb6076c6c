"""For the tests of the optimizer: what torch's SGD does beside it, and where scalars are read."""

from __future__ import annotations

import importlib

import pytest
import torch


@pytest.fixture(autouse=True)
def _torch_steps_parameter_by_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does by default on the CPU. On a GPU its default is foreach, which writes to the
    gradients (Nesterov's) and takes parameters that share memory for several."""
    module = importlib.import_module("torch.optim.sgd")  # torch.optim hides it
    monkeypatch.setattr(module, "_default_to_fused_or_foreach", lambda *_, **__: (False, False))


@pytest.fixture
def scalars_stay_on_device(monkeypatch):
    """Has the optimizer treat the CPU's tensors as a GPU's: the kernels read them, not the host."""
    monkeypatch.setattr("fastnn.optim._fused._is_on_gpu", torch.is_tensor)

"""For the optimizer's tests: how torch's SGD steps, and where scalars are read."""

from __future__ import annotations

import importlib

import pytest
import torch


@pytest.fixture(autouse=True)
def _torch_steps_parameter_by_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    """This is torch's default on the CPU. On a GPU it is foreach, which modifies gradients (with
    Nesterov) and treats parameters that share memory as several."""
    module = importlib.import_module("torch.optim.sgd")  # torch.optim hides it
    monkeypatch.setattr(module, "_default_to_fused_or_foreach", lambda *_, **__: (False, False))


@pytest.fixture
def scalars_stay_on_device(monkeypatch):
    """Makes the optimizer treat CPU tensors like a GPU's: the kernels read them, not the host."""
    monkeypatch.setattr("fastnn.optim._fused._is_on_gpu", torch.is_tensor)

"""Modes and contexts under which calls are made."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.overrides import TorchFunctionMode

CONTEXTS = [torch.enable_grad, torch.no_grad, torch.inference_mode]


class FunctionRecorder(TorchFunctionMode):
    """Records the functions called under it."""

    def __init__(self) -> None:
        self.called: list[Callable] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.called.append(func)
        return func(*args, **(kwargs or {}))
